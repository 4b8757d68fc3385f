"""What counting costs, and what measuring the unmerged path costs those who have requests meanwhile.

    python -m bench.metering [--quick] [--shape small] [--device cpu]

An engine answers batches of 32 rows over 8 adapters, unmerged: with nobody who counts, with the server's metrics, twice
so that the noise shows, and with these while `MeasureOverhead` runs beside it without end. All alternate in one run.
`metrics_share` is the time inside the calls that count over the time of all batches with metrics; `metrics_over_silent`
and `metrics_again` are of the time from token to token, `probed_over_metrics` of the whole time of a batch. The last
line is one JSON object.
"""

import argparse
import asyncio
import json
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from transformers import logging

from bench.engines import Driven, engine_of
from bench.environment import describe
from bench.low_rank import write_low_rank
from bench.models import SHAPES, shaped
from bench.rounds import Timing, measure, ratio, record, series
from bench.serving import tokenizer_of
from bench.targets import missed
from bench.work import drawn
from lorafold.config import LogConfig
from lorafold.engine.loop import Engine
from lorafold.engine.observer import Load, Phase
from lorafold.engine.probe import Probe
from lorafold.logs import set_up_logging
from lorafold.metrics import Metrics
from lorafold.model import pick_device
from lorafold.overheads import Grid, Overheads
from lorafold_adapters import AdapterManager
from lorafold_adapters.policy import Mode

ROWS, ADAPTERS, RANK, PROMPT, ANSWER = 32, 8, 16, 16, 32


class Timed(Metrics):
    """The server's metrics, that can be told not to count, and that know what counting took."""

    counting = True
    spent = 0.0
    """Seconds."""

    def step(self, phase: Phase, mode: Mode, seconds: float) -> None:
        """One forward step ran."""
        self._count(partial(super().step, phase, mode, seconds))

    def tokens(self, deployment: str, mode: Mode, *, prompt: int, answer: int) -> None:
        """So many tokens of prompts were read, and of answers generated."""
        self._count(partial(super().tokens, deployment, mode, prompt=prompt, answer=answer))

    def token(self, deployment: str, mode: Mode, seconds: float, *, first: bool) -> None:
        """A completion got a token."""
        self._count(partial(super().token, deployment, mode, seconds, first=first))

    def load(self, load: Load) -> None:
        """What there is to do now."""
        self._count(partial(super().load, load))

    def _count(self, work: Callable[[], None]) -> None:
        if self.counting:
            start = time.perf_counter()
            work()
            self.spent += time.perf_counter() - start


@contextmanager
def measuring(engine: Engine, manager: AdapterManager, probe: Probe, metrics: Metrics) -> Iterator[None]:
    """Inside, `MeasureOverhead` runs, as it does for a client who asks for more precision than can be had."""
    begun, over = threading.Event(), threading.Event()

    async def endless() -> None:
        overheads = Overheads(engine, manager, probe, metrics.overhead, max_batch=ROWS, context=PROMPT + ANSWER)
        grid = await overheads.grid(Grid(batches=[ROWS], adapters=[ADAPTERS], precision=1e-9, max_pairs=10**6))

        async def steps() -> None:
            async for _ in overheads.measure(grid):
                pass

        task = asyncio.create_task(steps())
        begun.set()
        await asyncio.to_thread(over.wait)
        task.cancel()
        await asyncio.wait([task])

    thread = threading.Thread(target=lambda: asyncio.run(endless()))
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def run(
    arguments: argparse.Namespace, device: torch.device, shape: str
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Measures."""
    rounds = 5 if arguments.quick else 20
    model = shaped(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    vocabulary = model.config.vocab_size
    metrics = Timed(CollectorRegistry())
    engine, manager, probe = engine_of(
        model,
        tokenizer_of(vocabulary),
        slots=2 * ROWS,  # Half of the cache stays free, for what is timed beside them.
        context=PROMPT + ANSWER,
        prefill_tokens=ROWS * PROMPT,
        metrics=metrics,
    )
    whole: dict[str, list[float]] = {"metrics": [], "probed": []}
    spent: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, Driven(engine, manager) as driven:
        bound = [manager.bind(write_low_rank(model, Path(scratch) / str(seed), seed, RANK)) for seed in range(ADAPTERS)]
        driven.put_on(bound)

        def timed(counting: bool, number: int) -> float:
            metrics.counting = counting
            done = driven.run(drawn(ROWS, PROMPT, ANSWER, vocabulary, seed=number), bound)
            if counting and number:
                whole["metrics"].append(done.seconds)
                spent.append(metrics.spent)
            metrics.spent = 0.0
            return done.step_seconds

        def probed(number: int) -> float:
            metrics.counting = True
            with measuring(engine, manager, probe, metrics):
                done = driven.run(drawn(ROWS, PROMPT, ANSWER, vocabulary, seed=number), bound)
            if number:
                whole["probed"].append(done.seconds)
            return done.step_seconds

        counted = partial(timed, True)
        variants: dict[str, Timing] = {
            "silent": partial(timed, False),
            "metrics": counted,
            "again": counted,
            "probed": probed,
        }
        seconds = measure(variants, rounds)
    usual = [fmean(pair) for pair in zip(whole["metrics"][::2], whole["metrics"][1::2], strict=True)]
    result = {
        "metrics_share": round(sum(spent) / sum(whole["metrics"]), 5),
        "metrics_over_silent": ratio(seconds["metrics"], seconds["silent"]),
        "metrics_again": ratio(seconds["again"], seconds["metrics"]),
        "probed_over_metrics": ratio(whole["probed"], usual),
        "rounds": rounds,
        "rows": ROWS,
        "adapters": ADAPTERS,
    }
    return {**result, "shape": shape, **describe(device, model)}, seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds of a small model: under a minute")
    parser.add_argument("--shape", choices=[*SHAPES], help="8b on a GPU, small on a CPU, unless given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--record", action="store_true", help="keep the result in bench/results")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft|transformers")
    logging.set_verbosity_error()
    set_up_logging(LogConfig(level="warning"))
    device = pick_device(arguments.device)
    result, seconds = run(arguments, device, arguments.shape or ("8b" if device.type == "cuda" else "small"))
    headline = {
        "metrics_share": result["metrics_share"],
        "probed_over_metrics": result["probed_over_metrics"]["median"],
    }
    for line in missed(headline, device.type):
        print(f"below target: {line}")
    if arguments.record:
        print(f"every timing: {record('metering', result, series({'float32': seconds}))}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
