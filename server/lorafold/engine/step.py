"""The plan of one step: which tokens of which sequences run, and where in the cache each belongs and looks.

What a page held before is never read: attention sees a sequence's own places only.

Shapes in the names: T packed tokens, B sequences, N pages of the longest one, L tokens of one sequence, S places of a
page.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.pages import SCRATCH

if TYPE_CHECKING:
    from lorafold.engine.cpu_attention import Layout


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


Run = tuple[int, int]
"""The first of neighbouring places, and one past the last."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where one sequence lies."""

    runs: tuple[Run, ...]
    """As few pieces as there are."""
    place_L: Tensor | None
    """int64: the same places one by one; None for a single run."""


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
    start_B: Tensor
    """The first token of each in the packed row."""
    count_B: Tensor
    """How many of its tokens are in the row."""

    def rows(self, start: int, stop: int | None = None) -> "Tables":
        """Some of the sequences."""
        part = slice(start, stop)
        return Tables(
            pages_BN=self.pages_BN[part],
            length_B=self.length_B[part],
            start_B=self.start_B[part],
            count_B=self.count_B[part],
        )


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
    decoding_at: tuple[tuple[Run, ...], ...]
    """Where they lie; empty if there are tables."""
    chunks: tuple[Chunk, ...]
    """The sequences whose prompts are read."""
    tables: Tables | None
    """All sequences, for means that read them."""
    layouts: "dict[tuple[int, int | None, int], Layout]" = field(default_factory=dict)
    """How a CPU computes its attention, by bytes of a place, window and parts of a place; made by the first layer that
    needs it.
    """


def plan_step(cache: PagedCache, parts: Sequence[Part], device: torch.device, *, with_tables: bool) -> Step:
    """The step that runs `parts` in this order; those that decode come first. With tables for means that read them."""
    decoding = [part for part in parts if part.decodes]
    assert all(part.decodes for part in parts[: len(decoding)])
    at = () if with_tables else tuple(tuple(runs_of(part.pages, part.length, cache.size)) for part in decoding)
    return Step(
        cache=cache,
        place_T=torch.tensor([place for part in parts for place in new_places(part, cache.size)], device=device),
        position_T=torch.tensor([at for part in parts for at in range(part.past, part.length)], device=device),
        decoding=len(decoding),
        decoding_at=at,
        chunks=tuple(chunks(parts[len(decoding) :], len(decoding), cache.size, device)),
        tables=tables(parts, cache.size, device) if with_tables else None,
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
    runs = tuple(runs_of(part.pages, part.length, size))
    if len(runs) == 1:
        return Whereabouts(runs, None)
    return Whereabouts(runs, torch.cat([torch.arange(start, stop, device=device) for start, stop in runs]))


def runs_of(pages: Sequence[int], tokens: int, size: int) -> Iterator[Run]:
    """The places of the first `tokens` tokens of a sequence."""
    used = -(-tokens // size)
    cuts = [0, *(at for at in range(1, used) if pages[at] != pages[at - 1] + 1), used]
    for first, end in pairwise(cuts):
        start = pages[first] * size
        yield start, start + min(end * size, tokens) - first * size


def tables(parts: Sequence[Part], size: int, device: torch.device) -> Tables:
    """The sequences of `parts` as tensors."""
    used = [-(-part.length // size) for part in parts]
    pages = [[*part.pages[:count], *[SCRATCH] * (max(used) - count)] for part, count in zip(parts, used, strict=True)]
    starts = accumulate((part.tokens for part in parts), initial=0)
    numbers = [(part.length, start, part.tokens) for part, start in zip(parts, starts, strict=False)]
    numbers_B3 = torch.tensor(numbers, dtype=torch.int32, device=device)
    length_B, start_B, count_B = numbers_B3.T.contiguous()
    pages_BN = torch.tensor(pages, dtype=torch.int32, device=device)
    return Tables(pages_BN=pages_BN, length_B=length_B, start_B=start_B, count_B=count_B)
