"""Hot swaps under load: whether every answer is its adapter's, how long decoding stands still, what throughput is left.

    python -m bench.swap_under_load [--quick] [--seconds 20] [--rounds 5] [--shape mid] [--device cpu] [--record]

A real server; 16 streams in another process, over 4 deployments (merged, unmerged, and two auto). In every other round
one of the deployments is pointed at another adapter of a pool every 100 ms. Every answer is compared, token for token,
with what the adapter that it names gives alone, by PEFT. The last line is one JSON object. See bench/README.md.
"""

import argparse
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from bench.environment import describe
from bench.judging import Verdict, judge, reasons
from bench.load import Load, Reply, Served, Swaps, served_from
from bench.low_rank import write_low_rank
from bench.models import SHAPES, shaped
from bench.pauses import Timeline, over_fold_time
from bench.rounds import measure, ratio, record, series
from bench.serving import ask, clients, server_config, write_base
from bench.targets import missed
from bench.watched import Watched, watched
from bench.work import drawn
from lorafold.client import Client
from lorafold.config import Config, LogConfig
from lorafold.logs import set_up_logging
from lorafold.model import pick_device
from lorafold.v1 import deployment_pb2 as pb
from lorafold_adapters.checkpoint import read_checkpoint

STREAMS, POOL, PROMPTS, PROMPT, ANSWER = 16, 8, 16, 16, 12
RANK = 16
EVERY = 0.1
"""Seconds from the begin of one swap to that of the next."""
POLICIES = {"merged": "merged", "unmerged": "unmerged", "auto-1": "auto", "auto-2": "auto"}
"""By deployment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What came of all rounds; the first, a warm-up, has replies only."""

    seconds: dict[str, list[float]]
    """Per token of all streams together, with swaps and without, round for round."""
    timelines: dict[str, list[Timeline]] = field(default_factory=lambda: {"swaps": [], "no swaps": []})
    replies: list[Reply] = field(default_factory=list)
    swaps: list[int] = field(default_factory=list)
    """Of each round that has any."""


def load_of(vocabulary: int, folders: Sequence[Path], seconds: float) -> Load:
    """The streams, and the swaps; the k-th deployment has every fourth stream, which begin with different prompts."""
    names = list(POLICIES)
    prompts = drawn(PROMPTS, PROMPT, ANSWER, vocabulary, seed=3).prompts
    return Load(
        prompts=[list(prompt) for prompt in prompts],
        streams=[
            [(names[stream % len(names)], (stream + turn) % PROMPTS) for turn in range(PROMPTS)]
            for stream in range(STREAMS)
        ],
        answer=ANSWER,
        seconds=seconds,
        swaps=Swaps(every=EVERY, deployments=names, adapters=[str(folder) for folder in folders], seed=0),
    )


def config_of(base: Path, device: torch.device, folders: Sequence[Path]) -> Config:
    """The server."""
    deployments = [
        {"name": name, "adapter": str(folder), "policy": policy}
        for (name, policy), folder in zip(POLICIES.items(), folders, strict=False)
    ]
    engine = {"max_batch": STREAMS, "max_context": PROMPT + ANSWER}
    return server_config(base, device, engine=engine, deployments=deployments)


def rounds_of(load: Load, watch: Watched, served: Callable[[Load], Served], rounds: int) -> Seen:
    """All rounds, with swaps and without, alternating."""
    seen = Seen(seconds={})

    def timing(name: str, number: int) -> float:
        timeline = watch.begin()
        swaps = load.swaps and replace(load.swaps, seed=number)
        came = served(replace(load, swaps=swaps if name == "swaps" else None))
        seen.replies.extend(came.replies)
        if number:
            seen.timelines[name].append(timeline)
            seen.swaps.extend([came.swaps] * (name == "swaps"))
        print(f"  {name:<9} {came.tokens} tokens, {came.swaps} swaps, {len(timeline.changes)} changes", flush=True)
        return came.seconds_per_token

    variants = {name: (lambda number, name=name: timing(name, number)) for name in seen.timelines}
    return replace(seen, seconds=measure(variants, rounds))


def result_of(seen: Seen, verdict: Verdict, seconds: float) -> dict[str, Any]:
    """The last line, without what was asked for."""
    pauses = {name: over_fold_time(timelines) for name, timelines in seen.timelines.items()}
    throughput = ratio(seen.seconds["no swaps"], seen.seconds["swaps"])
    return {
        "swaps": sum(seen.swaps),
        "swaps_per_second": round(sum(seen.swaps) / (seconds * len(seen.swaps)), 1),
        "requests": verdict.requests,
        "wrong": verdict.wrong,
        "lost": verdict.lost,
        "p99_step_gap_over_fold_time": pauses["swaps"]["p99"],
        "longest_gap_over_fold_time": pauses["swaps"]["longest"],
        "throughput_over_no_swaps": throughput["median"],
        "throughput": throughput,
        "gaps_over_fold_time": pauses,
        "changes": {name: sum(len(each.changes) for each in of) for name, of in seen.timelines.items()},
        "told_apart": verdict.told_apart,
        "lost_because": reasons(seen.replies),
        "modes": {name: dict(Counter(r.mode for r in seen.replies if r.deployment == name)) for name in POLICIES},
    }


def deploy_once(address: str, folders: Sequence[Path]) -> None:
    """Has the server measure, for every adapter, what a fold of it keeps: it does so the first time only."""
    with Client(address) as client:
        for folder in folders:
            changed = pb.Deployment(name="merged", adapter_path=str(folder))
            client.stubs.deployments.UpdateDeployment(pb.UpdateDeploymentRequest(deployment=changed))


def run(shape: str, device: torch.device, seconds: float, rounds: int) -> tuple[dict[str, Any], Seen]:
    """Measures, then judges every answer."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = shaped(shape, device, torch.float32)
        write_base(base, folder / "base")
        folders = [write_low_rank(base, folder / str(seed), seed, RANK) for seed in range(POOL)]
        load = load_of(base.config.vocab_size, folders, seconds)
        with (
            watched(config_of(folder / "base", device, folders)) as (app, watch),
            clients(app.address, "bench.load") as process,
        ):
            deploy_once(app.address, folders)
            seen = rounds_of(load, watch, lambda asked: served_from(ask(process, asdict(asked))), rounds)
        digests = {read_checkpoint(each).digest: each for each in folders}
        return result_of(seen, judge(base, digests, load.prompts, seen.replies), seconds), seen


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and short rounds: under two minutes")
    parser.add_argument("--seconds", type=float, help="of one round; 20, or 6 if quick")
    parser.add_argument("--rounds", type=int, help="5, or 3 if quick; each once with swaps and once without")
    parser.add_argument("--shape", choices=[*SHAPES], help="mid, or small if quick, unless given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--record", action="store_true", help="keep the result under bench/results/")
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    arguments = parsed()
    warnings.filterwarnings("ignore", module="peft|transformers")
    logging.set_verbosity_error()
    set_up_logging(LogConfig(level="warning"))
    device = pick_device(arguments.device)
    shape = arguments.shape or ("small" if arguments.quick else "mid")
    seconds = arguments.seconds or (6.0 if arguments.quick else 20.0)
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    result, seen = run(shape, device, seconds, rounds)
    with torch.device("meta"):
        model = shaped(shape, torch.device("meta"), torch.float32)
    asked = {"shape": shape, "streams": STREAMS, "rank": RANK, "rounds": rounds, "round_seconds": seconds}
    result |= {**asked, **describe(device, model)}
    for line in missed(result, device.type):
        print(f"below target: {line}")
    if arguments.record:
        pauses = {name: [p.seconds for each in of for p in each.pauses] for name, of in seen.timelines.items()}
        changes = {name: [taken for each in of for taken in each.changes] for name, of in seen.timelines.items()}
        points = {"seconds per token": seen.seconds, "pauses": pauses, "changes": changes}
        print(f"every timing: {record('swap_under_load', result, series(points))}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
