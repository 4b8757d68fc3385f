"""What of a composition runs beside the weights: exact where there is such a form, or else the nearest low-rank one.

`linear` is exact, as the sum of its parts' paths; so are new values of norms, biases and whole modules. A composed
matrix that is no sum of products is approximated, and how far that is off decides whether it may be used.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.composed import Combined, Composed
from lorafold_adapters.modes import changed_keys
from lorafold_adapters.truncate import truncated
from lorafold_adapters.updates import LowRank, NewRows, Pristine, Replaced, Route, ThroughPeft, Update

MAX_RANK = 256
"""Of a truncated delta, unless the composition says another."""


def is_sum(update: Update) -> bool:
    """True if the update is exactly what its parts' own paths add up to."""
    return (
        isinstance(update, Composed)
        and update.spec.method == "linear"
        and not any(isinstance(part.update, ThroughPeft) for part in update.parts)
    )


def unrouted(bound: BoundAdapter) -> list[str]:
    """The modules whose form beside the weights must be made before the adapter can be routed."""
    if bound.route_refusal is not None:
        return []
    composed = [name for name, update in bound.updates.items() if isinstance(update, Composed) and not is_sum(update)]
    return [name for name in composed if name not in bound.routes]


def with_routes(bound: BoundAdapter, routes: Mapping[str, Route], max_error: float) -> BoundAdapter:
    """The adapter with the forms that `unrouted` asks for; it refuses to be routed if they lose too much."""
    bound = replace(bound, routes={**bound.routes, **routes})
    error = bound.route_error
    if error is None or error <= max_error:
        return bound
    refusal = (
        f"its low-rank form would change its delta by {error:.3g} of its size, more than max_delta_error "
        f"({max_error:g}) allows: give the composition a higher rank"
    )
    return replace(bound, route_refusal=refusal)


def route_of(update: Composed, module: nn.Module, pristine: Pristine) -> Route:
    """The form of a composition beside the weights of one module; on the device of the module."""
    changes = cast(dict[str, Combined], update.changes(pristine))
    on_weight = {type(part.update) for part in update.parts if "weight" in changed_keys(part.update)}
    if on_weight and on_weight <= {LowRank, ThroughPeft} and isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        return low_rank_route(update, module, pristine, changes)
    values = {key: change.delta(pristine(key)).add_(pristine(key)) for key, change in changes.items()}
    if on_weight == {NewRows}:
        index_K = torch.cat([cast(NewRows, part.update).index_K for part in update.parts])
        index_K = torch.unique(index_K)
        exact: Update = NewRows(index_K=index_K, values_KM=values["weight"][index_K])
    else:
        exact = Replaced(parameters=values)
    return Route(update=exact, squares=0.0, lost_squares=0.0)


def low_rank_route(update: Composed, module: nn.Module, pristine: Pristine, changes: Mapping[str, Combined]) -> Route:
    """The nearest low-rank product; a bias is exact."""
    rank = update.spec.rank or default_rank(update)
    nearest = truncated(changes["weight"].delta(pristine("weight")), rank)
    stored_as_IO = not isinstance(module, nn.Linear)
    a_RI, b_OR = nearest.right_RM, nearest.left_NR
    if stored_as_IO:
        a_RI, b_OR = nearest.left_NR.T.contiguous(), nearest.right_RM.T.contiguous()
    bias_O = None
    if "bias" in changes:
        own = module._parameters["bias"] is not None
        bias_O = changes["bias"].delta(pristine("bias") if own else torch.zeros_like(b_OR[:, 0]))
    low_rank = LowRank(a_RI=a_RI, b_OR=b_OR, scaling=1.0, bias_O=bias_O, stored_as_IO=stored_as_IO)
    return Route(update=low_rank, squares=nearest.squares, lost_squares=nearest.lost_squares)


def default_rank(update: Composed) -> int:
    """Twice the parts' ranks, as thinning out a low-rank delta raises its rank; at most `MAX_RANK`."""
    ranks = [part.update.a_RI.shape[0] if isinstance(part.update, LowRank) else math.inf for part in update.parts]
    return int(min(MAX_RANK, 2 * sum(ranks)))
