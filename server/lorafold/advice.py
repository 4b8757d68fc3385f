"""Whether to fold a deployment's adapter: three lines of plain words, from its traffic, measured costs and fidelity.

Pure Python: knows no engine, and changes nothing.
"""

import math
from dataclasses import dataclass

from lorafold_adapters.overhead import Cell, Overhead
from lorafold_adapters.policy import PolicyKind

FREE = 1.02
"""Unmerged steps that take less than that many times as long are as good as merged ones."""
MOSTLY, HARDLY = 0.9, 0.1
"""Shares of the time."""
SOME = 100
"""Moments below which traffic says nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What is known of a deployment."""

    name: str
    policy: PolicyKind
    """The present one."""
    fold_refusal: str = ""
    """Why it cannot be folded; empty if it can."""
    route_refusal: str = ""
    """Why it cannot run beside the weights."""
    moments: int = 0
    """In which it had requests."""
    alone: float = 0.0
    """Share of them in which nobody else had any."""
    rows: float = 0.0
    """That could run then, on average, everybody's."""
    overhead: Overhead | None = None
    """Of the measured cell that is most like its traffic."""
    age: float = 0.0
    """Of that, seconds."""
    swap_seconds: float = 0.0
    """0 if nothing was folded yet."""
    delta_error: float | None = None
    """Share of the delta that a fold loses; None if it was not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """What to do."""

    policy: PolicyKind
    lines: tuple[str, str, str]
    """What to do; why, by traffic and costs; what becomes of the adapter."""


def advise(known: Evidence) -> Advice:
    """Merged, unmerged or auto."""
    policy, why = chosen(known)
    now = "as it is now" if policy is known.policy else f"it is {known.policy.value} now"
    return Advice(policy=policy, lines=(f"Serve '{known.name}' {policy.value}: {now}.", why, fidelity(known)))


def chosen(known: Evidence) -> tuple[PolicyKind, str]:
    """The policy, and why."""
    if known.fold_refusal:
        return PolicyKind.UNMERGED, f"It cannot be folded: {known.fold_refusal}."
    if known.route_refusal:
        return PolicyKind.MERGED, f"It cannot run unmerged: {known.route_refusal}."
    found = known.overhead
    if found is None:
        return PolicyKind.AUTO, "What unmerged steps cost here was not measured yet: run 'lorafold bench overhead'."
    cost = f"{cost_of(found)} ({age_of(known.age)} ago)"
    if found.ratio < FREE:
        return PolicyKind.UNMERGED, f"{cost}: folding gains nothing, and others would have to wait for it."
    if known.moments < SOME:
        return PolicyKind.AUTO, f"{cost}; too few requests came to say more."
    shared = f"{cost}; in {known.alone:.0%} of {known.moments:,} moments with its requests nobody else had any"
    if known.alone >= MOSTLY:
        return PolicyKind.MERGED, f"{shared}, so hardly anybody waits while it is folded."
    if known.alone <= HARDLY:
        return PolicyKind.UNMERGED, f"{shared}, so others would wait whenever it is folded."
    return PolicyKind.AUTO, f"{shared}: fold it then, and only then."


def cost_of(found: Overhead) -> str:
    """Of unmerged steps."""
    cell = found.cell
    what = f"{cell.batch} row{'s' * (cell.batch > 1)} of {cell.adapters} adapter{'s' * (cell.adapters > 1)}"
    return (
        f"Unmerged, a step of {what} of rank {cell.rank} takes {found.ratio:.2f} times as long "
        f"({found.low:.2f} to {found.high:.2f})"
    )


def age_of(seconds: float) -> str:
    """`3 min`."""
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def fidelity(known: Evidence) -> str:
    """What becomes of the adapter, and what a swap takes."""
    swap = f"; a swap takes {known.swap_seconds * 1e3:.0f} ms" if known.swap_seconds else ""
    if known.fold_refusal:
        return "Unmerged, nothing of it is lost."
    if known.delta_error is None:
        return f"What a fold loses of it was not measured: 'lorafold inspect' does{swap}."
    return f"A fold loses {known.delta_error:.2g} of its delta to rounding, unmerged loses nothing{swap}."


def nearest(known: dict[Cell, tuple[Overhead, float]], rank: int | None, rows: float, adapters: float) -> Cell | None:
    """The measured cell most like some traffic: of this rank if there is one, then by rows and adapters."""

    def distance(cell: Cell) -> tuple[bool, float]:
        apart = abs(math.log2(cell.batch / max(1.0, rows))) + abs(math.log2(cell.adapters / max(1.0, adapters)))
        return cell.rank != rank, apart

    return min(known, key=distance, default=None)
