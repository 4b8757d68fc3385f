"""What `bench.overhead` says of what it timed. Knows names of variants, no models."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from bench.grid import Cell
from bench.roofline import Extra
from lorafold_adapters.overhead import FEWEST, RESAMPLES, interval

PRECISION = 0.04
"""Width of an interval over the ratio that is wanted."""
RATIOS = {
    "unmerged_over_merged": ("unmerged", "merged"),
    "peft_unmerged_over_merged": ("peft_unmerged", "peft_merged"),
    "merged_over_base": ("merged_block", "base_block"),
    "transformers_over_merged": ("transformers", "merged_then"),
}
"""A ratio's name: the variant above, and the one below; the k-th times of both belong together."""
BLOCKS = {"base": "base_block", "merged": "merged_block"}
"""Variants that are timed over and over too, once in a round, and what these times are called."""
TIMED = tuple(dict.fromkeys(name for pair in RATIOS.values() for name in pair))
Seconds = dict[str, list[float]]
"""By variant."""
WANTED = ("unmerged_over_merged", "peft_unmerged_over_merged")
"""Those that must be known well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What a device gives in one dtype."""

    bandwidth: float
    """Bytes read per second."""
    products: float
    """Operations per second in matrix products."""


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round for round."""
    return [one / other for one, other in zip(above, below, strict=True)]


def estimate(values: Sequence[float]) -> dict[str, float]:
    """The median, and its 95 % interval unless there are too few values."""
    found = {"median": round(median(values), 4)}
    if len(values) >= FEWEST:
        found["low"], found["high"] = (round(bound, 4) for bound in interval(values))
    return found


def width(about: Mapping[str, float]) -> float:
    """Of an interval, over the ratio."""
    return (about["high"] - about["low"]) / about["median"]


def known(key: str, seconds: Mapping[str, Sequence[float]]) -> bool:
    """True once a ratio is known well enough."""
    about = estimate(ratios(*(seconds[name] for name in RATIOS[key])))
    return "low" in about and width(about) <= PRECISION


def added(seconds: Mapping[str, Sequence[float]], key: str) -> list[float]:
    """By how many seconds the first variant of each pair takes longer than the second."""
    above, below = (seconds[name] for name in RATIOS[key])
    return [one - other for one, other in zip(above, below, strict=True)]


def added_over(peft: Sequence[float], ours: Sequence[float]) -> dict[str, float] | None:
    """PEFT's median over ours, with its 95 % interval by bootstrap; None where one of them is lost in the noise."""
    if median(peft) <= 0 or median(ours) <= 0:
        return None
    numbers = np.random.default_rng(0)
    above, below = (
        np.median(numbers.choice(np.asarray(values), size=(RESAMPLES, len(values))), axis=1) for values in (peft, ours)
    )
    low, high = np.quantile(above / np.maximum(below, np.finfo(float).tiny), [0.025, 0.975])
    return {
        name: round(float(value), 3)
        for name, value in zip(("median", "low", "high"), (median(peft) / median(ours), low, high), strict=True)
    }


def found(cell: Cell, seconds: Mapping[str, Sequence[float]], more: Extra, rates: Rates) -> dict[str, Any]:
    """Everything that is said of one cell.

    `limit`: the ratio if low-rank paths ran at the device's full rates. `peft_over_ours`: of the unmerged steps;
    `peft_added_over_ours`: of the time by which they are longer than the merged ones.
    """
    merged = median(seconds["merged"])
    return {
        "key": cell.key,
        **asdict(cell.group),
        "batch": cell.batch,
        "adapters": cell.adapters,
        "pairs": len(seconds["merged"]),
        **{key: estimate(ratios(seconds[above], seconds[below])) for key, (above, below) in RATIOS.items()},
        "peft_over_ours": round(median(seconds["peft_unmerged"]) / median(seconds["unmerged"]), 3),
        "peft_added_over_ours": added_over(*(added(seconds, key) for key in reversed(WANTED))),
        "limit": round(1 + more.seconds(rates.bandwidth, rates.products) / merged, 4),
        "milliseconds": {name: round(median(taken) * 1e3, 4) for name, taken in seconds.items() if taken},
    }


def show(result: Mapping[str, Any], *, absolute: bool) -> None:
    """A line for one cell; milliseconds only where they are worth something."""
    ours, peft = (result[name] for name in WANTED)
    adds = result["peft_added_over_ours"]
    print(
        f"{result['key']}: unmerged over merged {said(ours)}, limit {result['limit']:.3f}, PEFT {said(peft)}; "
        f"PEFT's step over ours {result['peft_over_ours']:.2f}, what it adds {'-' if adds is None else said(adds)}; "
        f"merged over base {said(result['merged_over_base'])}, "
        f"transformers over merged {result['transformers_over_merged']['median']:.2f}, {result['pairs']} pairs"
        + (f", ms {result['milliseconds']}" if absolute else ""),
        flush=True,
    )


def said(about: Mapping[str, float]) -> str:
    """`1.052 [1.040, 1.061]`, the interval if there is one."""
    return f"{about['median']:.3f}" + (f" [{about['low']:.3f}, {about['high']:.3f}]" if "low" in about else "")


def headline(results: Sequence[Mapping[str, Any]], timings: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """The keys that a reader looks for first, by cell; `merged_over_base` is of the rounds of all cells."""
    pooled = [
        value
        for seconds in timings.values()
        for value in ratios(*(seconds[name] for name in RATIOS["merged_over_base"]))
    ]
    every = estimate(pooled)
    return {
        "unmerged_over_merged": {each["key"]: each["unmerged_over_merged"]["median"] for each in results},
        "ci95": {each["key"]: bounds(each["unmerged_over_merged"]) for each in results},
        "peft_unmerged_over_merged": {each["key"]: each["peft_unmerged_over_merged"]["median"] for each in results},
        "peft_ci95": {each["key"]: bounds(each["peft_unmerged_over_merged"]) for each in results},
        "peft_over_ours": {each["key"]: each["peft_over_ours"] for each in results},
        "peft_added_over_ours": {
            each["key"]: each["peft_added_over_ours"] and each["peft_added_over_ours"]["median"] for each in results
        },
        "merged_over_base": every["median"],
        "merged_over_base_ci95": bounds(every),
        "limit": {each["key"]: each["limit"] for each in results},
        "missed": [line for each in results for line in missed(each)],
        "cells": list(results),
    }


def bounds(about: Mapping[str, float]) -> list[float]:
    """Of the interval."""
    return [about["low"], about["high"]]


def missed(result: Mapping[str, Any]) -> Iterator[str]:
    """A line for people for each aim that one cell does not reach."""
    ours, peft = (result[name] for name in WANTED)
    for name, about in zip(WANTED, (ours, peft), strict=True):
        if "low" not in about or width(about) > PRECISION:
            yield f"{result['key']}: {name} is {said(about)}, should be known to {PRECISION:.0%}"
    if ours["median"] >= peft["median"]:
        yield f"{result['key']}: unmerged costs {ours['median']} times merged, PEFT's {peft['median']}"
