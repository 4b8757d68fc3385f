"""Where the time of a decode step goes: matrix products, attention, other operations, and Python between them.

    python -m bench.where [--shape mid] [--batch 8] [--prompt 64] [--mode merged] [--device cpu] [--dtype float32]

torch's profiler runs on the engine's thread while the engine answers. It makes every operation some microseconds
longer, so the shares are of the profiled step; how much longer that is than the same step unprofiled is said too. The
last line is one JSON object.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.beds import OURS, Bed, Size, bed_of
from bench.environment import describe
from bench.work import Run, Work, drawn
from lorafold.config import LogConfig
from lorafold.logs import set_up_logging
from lorafold.model import pick_device

# Parts of operations' names, and what they are; the first that fits.
KINDS = (
    (("mm", "linear", "matmul", "gemm", "gemv"), "matrix products"),
    (("attention", "softmax", "flash"), "attention"),
    (("index", "copy", "cat", "contiguous", "clone", "zero", "fill"), "moving data"),
)
OTHER = "other operations"
PYTHON = "Python and waiting"


def kind_of(name: str) -> str:
    """What an operation is for."""
    return next((kind for parts, kind in KINDS if any(part in name.lower() for part in parts)), OTHER)


def shares(events: Iterable[Any], seconds: float, on_gpu: bool) -> dict[str, float]:
    """Share of `seconds` by kind, each operation without those that it calls; what is left is Python's, or waiting."""
    spent: Counter[str] = Counter()
    for event in events:
        spent[kind_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    found = {kind: round(microseconds / 1e6 / seconds, 3) for kind, microseconds in spent.most_common()}
    return {**found, PYTHON: round(1 - sum(found.values()), 3)}


def profiled(bed: Bed, mode: str, work: Work, on_gpu: bool) -> tuple[Run, Any]:
    """One run under the profiler, and what it noted."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = profile(activities=activities)
    bed.driven.call(profiler.start)
    run = bed.variants[mode](work)
    bed.driven.call(profiler.stop)
    return run, profiler.key_averages()


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mid")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=8, help="short, as the step that reads it is in the shares too")
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--mode", choices=OURS, default="merged")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    arguments = parsed()
    set_up_logging(LogConfig(level="warning"))
    device, dtype = pick_device(arguments.device), getattr(torch, arguments.dtype)
    batch, context = arguments.batch, arguments.prompt + arguments.answer
    size = Size(slots=batch, context=context, prefill=batch * arguments.prompt)
    with (
        tempfile.TemporaryDirectory() as scratch,
        bed_of(arguments.shape, device, dtype, 16, size, [arguments.mode], Path(scratch)) as bed,
    ):
        work = drawn(batch, arguments.prompt, arguments.answer, bed.base.config.vocab_size)
        plain = [bed.variants[arguments.mode](work) for _ in range(2)][-1]
        run, events = profiled(bed, arguments.mode, work, device.type == "cuda")
        print(events.table(sort_by=f"self_{device.type}_time_total", row_limit=25, max_name_column_width=60))
        found = shares(events, run.seconds, device.type == "cuda")
        longer = round(run.step_seconds / plain.step_seconds, 3)
        about = {"mode": arguments.mode, "shape": arguments.shape, "batch": batch, "profiled_over_plain": longer}
        print(json.dumps({"shares": found, **about, **describe(device, bed.base)}))


if __name__ == "__main__":
    main()
