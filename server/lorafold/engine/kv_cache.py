"""Keys and values of running sequences: one slot of fixed length for each, and the plan of one step over them.

A slot holds what one adapter computed. A step reads a slot up to the longest sequence in the batch, places after the
sequence's own end included: they are masked, but 0 times NaN is NaN, so a new sequence finds nothing but zeros there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class SlotCache:
    """For each layer keys and values [slots, K, length, D], made when the layer first runs, filled with zeros."""

    def __init__(self, *, slots: int, length: int) -> None:
        self.slots = slots
        self.length = length
        self.written = [0] * slots
        """How far each slot was written by its latest sequence."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def store(self, layer: int, key: Tensor, value: Tensor, step: "Step") -> tuple[Tensor, Tensor]:
        """Puts `key` and `value` [1, K, T, D] of a step in their places; returns the layer's whole cache."""
        if layer not in self._layers:
            self._layers[layer] = (self._zeros(key), self._zeros(value))
        for cached, new in zip(self._layers[layer], (key, value), strict=True):
            for chunk in step.chunks:
                cached[chunk.slot, :, : chunk.stale].zero_()
            cached[step.slot_T, :, step.position_T] = new[0].transpose(0, 1)
        return self._layers[layer]

    def _zeros(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.slots, like.shape[1], self.length, like.shape[3])

    @property
    def nbytes(self) -> int:
        """Memory in use, all layers."""
        return sum(key.nbytes + value.nbytes for key, value in self._layers.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Part of a prompt that one step reads."""

    start: int
    """First token of the chunk in the packed row."""
    stop: int
    """One past its last token."""
    slot: int
    past: int
    """Tokens of the sequence that are cached already."""
    stale: int
    """Places from the slot's first that an earlier sequence wrote and this one must find empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Where each token of one packed row [1, T] belongs."""

    cache: SlotCache
    slot_T: Tensor
    """int64."""
    position_T: Tensor
    """int64: its place in its sequence."""
    decoding_B: Tensor
    """int64: indices in the row of sequences that decode one token."""
    decoding_length: int
    """Cached length that covers every decoding sequence."""
    chunks: tuple[Chunk, ...]


LENGTH_BUCKET = 64


def plan_step(cache: SlotCache, parts: list[tuple[int, int, int]], device: torch.device) -> Step:
    """The step that runs `parts` = (slot, tokens cached already, tokens to run) in this order."""
    slots: list[int] = []
    positions: list[int] = []
    decoding: list[int] = []
    chunks: list[Chunk] = []
    longest = start = 0
    for slot, past, tokens in parts:
        slots += [slot] * tokens
        positions += range(past, past + tokens)
        if tokens == 1 and past > 0:
            decoding.append(start)
            longest = max(longest, past + 1)
        else:
            stale = 0 if past else cache.written[slot]
            chunks.append(Chunk(start=start, stop=start + tokens, slot=slot, past=past, stale=stale))
        cache.written[slot] = past + tokens
        start += tokens
    return Step(
        cache=cache,
        slot_T=torch.tensor(slots, device=device),
        position_T=torch.tensor(positions, device=device),
        decoding_B=torch.tensor(decoding, dtype=torch.int64, device=device),
        decoding_length=min(-(-longest // LENGTH_BUCKET) * LENGTH_BUCKET, cache.length),
        chunks=tuple(chunks),
    )
