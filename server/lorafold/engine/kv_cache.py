"""Keys and values of running sequences in pages, and the plan of one step over them. `pages` knows which is whose.

Per layer two tensors [P, S, K, D]: P pages of S tokens, K key-value heads, D head width. A place is a token's index in
[P * S]. What a page held before is never read: attention sees a sequence's own places only.

Shapes in the names besides: T packed tokens, B decoding sequences, C chunks of prompts, N pages of the longest one,
L tokens of one sequence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lorafold.engine.pages import SCRATCH


class PagedCache:
    """Keys and values of every layer, made when the layer first runs."""

    def __init__(self, *, pages: int, size: int) -> None:
        self.pages = pages
        self.size = size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def store(self, layer: int, key: Tensor, value: Tensor, place_T: Tensor) -> tuple[Tensor, Tensor]:
        """Puts `key` and `value` [1, K, T, D] in their places; returns all of the layer's, [P, S, K, D]."""
        if layer not in self._layers:
            self._layers[layer] = (self._room(key), self._room(value))
        keys, values = self._layers[layer]
        keys.flatten(0, 1).index_copy_(0, place_T, key[0].transpose(0, 1))
        values.flatten(0, 1).index_copy_(0, place_T, value[0].transpose(0, 1))
        return keys, values

    def _room(self, like: Tensor) -> Tensor:
        return like.new_empty(self.pages, self.size, like.shape[1], like.shape[3])

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

    @property
    def length(self) -> int:
        """Tokens of the sequence, these included."""
        return self.past + self.tokens


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where one sequence lies."""

    start: int
    """Its first place."""
    stop: int
    """One past its last place, if its places are neighbours."""
    place_L: Tensor | None
    """int64; None if its places are neighbours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Tokens of one sequence that a step reads together."""

    start: int
    """First token of the chunk in the packed row."""
    stop: int
    """One past its last token."""
    past: int
    where: Whereabouts
    """These tokens included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """Where sequences lie, for kernels that read it on the device. All int32."""

    pages_BN: Tensor
    """Filled up with the scratch page."""
    length_B: Tensor
    """Tokens of each sequence, those of the step included; 0 for rows that only pad the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Where each token of one packed row [1, T] belongs. Those of sequences that decode come first."""

    cache: PagedCache
    place_T: Tensor
    """int64."""
    position_T: Tensor
    """int64: its place in its sequence."""
    decoding: int
    """Sequences that decode one token each."""
    decoding_at: tuple[Whereabouts, ...]
    """Where they lie; empty if there are tables."""
    decoding_tables: Tables | None
    """For means that read them."""
    chunks: tuple[Chunk, ...]


def plan_step(cache: PagedCache, parts: Sequence[Part], device: torch.device, *, with_tables: bool) -> Step:
    """The step that runs `parts` in this order; those that decode come first, `with_tables` for these or without."""
    decoding = [part for part in parts if part.decodes]
    assert all(part.decodes for part in parts[: len(decoding)])
    at = () if with_tables else tuple(whereabouts(part, cache.size, device) for part in decoding)
    return Step(
        cache=cache,
        place_T=torch.tensor([place for part in parts for place in new_places(part, cache.size)], device=device),
        position_T=torch.tensor([at for part in parts for at in range(part.past, part.length)], device=device),
        decoding=len(decoding),
        decoding_at=at,
        decoding_tables=tables(decoding, cache.size, device) if with_tables and decoding else None,
        chunks=tuple(chunks(parts[len(decoding) :], len(decoding), cache.size, device)),
    )


def new_places(part: Part, size: int) -> list[int]:
    """Where the tokens of the step belong."""
    return [part.pages[at // size] * size + at % size for at in range(part.past, part.length)]


def chunks(parts: Sequence[Part], start: int, size: int, device: torch.device) -> Iterator[Chunk]:
    """The parts that read a prompt, from token `start` of the packed row on."""
    for part in parts:
        yield Chunk(start=start, stop=start + part.tokens, past=part.past, where=whereabouts(part, size, device))
        start += part.tokens


def whereabouts(part: Part, size: int, device: torch.device) -> Whereabouts:
    """Where a sequence lies, the tokens of the step included."""
    pages, tokens = part.pages, part.length
    used = -(-tokens // size)
    start = pages[0] * size
    if pages[used - 1] - pages[0] == used - 1 and are_neighbours(pages[:used]):
        return Whereabouts(start, start + tokens, None)
    page_N = torch.tensor(pages[:used], device=device).unsqueeze(1)
    place_NS = page_N * size + torch.arange(size, device=device)
    return Whereabouts(start, start, place_NS.flatten()[:tokens])


def are_neighbours(pages: Sequence[int]) -> bool:
    """True if each page comes right after the one before."""
    return all(after - before == 1 for before, after in pairwise(pages))


def tables(parts: Sequence[Part], size: int, device: torch.device) -> Tables:
    """The sequences of `parts` as tensors."""
    used = [-(-part.length // size) for part in parts]
    rows = [[*part.pages[:count], *[SCRATCH] * (max(used) - count)] for part, count in zip(parts, used, strict=True)]
    return Tables(
        pages_BN=torch.tensor(rows, dtype=torch.int32, device=device),
        length_B=torch.tensor([part.length for part in parts], dtype=torch.int32, device=device),
    )
