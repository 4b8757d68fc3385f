"""What a forward pass costs per token, estimated from shapes alone: nothing is run or measured.

A product with an [O, I] weight is 2 I O operations and reads I O numbers; at rank R, `B (A x)` is 2 R (I + O) and
R (I + O). Bytes are what one decode step reads for one row; rows with the same adapter share them. Attention over the
context, gains, biases and norms are left out: the first does not depend on the adapter, the others are small.
Shapes in the names: R rank, I in-features, O out-features, K new rows.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.composed import Composed
from lorafold_adapters.updates import LowRank, NewRows, Replaced, Update

EXPERTS_USED = ("num_experts_per_tok", "top_k", "moe_top_k")
"""What configurations call the number of experts that one token passes through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one token."""

    flops: int
    """Floating-point operations; a multiplication with an addition is two."""
    nbytes: int
    """Weights that are read."""

    def __add__(self, other: "Cost") -> "Cost":
        """Both, one after the other."""
        return Cost(flops=self.flops + other.flops, nbytes=self.nbytes + other.nbytes)


NOTHING = Cost(flops=0, nbytes=0)


def product_cost(inputs: int, outputs: int, itemsize: int) -> Cost:
    """One weight times one vector."""
    return Cost(flops=2 * inputs * outputs, nbytes=inputs * outputs * itemsize)


def low_rank_cost(rank: int, inputs: int, outputs: int, itemsize: int) -> Cost:
    """`B (A x)`: 2 R (I + O) operations, R (I + O) numbers."""
    return product_cost(inputs, rank, itemsize) + product_cost(rank, outputs, itemsize)


def looked_up_cost(rank: int, outputs: int, itemsize: int) -> Cost:
    """`B A[x]` on an embedding: A is looked up, one row of R numbers."""
    return Cost(flops=0, nbytes=rank * itemsize) + product_cost(rank, outputs, itemsize)


def path_cost(update: Update, module: nn.Module, itemsize: int) -> Cost:
    """What the two-path form of one update adds to what the module costs anyway."""
    embeds = isinstance(module, nn.Embedding)
    if isinstance(update, LowRank):
        rank, outputs = update.a_RI.shape[0], update.b_OR.shape[0]
        if embeds:
            return looked_up_cost(rank, outputs, itemsize)
        return low_rank_cost(rank, update.a_RI.shape[1], outputs, itemsize)
    if isinstance(update, NewRows):
        rows, width = update.values_KM.shape
        return Cost(flops=0, nbytes=width * itemsize) if embeds else product_cost(width, rows, itemsize)
    weight = update.parameters.get("weight") if isinstance(update, Replaced) else None
    if weight is None or weight.dim() != 2 or embeds:
        return NOTHING
    return product_cost(weight.shape[1], weight.shape[0], itemsize)


def two_path_cost(bound: BoundAdapter, model: nn.Module, itemsize: int) -> Cost:
    """What an adapter adds to a token beside the weights, in a base whose weights have `itemsize` bytes.

    Of a composition, what the forms cost that were made for it when it was loaded.
    """
    total = NOTHING
    for name, update in bound.updates.items():
        beside = bound.routes[name].update if name in bound.routes else update
        for one in [part.update for part in beside.parts] if isinstance(beside, Composed) else [beside]:
            total += path_cost(one, model.get_submodule(name), itemsize)
    return total


def base_cost(model: PreTrainedModel) -> Cost:
    """What the base's own weights cost a token: every linear layer, and of experts those that one token uses."""
    total = NOTHING
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            rows, columns = module.weight.shape
            total += product_cost(rows, columns, module.weight.element_size())
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3:
                used = min(experts_used(model), parameter.shape[0])
                one = product_cost(parameter.shape[1], parameter.shape[2], parameter.element_size())
                total += Cost(flops=one.flops * used, nbytes=one.nbytes * used)
    return total


def experts_used(model: PreTrainedModel) -> int:
    """How many experts a token passes through; 1 where the configuration does not say."""
    config = model.config.get_text_config()
    return next((int(value) for key in EXPERTS_USED if (value := getattr(config, key, None))), 1)
