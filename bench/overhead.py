"""What the unmerged path costs: a decode step of the base, folded, and two-path, beside transformers and PEFT.

    python -m bench.overhead [--quick] [--ranks 16,64] [--batches 1,8] [--adapters 1,8] [--targets all,qv] [--record]

A Llama with random weights and PEFT checkpoints of random values; rows have 64 tokens in the cache. Pairs of steps,
folded and two-path, run one right after the other, and pairs of PEFT's; between them blocks of the base's, folded, and
transformers' steps. Cells take turns. One is done when the 95 % intervals of its ratios are narrower than 4 % of them;
what is left after `--seconds` for each stays as it is. Ratios are medians, intervals by bootstrap. First come the
physical limits; the last line is one JSON object. See bench/README.md.
"""

import gc
import json
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
LEAST = 5
"""Rounds: intervals of fewer pairs are too narrow by chance too often. As many from one of transformers' blocks to the
next."""


class Timing:
    """One cell's times so far; the k-th times of a pair belong together."""

    def __init__(self, steps: Mapping[str, Step], device: torch.device) -> None:
        self.seconds: Seconds = {name: [] for name in TIMED}
        self._steps = steps
        self._device = device
        self._rounds = 0

    @property
    def unknown(self) -> list[str]:
        """The wanted ratios that are not known well enough."""
        return [key for key in WANTED if self._rounds < LEAST or not known(key, self.seconds)]

    def round(self) -> None:
        """Blocks of the base and folded, pairs of what is not known yet, sometimes a block of transformers."""
        for name in (("base", "merged"), ("merged", "base"))[self._rounds % 2]:
            self.seconds[BLOCKS[name]].append(self._block(name))
        for key in self.unknown:
            self._pairs(RATIOS[key] if self._rounds % 2 else RATIOS[key][::-1])
        if self._rounds % LEAST == 0:
            self.seconds["transformers"].append(self._block("transformers"))
            self.seconds["merged_then"].append(self._block("merged"))
        self._rounds += 1

    def _pairs(self, pair: Sequence[str]) -> None:
        for name in pair:
            timed(self._steps[name], self._device)
        for number in range(PAIRS):
            for name in pair if number % 2 else reversed(pair):
                self.seconds[name].append(timed(self._steps[name], self._device))

    def _block(self, name: str) -> float:
        """Seconds of a step that runs over and over, warmed up; a median."""
        return median([timed(self._steps[name], self._device) for _ in range(2 + PAIRS // 2)][2:])


def measure(cells: Sequence[Mapping[str, Step]], device: torch.device, seconds: float) -> list[Seconds]:
    """Rounds of all cells in turn, so that what a machine does meanwhile falls on each.

    Until each is known well enough, or the time is up.
    """
    timings = [Timing(steps, device) for steps in cells]
    until, rounds = time.perf_counter() + seconds, 0
    while (left := [each for each in timings if each.unknown]) and (rounds < LEAST or time.perf_counter() < until):
        for each in left:
            each.round()
        rounds += 1
    return [each.seconds for each in timings]


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
                every = [bed.steps(cell) for cell in cells]
                if dtype == "float32" and device.type == "cpu":
                    for steps in every:
                        same(steps)
                for cell, seconds in zip(cells, measure(every, device, grid.seconds * len(cells)), strict=True):
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
