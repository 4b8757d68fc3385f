"""Takes timings in rounds, and turns them into ratios. Knows nothing about what is timed."""

import itertools
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

Timing = Callable[[int], float]
"""Brings everything into place for round n, then returns the seconds that the measured part took."""


def measure(variants: Mapping[str, Timing], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, in an order that rotates; the first round is warm-up and not kept."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken = variants[name](number)
            if number:
                seconds[name].append(taken)
    return seconds


def stopwatch(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds until `work` is done on `device`."""
    settle(device)
    start = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - start


def settle(device: torch.device) -> None:
    """Waits for what a GPU was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of the per-round ratios; of one round, that thrice."""
    ratios = [one / other for one, other in zip(over, under, strict=True)]
    low, middle, high = statistics.quantiles(ratios if len(ratios) > 1 else ratios * 2, n=4, method="inclusive")
    return {"median": round(middle, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}


def record(theme: str, result: Mapping[str, Any], points: Iterable[Mapping[str, Any]]) -> Path:
    """Keeps the result, then every point, as JSON lines in a file of its own; returns the file."""
    hardware = re.sub(r"[^a-z0-9]+", "-", str(result["hardware"]).lower()).strip("-")
    file = unused(RESULTS / f"{theme}_{hardware}_{datetime.now(UTC):%Y-%m-%d}.jsonl")
    RESULTS.mkdir(exist_ok=True)
    file.write_text("".join(f"{json.dumps(line)}\n" for line in (result, *points)))
    return file


def series(seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[dict[str, Any]]:
    """Points for `record`: the times of each variant in each case, in the order in which they were taken."""
    for case, variants in seconds.items():
        for variant, taken in variants.items():
            yield {"case": case, "variant": variant, "seconds": [float(f"{each:.6g}") for each in taken]}


def unused(file: Path) -> Path:
    """`file`, or the first numbered name beside it that no other result has."""
    numbered = (file.with_name(f"{file.stem}_{number}{file.suffix}") for number in itertools.count(2))
    return next(path for path in itertools.chain([file], numbered) if not path.exists())
