"""What the unmerged path costs: a decode step of the base, folded, and two-path, beside transformers and PEFT.

    python -m bench.overhead [--quick] [--ranks 16,64] [--batches 1,8] [--adapters 1,8] [--targets all,qv] [--record]

A Llama with random weights and PEFT checkpoints of random values; rows have 64 tokens in the cache. Pairs of steps,
folded and two-path, run one right after the other, and pairs of PEFT's; between them blocks of the base's, folded, and
transformers' steps. A cell is done when the 95 % intervals of its ratios are narrower than 4 % of them, or its time is
up. Ratios are medians, intervals by bootstrap. First come the physical limits; the last line is one JSON object. See
bench/README.md.
"""

import gc
import json
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.utils import logging

from bench.decode_steps import Step
from bench.environment import describe
from bench.grid import TARGETS, Cell, Grid, parsed, planned
from bench.models import shaped
from bench.overhead_bed import CONTEXT, Bed, same
from bench.overhead_report import (
    BLOCKS,
    PRECISION,
    RATIOS,
    TIMED,
    WANTED,
    Rates,
    Seconds,
    found,
    headline,
    known,
    show,
)
from bench.roofline import Extra, Memory, extra, product_rate
from bench.rounds import record, series, stopwatch
from lorafold.config import LogConfig
from lorafold.logs import set_up_logging
from lorafold.model import pick_device

PAIRS = 6
"""Of each kind in one round."""
LEAST = 3
"""Rounds, and as many from one block of transformers' steps to the next."""


def measure(steps: Mapping[str, Step], device: torch.device, seconds: float) -> Seconds:
    """Rounds until every ratio is known well enough, or the time is up; the k-th times of a pair belong together."""
    taken: Seconds = {name: [] for name in TIMED}
    until, rounds, unknown = time.perf_counter() + seconds, 0, list(WANTED)
    while rounds < LEAST or (unknown and time.perf_counter() < until):
        for name in (("base", "merged"), ("merged", "base"))[rounds % 2]:
            taken[BLOCKS[name]].append(block(steps[name], device))
        for key in unknown:
            unmerged, merged = RATIOS[key]
            pair = (unmerged, merged) if rounds % 2 else (merged, unmerged)
            for name in pair:
                timed(steps[name], device)
            for number in range(PAIRS):
                for name in pair if number % 2 else pair[::-1]:
                    taken[name].append(timed(steps[name], device))
        if rounds % LEAST == 0:
            taken["transformers"].append(block(steps["transformers"], device))
            taken["merged_then"].append(block(steps["merged"], device))
        rounds += 1
        unknown = [key for key in WANTED if not known(key, taken)] if rounds >= LEAST else unknown
    return taken


def block(step: Step, device: torch.device) -> float:
    """Seconds of a step that runs over and over, warmed up; a median."""
    return median([timed(step, device) for _ in range(2 + PAIRS // 2)][2:])


def timed(step: Step, device: torch.device) -> float:
    """Seconds of one step."""
    step.prepare()
    return stopwatch(device, step.run)


def changed_shapes(model: nn.Module, targets: str) -> list[tuple[int, int]]:
    """(out, in) of the layers that adapters change."""
    return [
        (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in TARGETS[targets]
    ]


def skeleton(shape: str) -> LlamaForCausalLM:
    """A model of that shape without memory."""
    return shaped(shape, torch.device("meta"), torch.float32)


def needed(shape: str, cell: Cell) -> Extra:
    """What the cell's low-rank paths add at least."""
    return extra(
        changed_shapes(skeleton(shape), cell.group.targets),
        cell.group.rank,
        rows=cell.batch,
        adapters=cell.adapters,
        itemsize=getattr(torch, cell.group.dtype).itemsize,
    )


def show_limits(shape: str, grid: Grid, rates: Mapping[str, Rates]) -> None:
    """The physical limits, for people."""
    for dtype, rate in rates.items():
        print(
            f"{dtype}: memory gives {rate.bandwidth / 1e9:.1f} GB/s, matrix products {rate.products / 1e9:,.0f} GFLOP/s"
        )
    for group in grid.groups():
        for cell in grid.cells(group):
            more, rate = needed(shape, cell), rates[group.dtype]
            print(
                f"  {cell.key}: low-rank paths read {more.nbytes / 1e6:.2f} MB more and compute "
                f"{more.flops / 1e6:.1f} MFLOP, at least {more.seconds(rate.bandwidth, rate.products) * 1e6:.0f} us"
            )


def cells_of(
    shape: str, device: torch.device, grid: Grid, rates: Mapping[str, Rates]
) -> Iterator[tuple[Cell, dict[str, Any], Seconds]]:
    """Everything that is measured, as soon as it is."""
    for dtype in grid.dtypes:
        with tempfile.TemporaryDirectory() as scratch:
            bed = Bed(shape, device, getattr(torch, dtype), grid, Path(scratch))
            for group in (each for each in grid.groups() if each.dtype == dtype):
                cells = list(grid.cells(group))
                bed.put_on(group, max(cell.adapters for cell in cells))
                spare = 0.0
                for cell in cells:
                    steps = bed.steps(cell)
                    if dtype == "float32" and device.type == "cpu":
                        same(steps)
                    begun = time.perf_counter()
                    seconds = measure(steps, device, grid.seconds + spare)
                    spare = max(0.0, spare + grid.seconds - (time.perf_counter() - begun))
                    yield cell, found(cell, seconds, needed(shape, cell), rates[dtype]), seconds
            del bed
            gc.collect()


def run(shape: str, device: torch.device, grid: Grid) -> tuple[dict[str, Any], dict[str, Seconds]]:
    """The result without what was asked for, and every timing."""
    memory = Memory(device)
    rates = {
        dtype: Rates(bandwidth=memory.bandwidth(), products=product_rate(device, getattr(torch, dtype)))
        for dtype in grid.dtypes
    }
    show_limits(shape, grid, rates)
    results, timings = [], {}
    for cell, result, seconds in cells_of(shape, device, grid, rates):
        show(result, absolute=device.type == "cuda")
        results.append(result)
        timings[cell.key] = seconds
    return headline(results, timings), timings


def main() -> None:
    """Measures and prints."""
    arguments = parsed(__doc__)
    warnings.filterwarnings("ignore", module="peft|transformers")
    logging.set_verbosity_error()
    set_up_logging(LogConfig(level="warning"))
    device = pick_device(arguments.device)
    shape = arguments.shape or ("8b" if device.type == "cuda" else "short")
    grid = planned(arguments)
    result, seconds = run(shape, device, grid)
    about = {**describe(device, skeleton(shape)), "dtype": list(grid.dtypes)}
    result |= {"shape": shape, "context": CONTEXT, "precision": PRECISION, **about}
    for line in result["missed"]:
        print(f"below target: {line}")
    if arguments.record:
        print(f"every timing: {record('overhead', result, series(seconds))}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
