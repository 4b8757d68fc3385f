"""Which part of a batch has which adapter, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch


@dataclass(frozen=True, slots=True)
class Span:
    """Units `start` to `stop` (exclusive) of a batch belong to `adapter`."""

    start: int
    stop: int
    adapter: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Spans:
    """Which parts of a batch have an adapter. A unit is a row, or a token where rows are packed."""

    units: int
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, adapters: Sequence[str | None]) -> "Spans":
        """Neighbours with the same adapter become one span; None is the base."""
        spans: list[Span] = []
        stop = 0
        for adapter, same in groupby(adapters):
            start, stop = stop, stop + sum(1 for _ in same)
            if adapter is not None:
                spans.append(Span(start, stop, adapter))
        return cls(units=stop, spans=tuple(spans))

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, each once, in the order in which they first appear."""
        return tuple(dict.fromkeys(span.adapter for span in self.spans))

    @property
    def whole(self) -> bool:
        """True if one adapter has every unit."""
        return len(self.spans) == 1 and self.spans[0].stop - self.spans[0].start == self.units

    def units_of(self) -> dict[str, list[int]]:
        """The units of each adapter, in the order of `names`."""
        units: dict[str, list[int]] = {name: [] for name in self.names}
        for span in self.spans:
            units[span.adapter].extend(range(span.start, span.stop))
        return units

    def numbered(self, numbers: Mapping[str, int], device: torch.device) -> torch.Tensor:
        """For each unit the number of its adapter, int32; -1 where it has none."""
        number_N = torch.full((self.units,), -1, dtype=torch.int32)
        for span in self.spans:
            number_N[span.start : span.stop] = numbers.get(span.adapter, -1)
        return number_N.to(device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """One forward pass: the spans of its tokens and of what reaches the output embedding."""

    body: Spans
    head: Spans

    @classmethod
    def of(cls, body: Sequence[str | None], head: Sequence[str | None] | None = None) -> "Routing":
        """The spans; where one adapter has every unit, any number of them is one, so that one plan does for all."""
        spans = one_unit(Spans.of(body))
        return cls(body=spans, head=spans if head is None else one_unit(Spans.of(head)))


def one_unit(spans: Spans) -> Spans:
    """The spans, or one of one unit where an adapter has them all."""
    return Spans(units=1, spans=(Span(0, 1, spans.spans[0].adapter),)) if spans.whole else spans
