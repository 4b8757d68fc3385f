"""Adapters that nobody has trained, for measuring what adapters cost: right in shape and place, random in value."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.updates import LowRank, Update

SIZE = 1e-3
"""Of the factors' values."""


def made_up(model: PreTrainedModel, rank: int, seed: int, like: BoundAdapter | None = None) -> BoundAdapter:
    """LoRA of `rank` on the modules that `like` changes by low-rank products, or else on all linear layers.

    On the CPU, in the model's dtype. Equal arguments give equal adapters.
    """
    generator = torch.Generator().manual_seed(seed)
    updates = {
        name: low_rank(inputs, outputs, rank, model.dtype, stored_as_IO=turned, generator=generator)
        for name, (inputs, outputs, turned) in shapes(model, like)
    }
    told = f"made up: rank {rank}, seed {seed}, {model.dtype}, {sorted(updates)}"
    return BoundAdapter(
        digest=hashlib.sha256(told.encode()).hexdigest(),
        kind="made up",
        updates=updates,
        targeted=len(updates),
        bound=len(updates),
        fold_refusal="it was made up for a measurement",
        route_refusal=None,
    )


def shapes(model: PreTrainedModel, like: BoundAdapter | None) -> Iterator[tuple[str, tuple[int, int, bool]]]:
    """In-features, out-features, and whether the weight is stored transposed, of each module to change."""
    if like is not None:
        for name, update in like.updates.items():
            if isinstance(update, LowRank):
                yield name, (update.a_RI.shape[1], update.b_OR.shape[0], update.stored_as_IO)
        return
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, (module.in_features, module.out_features, False)
        elif isinstance(module, Conv1D):
            yield name, (module.nx, module.nf, True)


def low_rank(
    inputs: int, outputs: int, rank: int, dtype: torch.dtype, *, stored_as_IO: bool, generator: torch.Generator
) -> LowRank:
    """Random factors."""
    return LowRank(
        a_RI=(torch.randn(rank, inputs, generator=generator) * SIZE).to(dtype),
        b_OR=(torch.randn(outputs, rank, generator=generator) * SIZE).to(dtype),
        scaling=1.0,
        stored_as_IO=stored_as_IO,
    )


def rank_of(bound: BoundAdapter) -> int | None:
    """The largest rank of an adapter; None if it is more than low-rank products."""
    ranks = [rank for update in bound.updates.values() if (rank := plain_rank(update)) is not None]
    return max(ranks) if len(ranks) == len(bound.updates) > 0 else None


def plain_rank(update: Update) -> int | None:
    """The rank of `W + scaling * B A` and nothing more; None for any other update."""
    if not isinstance(update, LowRank):
        return None
    more = (update.bias_O, update.magnitude_O, update.new_bias_O)
    return update.a_RI.shape[0] if all(part is None for part in more) else None


def plain_only(loaded: Mapping[str, BoundAdapter]) -> dict[str, int]:
    """Rank of each adapter that is low-rank products and nothing more, by name."""
    return {name: rank for name, bound in loaded.items() if (rank := rank_of(bound)) is not None}
