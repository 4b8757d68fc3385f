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
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.utils import logging

from bench.decode_steps import Ours, Step, Theirs
from bench.environment import describe
from bench.grid import TARGETS, Cell, Grid, Group, parsed, planned
from bench.low_rank import write_low_rank
from bench.models import shaped
from bench.overhead_report import BLOCKS, PRECISION, TIMED, Rates, Seconds, found, headline, show, tight
from bench.roofline import Extra, Memory, extra, product_rate
from bench.rounds import record, series, stopwatch
from lorafold.config import LogConfig
from lorafold.logs import set_up_logging
from lorafold.model import pick_device

CONTEXT = 64
PAIRS = 6
"""Of each kind in one round."""
LEAST = 3
"""Rounds."""
TOLERANCE = 1e-3
"""Of fp32 logits of ours and PEFT's, over the largest."""


class Bed:
    """A model of one dtype with everything that decodes on it."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype, grid: Grid, scratch: Path) -> None:
        model = shaped(shape, device, dtype)
        self._scratch = scratch
        self._drawn = torch.Generator().manual_seed(0)
        self._vocabulary = model.config.vocab_size
        prompts_BT = torch.randint(self._vocabulary, (max(grid.batches), CONTEXT), generator=self._drawn)
        self._model = model
        self.theirs = Theirs(model, prompts_BT)
        self.ours = Ours(model, prompts_BT)
        self._names: list[str] = []

    def put_on(self, group: Group, adapters: int) -> list[Path]:
        """Adapters of this rank on these layers instead of those before; their folders."""
        folder = self._scratch / f"{group.targets}-{group.rank}-{group.dtype}"
        folder.mkdir()
        targets = TARGETS[group.targets]
        folders = [
            write_low_rank(self._model, folder / f"adapter-{seed}", seed, group.rank, targets)
            for seed in range(adapters)
        ]
        self.ours.replace(folders)
        self.theirs.replace(folders)
        self._names = [each.name for each in folders]
        return folders

    def steps(self, cell: Cell) -> dict[str, Step]:
        """The variants of a cell, by name."""
        tokens = torch.randint(self._vocabulary, (cell.batch,), generator=self._drawn).tolist()
        names = self._names[: cell.adapters]
        self.ours.manager.unmerge_adapter()  # Their caches are filled by the base.
        return {
            "base": self.ours.base(tokens),
            "merged": self.ours.merged(tokens, names[0]),
            "unmerged": self.ours.unmerged(tokens, names, folded=names[0]),
            "unmerged_on_base": self.ours.unmerged(tokens, names),
            "transformers": self.theirs.plain(tokens),
            "peft_merged": self.theirs.merged(tokens),
            "peft_unmerged": self.theirs.unmerged(tokens, names),
        }


def same(steps: Mapping[str, Step]) -> None:
    """Raises RuntimeError if a step of ours and theirs differ, or if the adapters change nothing."""
    logits: dict[str, Tensor] = {}
    for name, step in steps.items():
        step.prepare()
        logits[name] = step.run().float().clone()
    for one, other in (("base", "transformers"), ("merged", "peft_merged"), ("unmerged_on_base", "peft_unmerged")):
        apart = float((logits[one] - logits[other]).abs().max() / logits[other].abs().max())
        if apart > TOLERANCE:
            raise RuntimeError(f"{one} and {other} are {apart:.1e} apart: they did not compute the same")
    if torch.allclose(logits["unmerged_on_base"], logits["base"], rtol=0, atol=10 * TOLERANCE):
        raise RuntimeError("the adapters change nothing: nothing was compared")


def measure(steps: Mapping[str, Step], device: torch.device, seconds: float) -> Seconds:
    """Rounds until every ratio is known well enough, or the time is up; the k-th times of a pair belong together."""
    taken: Seconds = {name: [] for name in TIMED}
    until, rounds = time.perf_counter() + seconds, 0
    while rounds < LEAST or (time.perf_counter() < until and not tight(taken)):
        turn = rounds % len(BLOCKS)
        for name in BLOCKS[turn:] + BLOCKS[:turn]:
            taken[name].append(block(steps[name.removesuffix("_block")], device))
        for pair in (("merged", "unmerged"), ("peft_merged", "peft_unmerged")):
            for name in pair:
                timed(steps[name], device)
            for number in range(PAIRS):
                for name in pair if number % 2 == rounds % 2 else pair[::-1]:
                    taken[name].append(timed(steps[name], device))
        rounds += 1
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
