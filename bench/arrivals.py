"""Traffic that can be replayed: when each request arrives and which adapter it wants. Pure Python, seeded."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

DOMINANCE = 0.9
"""Share of the requests that the dominating adapter gets."""
PHASES = 4
"""Of the shifting workload: a dominating adapter, all alike, another one, all alike."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request."""

    at: float
    """Seconds from the start."""
    adapter: int


def poisson(rate: float, seconds: float, random_: random.Random) -> Iterator[float]:
    """Times of arrivals, `rate` a second on average."""
    now = random_.expovariate(rate)
    while now < seconds:
        yield now
        now += random_.expovariate(rate)


def dominant(adapters: int, random_: random.Random, which: int = 0) -> int:
    """Mostly one adapter."""
    if random_.random() < DOMINANCE:
        return which
    return (which + random_.randrange(1, adapters)) % adapters


def wanted(kind: str, share: float, adapters: int, random_: random.Random) -> int:
    """Which adapter a request wants that arrives at this share of the whole time."""
    if kind == "even":
        return random_.randrange(adapters)
    if kind == "dominant":
        return dominant(adapters, random_)
    phase = int(share * PHASES)
    return random_.randrange(adapters) if phase % 2 else dominant(adapters, random_, phase // 2)


def arrivals(kind: str, *, rate: float, seconds: float, adapters: int, seed: int) -> list[Arrival]:
    """The traffic of one of `KINDS`; the same for the same arguments."""
    random_ = random.Random(f"{kind} {seed}")
    times = list(poisson(rate, seconds, random_))
    return [Arrival(at, wanted(kind, at / seconds, adapters, random_)) for at in times]


KINDS = ("dominant", "even", "shifting")
