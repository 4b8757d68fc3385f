"""One batch of one shape: every variant runs in every round, and what their decode steps took is compared.

Knows variants by name only.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.beds import ADAPTERS, COMPILED, PEERS, SEVERAL, Bed
from bench.peers import Peer
from bench.rounds import ratio
from bench.work import Run, Work, drawn, share_equal, steps_of

# A ratio's name: the variant above, and the one below.
RATIOS = {
    "over_continuous_batching": ("continuous_batching", "merged"),
    "over_peft_mixed": ("peft_mixed", "unmerged_8"),
    "unmerged_over_merged": ("unmerged_1", "merged"),
    "unmerged_over_merged_8_adapters": ("unmerged_8", "merged"),
    "merged_over_base": ("merged", "base"),
    "peft_unmerged_over_merged": ("peft_unmerged", "peft_merged"),
    "same_over_same": ("merged_again", "merged"),
    "compiled_over_merged": ("merged", COMPILED),
}
# Ours and the oracle of its tokens: the same weights, or the same adapters.
ORACLES = (
    ("merged", "generate_dynamic"),
    ("merged", "generate_static"),
    (COMPILED, "generate_dynamic"),
    ("unmerged_1", "generate_dynamic"),
    ("unmerged_8", "peft_mixed"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is measured at once."""

    shape: str
    batch: int
    prompt: int
    answer: int
    variants: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The variants that this batch is large enough for."""
        return [name for name in self.variants if name not in SEVERAL or self.batch >= ADAPTERS]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """How often."""

    seconds: float
    """When to begin no more rounds."""
    least: int
    most: int
    short_warm_up: bool
    """Warm up with a few tokens: enough where nothing is compiled or captured for one size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What came of a case."""

    runs: Mapping[str, Sequence[Run]]
    """By variant, round for round."""
    bandwidths: Sequence[float]
    """Bytes per second, measured in each round."""
    failed: Mapping[str, str]
    """Peers that did not run, and why."""


def run_case(case: Case, bed: Bed, bandwidth: Callable[[], float], rounds: Rounds) -> Measured:
    """All rounds of a case, the variants in an order that rotates."""
    vocabulary = bed.base.config.vocab_size
    work = drawn(case.batch, case.prompt, case.answer, vocabulary)
    variants = {name: bed.variants[name] for name in case.names}
    failed = warm_up(variants, bed, drawn(case.batch, 4, 2, vocabulary) if rounds.short_warm_up else work)
    names = [name for name in variants if name not in failed]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    bandwidths: list[float] = []
    begun, last = time.perf_counter(), 0.0
    while len(bandwidths) < rounds.most:
        start = time.perf_counter()
        if len(bandwidths) >= rounds.least and start + last - begun > rounds.seconds:
            break
        turn = len(bandwidths) % len(names)
        bandwidths.append(bandwidth())
        for name in names[turn:] + names[:turn]:
            bed.leave_cores()
            runs[name].append(variants[name](work))
        last = time.perf_counter() - start
    bed.close_peers()
    return Measured(runs=runs, bandwidths=bandwidths, failed=failed)


def warm_up(variants: Mapping[str, Peer], bed: Bed, work: Work) -> dict[str, str]:
    """Runs each once; the peers that cannot, and what they said. What goes wrong with us is raised."""
    failed: dict[str, str] = {}
    for name, variant in variants.items():
        bed.leave_cores()
        try:
            variant(work)
        except Exception as error:
            if name not in PEERS:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return failed


def ratios(measured: Measured) -> dict[str, dict[str, Any]]:
    """Medians and quartiles of the per-round ratios of decode steps; above 1 in `over_*` we are faster."""
    steps = {name: steps_of(runs) for name, runs in measured.runs.items()}
    found: dict[str, dict[str, Any]] = {
        key: compared(steps[above], steps[below])
        for key, (above, below) in RATIOS.items()
        if above in steps and below in steps
    }
    caches = [name for name in ("generate_dynamic", "generate_static") if name in steps]
    if caches and "merged" in steps:
        better = min(caches, key=lambda name: statistics.median(steps[name]))
        found["over_generate"] = {**compared(steps[better], steps["merged"]), "cache": better.removeprefix("generate_")}
    return found


def compared(above: list[float], below: list[float]) -> dict[str, Any]:
    """The per-round ratios, and that of each side's fastest round: other work on the machine slows, it never speeds."""
    return {**ratio(above, below), "of_fastest": round(min(above) / min(below), 3)}


def roofline_shares(measured: Measured, step_bytes: int) -> dict[str, dict[str, float]]:
    """Time in which memory gives a step's bytes, over the time of the step, round for round."""
    limits = [step_bytes / bandwidth for bandwidth in measured.bandwidths]
    runs = {"roofline_share": measured.runs["merged"], "roofline_share_compiled": measured.runs.get(COMPILED)}
    return {name: ratio(limits, steps_of(of)) for name, of in runs.items() if of is not None}


def equal_rows(measured: Measured) -> dict[str, float]:
    """For each of our variants that had an oracle: the share of rows with its tokens, in the worst round.

    Raises RuntimeError if the adapter changes no answer: then nothing was compared.
    """
    runs = measured.runs
    if "base" in runs and runs["base"][0].tokens == runs["merged"][0].tokens:
        raise RuntimeError("the adapter changes no answer: make it stronger")
    pairs = [*ORACLES, ("generate_dynamic", "continuous_batching")]
    return {
        f"{one} = {other}": min(share_equal(a, b) for a, b in zip(runs[one], runs[other], strict=True))
        for one, other in pairs
        if one in runs and other in runs
    }
