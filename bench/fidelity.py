"""What arrives of an adapter, and what its accuracy does: by size of the delta, dtype, rank, damage, and mistakes.

    python -m bench.fidelity [--quick] [--record]

The adapters of the demo set answer held-out strings, with what arrived of them in the weights of an fp32 base.

- sizes: adapters made weaker by powers of two, folded into weights of a dtype, or beside them; what arrived is made as
  strong as before again, so that accuracy shows what got lost and nothing else.
- ranks: the best approximation of each product by one of lower rank, folded and beside.
- damage: deltas rounded to grids of growing steps, as a dtype with too few bits would: why `max_delta_error` is what it
  is. The step of each weight is proportional to its size, and measured in units of the delta's rms.
- mistakes: the scale of rsLoRA taken for LoRA's or the reverse, a fold into NF4 that is quantised again, two tasks as
  one by TIES.

First comes the limit, what rounding alone must lose; the last line is one JSON object.
"""

import argparse
import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from bench.altered import of_rank, weaker, wrongly_scaled
from bench.demo_subjects import Arrivals, Deltas, Judge, error, requantised, times
from bench.environment import describe
from bench.rounds import record
from lorafold.cli.demo import shipped_set
from lorafold.demo.tasks import TASKS, held_out

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN = ("upper", "rot13", "swapcase")
"""Tasks whose adapters are nothing but low-rank products."""
HALVINGS = (0, 2, 4, 5, 6, 7, 8, 9, 10, 12)
RANKS = (1, 2, 3, 4, 6, 8)
STEPS = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)
"""Steps of the grid at a weight of average size, over the rms of the delta."""
SMALLEST = 0.05
"""Weights below this share of the rms have the step of one at it."""
TIES_PAIRS = (("upper", "rot13"), ("swapcase", "upper"))
TIES_DENSITY = 0.5
VARIED = {"sizes": "delta_over_weight", "ranks": "rank", "damage": "step"}
"""What a curve of each part goes over."""
Point = dict[str, Any]


def rms(tensors: Iterator[Tensor]) -> float:
    """The root of the mean square over all."""
    kept = list(tensors)
    return math.sqrt(sum(float(each.square().sum()) for each in kept) / sum(each.numel() for each in kept))


def rounding(base: Deltas, meant: Deltas, dtype: torch.dtype) -> float:
    """The error of a delta that is rounded with the weights, to the nearest: steps of size s leave s / sqrt(12)."""
    steps = (torch.exp2(torch.floor(torch.log2(base[name].abs()))) * torch.finfo(dtype).eps for name in meant)
    return rms(steps) / math.sqrt(12) / rms(iter(meant.values()))


def show_limit(arrivals: Sequence[Arrivals]) -> None:
    """What rounding must lose, for people."""
    for task in PLAIN:
        meant = arrivals[-1].meant(shipped_set() / task)
        size = rms(iter(meant.values())) / rms(arrivals[-1].base[name] for name in meant)
        lost = ", ".join(
            f"{rounding(each.base, meant, dtype):.1e} in {str(dtype).removeprefix('torch.')}"
            for dtype, each in zip(DTYPES, arrivals, strict=True)
        )
        print(
            f"{task}: rms(delta) is {size:.2f} of rms(weight); rounding alone loses {lost}, half as strong twice that"
        )


def sizes(judge: Judge, arrivals: Sequence[Arrivals], scratch: Path) -> Iterator[Point]:
    """By dtype and strength."""
    for task in PLAIN:
        adapter = shipped_set() / task
        for halvings in HALVINGS:
            folder = weaker(adapter, scratch / f"{task}-{halvings}", 0.5**halvings)
            for dtype, each in zip(DTYPES, arrivals, strict=True):
                meant = each.meant(folder)
                size = rms(iter(meant.values())) / rms(each.base[name] for name in meant)
                for mode, deltas in (("merged", each.merged(folder)), ("unmerged", each.unmerged(folder))):
                    found = {"delta_error": error(deltas, meant), "delta_over_weight": size}
                    accuracy = judge.accuracy(task, times(deltas, 2.0**halvings))
                    about = {"dtype": str(dtype).removeprefix("torch."), "mode": mode, "halvings": halvings}
                    yield {"part": "sizes", "task": task, **about, **found, "accuracy": accuracy}


def ranks(judge: Judge, arrivals: Sequence[Arrivals], scratch: Path) -> Iterator[Point]:
    """By dtype and rank."""
    for task in PLAIN:
        adapter = shipped_set() / task
        for rank in RANKS:
            folder = of_rank(adapter, scratch / f"{task}-rank-{rank}", rank)
            for dtype, each in zip(DTYPES, arrivals, strict=True):
                meant = each.meant(adapter)
                for mode, deltas in (("merged", each.merged(folder)), ("unmerged", each.unmerged(folder))):
                    about = {"dtype": str(dtype).removeprefix("torch."), "mode": mode, "rank": rank}
                    found = {"delta_error": error(deltas, meant), "accuracy": judge.accuracy(task, deltas)}
                    yield {"part": "ranks", "task": task, **about, **found}


def damage(judge: Judge, exact: Arrivals) -> Iterator[Point]:
    """By step of the grid."""
    for task in TASKS:
        deltas = exact.merged(shipped_set() / task)
        rounded = {name: delta for name, delta in deltas.items() if "_proj" in name}
        for step in STEPS:
            arrived = {name: coarse(judge.base[name], delta, step) for name, delta in rounded.items()}
            found = {"delta_error": error(arrived, rounded), "accuracy": judge.accuracy(task, {**deltas, **arrived})}
            yield {"part": "damage", "task": task, "step": step, **found}


def coarse(weight: Tensor, delta: Tensor, step: float) -> Tensor:
    """The delta on a grid whose step grows with the weight, as that of floating point does."""
    if step == 0:
        return delta
    size = (weight.abs() / weight.square().mean().sqrt()).clamp(min=SMALLEST)
    grid = step * delta.square().mean().sqrt() * size
    return torch.round(delta / grid) * grid


def mistakes(judge: Judge, exact: Arrivals, scratch: Path) -> Iterator[Point]:
    """By kind, with the adapter as it should be beside."""
    for task in TASKS:
        adapter = shipped_set() / task
        deltas = exact.merged(adapter)
        beside, again = requantised(judge.base, deltas)
        wrong = exact.merged(wrongly_scaled(adapter, scratch / f"{task}-wrong"))
        kinds = {"none": deltas, "wrong_rslora_scale": wrong, "nf4_unmerged": beside, "nf4_requantised": again}
        for kind, arrived in kinds.items():
            yield {"part": "mistakes", "task": task, "kind": kind, "accuracy": judge.accuracy(task, arrived)}
    for pair in TIES_PAIRS:
        both = exact.merged(exact.ties([shipped_set() / task for task in pair], TIES_DENSITY))
        for task in pair:
            kind = "ties_" + "_".join(pair)
            yield {"part": "mistakes", "task": task, "kind": kind, "accuracy": judge.accuracy(task, both)}


def show(points: Sequence[Point]) -> None:
    """A line for people for each curve: what was varied, the error, the accuracy."""
    for _, curve in groupby(sorted(points, key=curve_of), key=curve_of):
        kept = list(curve)
        named = " ".join(str(kept[0][key]) for key in ("task", "dtype", "mode") if key in kept[0])
        said = (
            f"{point[VARIED[point['part']]]:.3g} -> {point['delta_error']:.3f}, {point['accuracy']:.2f}"
            if "delta_error" in point
            else f"{point['kind']} {point['accuracy']:.2f}"
            for point in kept
        )
        print(f"{kept[0]['part']}: {named}: {'; '.join(said)}", flush=True)


def curve_of(point: Point) -> tuple[str, ...]:
    """What the points of one curve have in common."""
    return tuple(str(point.get(key, "")) for key in ("part", "task", "dtype", "mode"))


def headline(points: Sequence[Point]) -> dict[str, Any]:
    """Accuracy by what was done, then by task."""
    found: dict[str, Any] = {"sizes": {}, "ranks": {}, "damage": {}, "mistakes": {}}
    for point in points:
        value = [round(point.get("delta_error", 0.0), 4), round(point["accuracy"], 3)]
        if point["part"] == "mistakes":
            found["mistakes"].setdefault(point["kind"], {})[point["task"]] = value[1]
        elif point["part"] == "damage":
            found["damage"].setdefault(point["task"], []).append(value)
        else:
            by = f"{point['dtype']}_{point['mode']}"
            found[point["part"]].setdefault(by, {}).setdefault(point["task"], []).append(value)
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer strings: under a minute")
    parser.add_argument("--record", action="store_true", help="keep every point under bench/results/")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft|transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    judge = Judge(held_out(12 if arguments.quick else 50))
    arrivals = [Arrivals(dtype) for dtype in DTYPES]
    show_limit(arrivals)
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for part in (
            sizes(judge, arrivals, scratch),
            ranks(judge, arrivals, scratch),
            damage(judge, arrivals[-1]),
            mistakes(judge, arrivals[-1], scratch),
        ):
            found = list(part)
            show(found)
            points += found
    result = {**headline(points), "strings": len(judge.texts), **describe(torch.device("cpu"), judge.model)}
    if arguments.record:
        print(f"every point: {record('fidelity', result, points)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
