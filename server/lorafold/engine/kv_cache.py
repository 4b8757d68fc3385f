"""Keys and values of running sequences in pages, and the plan of one step over them. `pages` knows which is whose.

Per layer two tensors [P, S, K, D]: P pages of S tokens, K key-value heads, D head width. A place is a token's index in
[P * S]. What a page held before is never read: attention sees a sequence's own places only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.engine.pages import SCRATCH

Run = tuple[int, int]
"""First place, and one past the last, of neighbouring places."""


class PagedCache:
    """Keys and values of every layer, made when the layer first runs."""

    def __init__(self, *, pages: int, size: int) -> None:
        self.pages = pages
        self.size = size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def store(self, layer: int, key: Tensor, value: Tensor, place_T: Tensor) -> tuple[Tensor, Tensor]:
        """Puts `key` and `value` [1, K, T, D] in their places; returns all of the layer's, [P * S, K, D]."""
        if layer not in self._layers:
            self._layers[layer] = (self._room(key), self._room(value))
        keys, values = self._layers[layer]
        keys.index_copy_(0, place_T, key[0].transpose(0, 1))
        values.index_copy_(0, place_T, value[0].transpose(0, 1))
        return keys, values

    def _room(self, like: Tensor) -> Tensor:
        return like.new_empty(self.pages * self.size, like.shape[1], like.shape[3])

    @property
    def nbytes(self) -> int:
        """Memory of all layers that have run."""
        return sum(key.nbytes + value.nbytes for key, value in self._layers.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one step runs of one sequence."""

    tokens: int
    past: int
    """Tokens of the sequence that are cached already."""
    pages: Sequence[int]
    """Room for all of them, in order."""
    decodes: bool
    """True for the single next token of an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Tokens of one sequence that a step reads together."""

    start: int
    """First token of the chunk in the packed row."""
    stop: int
    """One past its last token."""
    past: int
    runs: tuple[Run, ...]
    """Where the sequence lies, these tokens included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """Sequences that decode one token each: the first ones of the packed row."""

    count: int
    runs: tuple[tuple[Run, ...], ...]
    """Where each sequence lies, its new token included."""
    pages_BN: Tensor
    """int32; filled up with the scratch page."""
    length_B: Tensor
    """int32: tokens of each sequence, the new one included; 0 for rows that only pad the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Where each token of one packed row [1, T] belongs."""

    cache: PagedCache
    place_T: Tensor
    """int64."""
    position_T: Tensor
    """int64: its place in its sequence."""
    decoding: Decoding | None
    chunks: tuple[Chunk, ...]


def plan_step(cache: PagedCache, parts: Sequence[Part], device: torch.device) -> Step:
    """The step that runs `parts` in this order; those that decode come first."""
    places: list[int] = []
    positions: list[int] = []
    chunks: list[Chunk] = []
    for part in parts:
        stop = part.past + part.tokens
        if not part.decodes:
            runs = runs_of(part.pages, stop, cache.size)
            start = len(places)
            chunks.append(Chunk(start=start, stop=start + part.tokens, past=part.past, runs=runs))
        positions += range(part.past, stop)
        places += [part.pages[at // cache.size] * cache.size + at % cache.size for at in range(part.past, stop)]
    return Step(
        cache=cache,
        place_T=torch.tensor(places, device=device),
        position_T=torch.tensor(positions, device=device),
        decoding=plan_decoding(cache, [part for part in parts if part.decodes], device),
        chunks=tuple(chunks),
    )


def plan_decoding(cache: PagedCache, parts: Sequence[Part], device: torch.device) -> Decoding | None:
    """Where the sequences lie that decode. On a CPU as runs, on a GPU as tables."""
    if not parts:
        return None
    lengths = [part.past + 1 for part in parts]
    if device.type == "cpu":
        runs = tuple(runs_of(part.pages, length, cache.size) for part, length in zip(parts, lengths, strict=True))
        tables: list[list[int]] = []
    else:
        runs = ()
        widest = max(-(-length // cache.size) for length in lengths)
        tables = [[*part.pages[:widest], *[SCRATCH] * (widest - len(part.pages))] for part in parts]
    return Decoding(
        count=len(parts),
        runs=runs,
        pages_BN=torch.tensor(tables, dtype=torch.int32, device=device),
        length_B=torch.tensor(lengths, dtype=torch.int32, device=device),
    )


def runs_of(pages: Sequence[int], tokens: int, size: int) -> tuple[Run, ...]:
    """The places of the first `tokens` tokens, as few pieces as possible."""
    runs: list[Run] = []
    for index in range(-(-tokens // size)):
        start = pages[index] * size
        stop = start + min(size, tokens - index * size)
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return tuple(runs)
