"""What every site does for one composition of the batch; made once, and used for as long as the composition lasts."""

from collections.abc import Iterable
from dataclasses import dataclass

from lorafold_adapters.cpu_products import is_large
from lorafold_adapters.grouped import Grouped, Parts
from lorafold_adapters.lone import LoneProducts, LoneWork, lone_works
from lorafold_adapters.parts import Expand, Other, Part, SpanExpand, SpanShrink
from lorafold_adapters.paths import LowRankPath
from lorafold_adapters.sharing import Shared, Sightings
from lorafold_adapters.spans import Routing, Spans
from lorafold_adapters.steps import Batch, EagerStep, Work
from lorafold_adapters.two_path import Family, Patch, Site, enter, leave


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The steps of one composition."""

    patches: tuple[Patch, ...]
    shared: tuple[Shared | LoneProducts, ...]
    """What is kept during a forward pass."""

    def enter(self) -> None:
        """From now on the sites run their steps."""
        enter(self.patches)

    def leave(self) -> None:
        """The modules are what they were; no tensor of the forward pass is kept."""
        leave(self.patches)
        for shared in self.shared:
            shared.forget()


def plan(
    routing: Routing, families: Iterable[Family], grouped: Grouped | None, batch: Batch, sightings: Sightings
) -> Plan:
    """The steps of all sites that an adapter of the batch changes."""
    patches: list[Patch] = []
    shared: list[Shared | LoneProducts] = []
    for family in families:
        is_head = family.sites[0].is_head
        spans = routing.head if is_head else routing.body
        lone = lone_works(family, spans.spans[0].adapter) if spans.whole else {}
        rowwise: dict[int, Work | LoneWork] = {**works(family, spans, None, is_head), **lone}
        together = {} if grouped is None else works(family, spans, grouped, is_head)
        for place, work in rowwise.items():
            site, other = family.sites[place], together.get(place)
            step = EagerStep(
                site=site, batch=batch, sightings=sightings, units=spans.units, rowwise=work, grouped=other
            )
            patches.append(Patch.of(site, step))
            shared += [one.shared for one in (work, other) if one is not None and one.shared is not None]
    return Plan(patches=tuple(patches), shared=tuple(dict.fromkeys(shared)))


def works(family: Family, spans: Spans, grouped: Grouped | None, is_head: bool) -> dict[int, Work]:
    """By place in the family, what its site does; places without work are left out."""
    columns: list[Parts] = []
    done: frozenset[str] = frozenset()
    parts = grouped.parts(family, is_head=is_head) if grouped and adapts(family, grouped.names) else None
    if grouped is not None and parts is not None:
        columns.append(parts)
        done = grouped.names
    columns += [
        span_parts(family, span.adapter, Part.of(span, spans.units))
        for span in spans.spans
        if span.adapter in family.products and span.adapter not in done
    ]
    shared = Shared(tuple(shrink for shrink, _ in columns), family) if columns else None
    on_cpu = all(product.device.type == "cpu" for product in family.products.values())
    result: dict[int, Work] = {}
    for place, site in enumerate(family.sites):
        expands = tuple(own.get(place) for _, own in columns)
        others = others_of(site, spans)
        if others or any(expand is not None for expand in expands):
            result[place] = Work.of(shared, expands, others, on_cpu=on_cpu)
    return result


def adapts(family: Family, names: Iterable[str]) -> bool:
    """True if one of the adapters is a low-rank product at one of the family's sites."""
    return any(name in family.products for name in names)


def span_parts(family: Family, name: str, part: Part) -> Parts:
    """One adapter's products, on one span."""
    paths = family.low_rank(name)
    expands: dict[int, Expand] = {
        place: SpanExpand(part, piece, path.scaled_b_RO, path.gain_O, path.shift_O, is_large(path.scaled_b_RO))
        for piece, (place, path) in enumerate(paths.items())
    }
    a_IR = family.products[name]
    return SpanShrink(part, a_IR, tuple(path.rank for path in paths.values()), is_large(a_IR)), expands


def others_of(site: Site, spans: Spans) -> tuple[Other, ...]:
    """The spans whose adapters are no low-rank product at this site."""
    paths = [(span, site.paths.get(span.adapter)) for span in spans.spans]
    return tuple(
        Other(Part.of(span, spans.units), path)
        for span, path in paths
        if path is not None and not isinstance(path, LowRankPath)
    )
