"""Whether a server's own gauge of the unmerged path says what `bench.overhead` finds, on the same model and machine.

    python -m bench.gauge [--rounds 4] [--shape short] [--device cpu]

In each round a new server with eight deployments of rank 16 measures itself (`MeasureOverhead`), and its gauge is read
from its metrics page; then this process measures the same cells on a new model, as `bench.overhead` does, while the
server has nothing to do. New ones, as where a process finds its memory, and which means it chooses for its linear
layers, move its ratios by more than its intervals are wide. Exit status 1 unless for each cell the typical intervals
of both meet, which have the medians of all ends. With `--record` the result is kept. The last line is one JSON object.
"""

import argparse
import gc
import json
import sys
import tempfile
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers.utils import logging

from bench.environment import describe
from bench.grid import Cell, Grid, Group
from bench.models import SHAPES, shaped
from bench.overhead import measure, skeleton
from bench.overhead_bed import CONTEXT, Bed
from bench.overhead_report import RATIOS, Seconds, estimate, ratios
from bench.rounds import record
from bench.servers import Server, served
from bench.serving import server_tables, write_base
from bench.teams import release_team
from lorafold.client import Client
from lorafold.model import pick_device
from lorafold.v1 import deployment_pb2, weights_pb2

RANK = 16
CELLS = ((1, 1), (8, 1), (8, 8))
"""Rows, and distinct adapters."""
GAUGE = "lorafold_unmerged_overhead_ratio"
Found = tuple[float, float, float]
"""A ratio, and the ends of its interval."""


def create(server: Server, folders: Sequence[Path]) -> None:
    """One deployment for each adapter."""
    with Client(server.address) as client:
        for folder in folders:
            made = deployment_pb2.Deployment(
                name=folder.name, adapter_path=str(folder), policy=deployment_pb2.POLICY_UNMERGED
            )
            client.stubs.deployments.CreateDeployment(deployment_pb2.CreateDeploymentRequest(deployment=made))


def measure_live(server: Server) -> None:
    """The server measures all cells anew."""
    asked = weights_pb2.MeasureOverheadRequest(
        batches=sorted({batch for batch, _ in CELLS}),
        adapters=sorted({adapters for _, adapters in CELLS}),
        ranks=[RANK],
        contexts=[CONTEXT],
    )
    with Client(server.address) as client:
        for _ in client.stubs.weights.MeasureOverhead(asked):
            pass


def read_gauge(server: Server) -> dict[tuple[int, int], Found]:
    """What it says of each cell, from the page that Prometheus reads."""
    with urllib.request.urlopen(f"{server.metrics}/metrics") as page:
        families = list(text_string_to_metric_families(page.read().decode()))
    told: dict[str, dict[tuple[int, int], float]] = {GAUGE: {}, f"{GAUGE}_low": {}, f"{GAUGE}_high": {}}
    for family in families:
        for sample in family.samples:
            if sample.name in told:
                told[sample.name][int(sample.labels["batch"]), int(sample.labels["adapters"])] = sample.value
    ratio, low, high = told.values()
    return {cell: (ratio[cell], low[cell], high[cell]) for cell in ratio}


def typical(found: Sequence[Found]) -> tuple[float, float]:
    """The interval of a process: the medians of its ends."""
    return median(low for _, low, _ in found), median(high for *_, high in found)


def meet(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """True if the intervals have a point in common."""
    return one[0] <= other[1] and other[0] <= one[1]


def one_round(shape: str, device: torch.device, scratch: Path) -> dict[tuple[int, int], tuple[Found, Found]]:
    """What both say of each cell, from a new server and a new model here: the bench, and the gauge."""
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    group = Group(dtype=dtype, targets="all", rank=RANK)
    grid = Grid(batches=tuple(sorted({batch for batch, _ in CELLS})))
    model = shaped(shape, device, getattr(torch, dtype))
    write_base(model, scratch / "base")
    del model
    bed = Bed(shape, device, getattr(torch, dtype), grid, scratch)
    folders = bed.put_on(group, max(adapters for _, adapters in CELLS))
    tables = server_tables(scratch / "base", device) | {"log": {"level": "warning"}}
    tables["base"]["dtype"] = dtype
    with served(scratch / "lorafold.toml", tables) as server:
        create(server, folders)
        release_team()
        measure_live(server)
        gauge = read_gauge(server)
        cells = [bed.steps(Cell(group=group, batch=batch, adapters=adapters)) for batch, adapters in CELLS]
        offline = measure(cells, device, grid.seconds * len(cells))
    return {cell: (bench_says(seconds), gauge[cell]) for cell, seconds in zip(CELLS, offline, strict=True)}


def bench_says(seconds: Seconds) -> Found:
    """Of one cell."""
    above, below = RATIOS["unmerged_over_merged"]
    about = estimate(ratios(seconds[above], seconds[below]))
    return about["median"], about["low"], about["high"]


def run(shape: str, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """What both say of each cell."""
    found = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            found.append(one_round(shape, device, Path(name)))
        gc.collect()
        print(f"round {number + 1} of {rounds}: {found[-1]}", flush=True)
    return [compared(cell, [each[cell] for each in found]) for cell in CELLS]


def compared(cell: tuple[int, int], rounds: Sequence[tuple[Found, Found]]) -> dict[str, Any]:
    """The typical intervals of both, whether they meet, and all ratios with their intervals."""
    bench, gauge = zip(*rounds, strict=True)
    return {
        "rows": cell[0],
        "adapters": cell[1],
        "bench": [round(end, 3) for end in typical(bench)],
        "gauge": [round(end, 3) for end in typical(gauge)],
        "bench_each_time": [[round(value, 3) for value in each] for each in bench],
        "gauge_each_time": [[round(value, 3) for value in each] for each in gauge],
        "agree": meet(typical(bench), typical(gauge)),
    }


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--shape", choices=[*SHAPES], help="8b on a GPU, short on a CPU, unless given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--record", action="store_true", help="keep the result under bench/results/")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft|transformers")
    logging.set_verbosity_error()
    device = pick_device(arguments.device)
    shape = arguments.shape or ("8b" if device.type == "cuda" else "short")
    found = run(shape, device, arguments.rounds)
    for each in found:
        verdict = "agree" if each["agree"] else "DISAGREE"
        print(
            f"{each['rows']} rows, {each['adapters']} adapters: bench {each['bench']}, gauge {each['gauge']}: {verdict}"
        )
    agree = all(each["agree"] for each in found)
    result = {"agree": agree, "cells": found, "rank": RANK, "shape": shape, **describe(device, skeleton(shape))}
    if arguments.record:
        print(f"kept: {record('gauge', result, [])}")
    print(json.dumps(result))
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
