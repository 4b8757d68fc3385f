"""What every site does for one composition of the batch; made once, and used for as long as the composition lasts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorafold_adapters.layout import Layout
from lorafold_adapters.paths import LowRankPath
from lorafold_adapters.sharing import Shared, Shrink, Sightings
from lorafold_adapters.spans import Routing, Spans
from lorafold_adapters.stacks import Stacks
from lorafold_adapters.steps import (
    Batch,
    EagerStep,
    Expand,
    Other,
    Part,
    SpanExpand,
    SpanShrink,
    StackExpand,
    StackShrink,
    Work,
)
from lorafold_adapters.two_path import Family, Site, Step


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The steps of one composition."""

    steps: tuple[tuple[Site, Step], ...]
    shared: tuple[Shared, ...]

    def enter(self) -> None:
        """From now on the sites run their steps."""
        for site, step in self.steps:
            site.enter(step)

    def leave(self) -> None:
        """The modules are what they were; no tensor of the forward pass is kept."""
        for site, _ in self.steps:
            site.leave()
        for shared in self.shared:
            shared.forget()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacked:
    """Which adapters are stacked, and where their tokens are."""

    stacks: Stacks
    body: Layout
    head: Layout | None
    """None where none of their tokens gets there."""

    @property
    def names(self) -> frozenset[str]:
        """The adapters."""
        return frozenset(self.stacks.slots)


def plan(
    routing: Routing, families: Iterable[Family], stacked: Stacked | None, batch: Batch, sightings: Sightings
) -> Plan:
    """The steps of all sites that an adapter of the batch changes."""
    steps: list[tuple[Site, Step]] = []
    shared: list[Shared] = []
    for family in families:
        is_head = family.sites[0].is_head
        spans = routing.head if is_head else routing.body
        rowwise = works(family, spans, None, is_head)
        grouped: Mapping[int, Work] = {} if stacked is None else works(family, spans, stacked, is_head)
        for place, work in rowwise.items():
            site, other = family.sites[place], grouped.get(place)
            step = EagerStep(
                site=site, batch=batch, sightings=sightings, units=spans.units, rowwise=work, stacked=other
            )
            steps.append((site, step))
            shared += [one.shared for one in (work, other) if one is not None and one.shared is not None]
    return Plan(steps=tuple(steps), shared=tuple(dict.fromkeys(shared)))


def works(family: Family, spans: Spans, stacked: Stacked | None, is_head: bool) -> dict[int, Work]:
    """By place in the family, what its site does; places without work are left out."""
    columns: list[tuple[Shrink, dict[int, Expand]]] = []
    done: frozenset[str] = frozenset()
    layout = None if stacked is None else stacked.head if is_head else stacked.body
    if stacked is not None and layout is not None and any(name in family.products for name in stacked.names):
        columns.append(stack_parts(family, stacked.stacks, layout))
        done = stacked.names
    columns += [
        span_parts(family, span.adapter, Part.of(span, spans.units))
        for span in spans.spans
        if span.adapter in family.products and span.adapter not in done
    ]
    shared = Shared(tuple(shrink for shrink, _ in columns), family) if columns else None
    result: dict[int, Work] = {}
    for place, site in enumerate(family.sites):
        expands = tuple(own.get(place) for _, own in columns)
        others = others_of(site, spans)
        if others or any(expand is not None for expand in expands):
            result[place] = Work(shared if any(expands) else None, expands, others)
    return result


def span_parts(family: Family, name: str, part: Part) -> tuple[Shrink, dict[int, Expand]]:
    """One adapter's products, on one span."""
    columns = family.columns[name]
    expands: dict[int, Expand] = {
        place: SpanExpand(part, None if len(columns) == 1 else columns[place], path)
        for place, path in family.low_rank(name).items()
    }
    return SpanShrink(part, family.products[name]), expands


def stack_parts(family: Family, stacks: Stacks, layout: Layout) -> tuple[Shrink, dict[int, Expand]]:
    """All stacked adapters' products."""
    stack = stacks.of(family)
    expands: dict[int, Expand] = {place: StackExpand(layout, factors) for place, factors in stack.factors.items()}
    return StackShrink(layout, stack.a_GIR[: layout.slots]), expands


def others_of(site: Site, spans: Spans) -> tuple[Other, ...]:
    """The spans whose adapters are no low-rank product at this site."""
    paths = [(span, site.paths.get(span.adapter)) for span in spans.spans]
    return tuple(
        Other(Part.of(span, spans.units), path)
        for span, path in paths
        if path is not None and not isinstance(path, LowRankPath)
    )
