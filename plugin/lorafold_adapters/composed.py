"""Compositions of bound adapters: one update per module that computes from those of its parts.

`linear` and `svd` of plain LoRA are LoRA again: factors side by side. Everything else is computed parameter by
parameter when it is folded; what runs beside the weights then is in `routes.py`. The formulas are in `compose.py`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.compose import Composition, Piece, check_weights, combine
from lorafold_adapters.delta import AddProduct, AddValues, Change
from lorafold_adapters.errors import CompositionInvalid
from lorafold_adapters.fold import shared_once
from lorafold_adapters.modes import changed_keys, fold_refusal, quantised_refusal
from lorafold_adapters.truncate import truncated_product
from lorafold_adapters.updates import LowRank, OnTensor, Pristine, ThroughPeft, Update


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One adapter of a composition, at one module."""

    index: int
    """Its place in the composition; not every part changes every module."""
    weight: float
    update: Update


@dataclass(frozen=True, kw_only=True, slots=True)
class Combined:
    """The composed delta, added to the base; a `Change` of one parameter."""

    spec: Composition
    name: str
    """The first name that the base has for the parameter."""
    parts: tuple[tuple[int, float, Change], ...]
    """Index, weight and change of the parts that change this parameter."""

    @property
    def whole(self) -> bool:
        """Trimming needs every element."""
        return True

    def delta(self, base: Tensor) -> Tensor:
        """What is added to `base`, the whole parameter; fp32."""
        pieces = (
            Piece(index=index, weight=weight, delta=partial(true_delta, change, base))
            for index, weight, change in self.parts
        )
        return combine(self.spec, pieces, self.name)

    def forward(self, base: Tensor, rows: slice, out: Tensor) -> None:
        """See `Change`."""
        out.copy_(base).add_(self.delta(base))

    def backward(self, folded: Tensor, rows: slice, out: Tensor, memo: Tensor | None) -> None:
        """Computing it again would cost more than remembering: the record holds what it changed."""
        out.copy_(folded)


def true_delta(change: Change, base: Tensor) -> Tensor:
    """What a change adds to a whole parameter, fp32; straight from its factors where the base plays no part in it."""
    everything = slice(0, base.shape[0])
    delta = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    if isinstance(change, AddValues) or (isinstance(change, AddProduct) and change.magnitude is None):
        change.forward(torch.zeros_like(delta), everything, delta)
        return delta
    change.forward(base, everything, delta)
    return delta.sub_(base)


@dataclass(frozen=True, kw_only=True, slots=True)
class Composed:
    """An `Update` of one module that several adapters' updates make up."""

    spec: Composition
    parts: tuple[Part, ...]
    names: Mapping[str, str]
    """The parameters that change, by the module's own names: the first name that the base has for each."""

    def changes(self, pristine: Pristine) -> dict[str, Change]:
        """See `Update`."""
        by_part = [(part, part.update.changes(pristine)) for part in self.parts]
        return {
            key: Combined(
                spec=self.spec,
                name=name,
                parts=tuple((part.index, part.weight, changes[key]) for part, changes in by_part if key in changes),
            )
            for key, name in self.names.items()
        }

    def tensors(self) -> list[Tensor]:
        """See `Update`."""
        return [tensor for part in self.parts for tensor in part.update.tensors()]

    def mapped(self, function: OnTensor) -> "Composed":
        """See `Update`."""
        return replace(self, parts=tuple(replace(part, update=part.update.mapped(function)) for part in self.parts))


def compose(parts: Sequence[tuple[BoundAdapter, float]], spec: Composition, model: PreTrainedModel) -> BoundAdapter:
    """One adapter out of several, each with its weight; all were bound to `model`, of which only shapes are read.

    Raises CompositionInvalid.
    """
    check_weights([weight for _, weight in parts])
    for index, (bound, _) in enumerate(parts):
        if any(isinstance(update, Composed) for update in bound.updates.values()):
            raise CompositionInvalid(f"parts[{index}]", "is a composition: compose its parts instead")
    first = shared_once(model)[1]
    updates = {name: update_of(name, list(parts_at(name, parts)), spec, first) for name in modules_of(parts)}
    return BoundAdapter(
        digest=composed_digest(parts, spec),
        kind=f"{spec.method.upper()}({', '.join(bound.kind for bound, _ in parts)})",
        updates=updates,
        targeted=len(updates),
        bound=len(updates),
        fold_refusal=quantised_refusal(updates, dict(model.named_modules()))
        or fold_refusal(updates, dict(model.named_parameters(remove_duplicate=False))),
        route_refusal=composed_route_refusal(updates, model),
    )


def modules_of(parts: Sequence[tuple[BoundAdapter, float]]) -> list[str]:
    """Every module that a part changes, once."""
    return list(dict.fromkeys(name for bound, _ in parts for name in bound.updates))


def parts_at(name: str, parts: Sequence[tuple[BoundAdapter, float]]) -> Iterator[Part]:
    """The parts that change module `name`."""
    for index, (bound, weight) in enumerate(parts):
        if name in bound.updates:
            yield Part(index=index, weight=weight, update=bound.updates[name])


def update_of(module: str, parts: Sequence[Part], spec: Composition, first: Mapping[str, str]) -> Update:
    """The composition at one module; `first` gives the first name of every name of a parameter."""
    factors = [(part.weight, part.update) for part in parts if isinstance(part.update, LowRank)]
    plain = all(update.magnitude_O is None and update.new_bias_O is None for _, update in factors)
    layouts = {update.stored_as_IO for _, update in factors}
    if spec.method in ("linear", "svd") and plain and len(factors) == len(parts) and len(layouts) == 1:
        return side_by_side(factors, spec.rank)
    keys = dict.fromkeys(key for part in parts for key in changed_keys(part.update))
    names = {key: first.get(f"{module}.{key}", f"{module}.{key}") for key in keys}
    return Composed(spec=spec, parts=tuple(parts), names=names)


def side_by_side(factors: Sequence[tuple[float, LowRank]], rank: int | None) -> LowRank:
    """`sum_t w_t s_t B_t A_t` as one product: ranks add up, then are cut to `rank` if there is one."""
    a_RI = torch.cat([update.a_RI for _, update in factors])
    b_OR = torch.cat([update.b_OR.float() * (weight * update.scaling) for weight, update in factors], dim=1)
    if rank is not None and rank < a_RI.shape[0]:
        b_OR, a_RI = truncated_product(b_OR, a_RI.float(), rank)
    biases = [update.bias_O.float() * (w * update.scaling) for w, update in factors if update.bias_O is not None]
    return LowRank(
        a_RI=a_RI,
        b_OR=b_OR,
        scaling=1.0,
        bias_O=torch.stack(biases).sum(dim=0) if biases else None,
        stored_as_IO=factors[0][1].stored_as_IO,
    )


def composed_digest(parts: Sequence[tuple[BoundAdapter, float]], spec: Composition) -> str:
    """SHA-256, hexadecimal, over the method, its options, and the parts' digests and weights in their order."""
    content = [spec.method, spec.density, spec.seed, spec.rank, [(bound.digest, weight) for bound, weight in parts]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def composed_route_refusal(updates: Mapping[str, Update], model: nn.Module) -> str | None:
    """Why a composition cannot run beside the weights, as far as that is known without computing it."""
    for name, update in updates.items():
        if isinstance(update, Composed) and not isinstance(model.get_submodule(name), nn.Linear | Conv1D):
            for part in update.parts:
                if isinstance(part.update, ThroughPeft):
                    return f"{part.update.method} has no low-rank form that could run beside the weights"
    return None
