"""Replays traffic on a running engine, and says how long each request took for each of its tokens."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.arrivals import Arrival
from bench.engines import Collected, request
from bench.work import drawn
from lorafold.engine.loop import Engine
from lorafold_adapters.policy import PolicyKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What is replayed."""

    arrivals: tuple[Arrival, ...]
    prompt: int
    """Tokens of each prompt, all of them different."""
    answer: int
    vocabulary: int


class Timed(Collected):
    """The sink of a request that was due at a time."""

    def __init__(self, due: float) -> None:
        super().__init__()
        self.due = due

    @property
    def per_token(self) -> float:
        """Seconds from when it was due to its last token, for each token."""
        return (self.times[-1] - self.due) / len(self.times)


def replay(engine: Engine, traffic: Traffic, digests: Sequence[str], policy: PolicyKind, seed: int) -> list[float]:
    """Seconds for each token of each request, in order of arrival. Raises the error of a request that failed.

    `seed`: of the prompts, so that no replay finds the prefixes of another one.
    """
    prompts = drawn(len(traffic.arrivals), traffic.prompt, traffic.answer, traffic.vocabulary, seed).prompts
    start = time.perf_counter()
    rows = []
    for arrival, prompt in zip(traffic.arrivals, prompts, strict=True):
        row = Timed(start + arrival.at)
        time.sleep(max(0.0, row.due - time.perf_counter()))
        engine.submit(request(engine, prompt, digests[arrival.adapter], policy, traffic.answer), row)
        rows.append(row)
    for row in rows:
        row.wait()
    return [row.per_token for row in rows]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of all is not above, between two neighbours on a line."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean and 99th percentile."""
    return {"mean": statistics.fmean(values), "p99": percentile(values, 0.99)}
