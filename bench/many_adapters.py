"""More adapters than the device has room for: what it costs to fetch them, in time to first token and in host memory.

    python -m bench.many_adapters [--quick] [--requests 1600] [--rounds 5] [--shape small] [--device cpu] [--record]

Two servers in processes of their own. One has 1,000 deployments and room for 32 adapters on the device, and for 48 in
host memory. The other one has only the 64 deployments that are asked for, all on the device. 16 streams ask either
server in turn, in every round, by Zipf's law. Every answer is compared with what its adapter gives alone, by PEFT. The
last line is one JSON object. See bench/README.md.
"""

import argparse
import json
import random
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from bench.environment import describe
from bench.judging import judge, reasons
from bench.load import Load, Reply, served_from
from bench.low_rank import write_low_rank
from bench.models import SHAPES, shaped
from bench.replay import percentile
from bench.rounds import ratio, record, series
from bench.servers import Server, served
from bench.serving import ask, clients, server_tables, write_base
from bench.targets import missed
from bench.work import drawn
from lorafold.client import Client
from lorafold.model import pick_device
from lorafold.v1 import deployment_pb2 as pb
from lorafold_adapters.checkpoint import read_checkpoint

DEPLOYMENTS, SLOTS, STREAMS = 1000, 32, 16
HOT = 2 * SLOTS
"""Deployments that are asked for: the k-th as often as 1/k of the first."""
ON_HOST = SLOTS + SLOTS // 2
"""Adapters that host memory has room for; on a CPU those on the device are among them."""
RANK, PROMPTS, PROMPT, ANSWER = 8, 8, 16, 8
NAMES = ("resident", "fetched")


def name_of(number: int) -> str:
    """Of a deployment."""
    return f"tenant-{number}"


def asked_for(requests: int, seed: int) -> list[list[tuple[str, int]]]:
    """Deployment and prompt of every request of every stream."""
    numbers = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(HOT)]
    hot = numbers.choices(range(HOT), weights, k=requests)
    asked = [(name_of(number), numbers.randrange(PROMPTS)) for number in hot]
    return [asked[stream::STREAMS] for stream in range(STREAMS)]


def tables(base: Path, device: torch.device, residency: dict[str, Any]) -> dict[str, Any]:
    """The file of a server."""
    engine = {"max_batch": STREAMS, "max_context": PROMPT + ANSWER}
    return {**server_tables(base, device), "engine": engine, "residency": residency, "log": {"level": "warning"}}


def create(server: Server, folders: Sequence[Path]) -> int:
    """Makes the deployments; how much host memory the server took for it, in bytes."""
    before = server.resident_bytes
    with Client(server.address) as client:
        for number, folder in enumerate(folders):
            made = pb.Deployment(name=name_of(number), adapter_path=str(folder), policy=pb.POLICY_UNMERGED)
            client.stubs.deployments.CreateDeployment(pb.CreateDeploymentRequest(deployment=made))
    return server.resident_bytes - before


@contextmanager
def both(base: Path, device: torch.device, host_gib: float) -> Iterator[dict[str, Server]]:
    """The two servers."""
    few = {"device_slots": SLOTS, "host_memory_gib": host_gib}
    with (
        served(base.parent / "resident.toml", tables(base, device, {"device_slots": HOT})) as resident,
        served(base.parent / "fetched.toml", tables(base, device, few)) as fetched,
    ):
        yield dict(zip(NAMES, (resident, fetched), strict=True))


def rounds_of(servers: dict[str, Server], load: Load, requests: int, rounds: int) -> dict[str, list[list[Reply]]]:
    """The replies of each server, round for round, in turns; the first round is warm-up."""
    replies: dict[str, list[list[Reply]]] = {name: [] for name in NAMES}
    with (
        clients(servers["resident"].address, "bench.load") as one,
        clients(servers["fetched"].address, "bench.load") as other,
    ):
        processes = dict(zip(NAMES, (one, other), strict=True))
        for number in range(rounds + 1):
            asked = {**asdict(load), "streams": asked_for(requests, number)}
            for name in NAMES if number % 2 else reversed(NAMES):
                came = served_from(ask(processes[name], asked))
                replies[name].append(came.replies)
                said = f"p99 to the first token {first_token(came.replies) * 1e3:7.1f} ms"
                print(f"  {name:<9} {len(came.replies)} requests in {came.seconds:5.1f} s, {said}", flush=True)
    return replies


def first_token(replies: Sequence[Reply], share: float = 0.99) -> float:
    """A percentile of the seconds to the first token."""
    return percentile([reply.first for reply in replies if reply.first is not None], share)


def result_of(replies: dict[str, list[list[Reply]]]) -> dict[str, Any]:
    """Times to the first token, each over that of the server that has all adapters on the device."""
    kept = {name: of[1:] for name, of in replies.items()}
    over: dict[str, dict[str, float]] = {
        key: ratio(*([first_token(of, share) for of in kept[name]] for name in reversed(NAMES)))
        for key, share in (("p50", 0.5), ("p99", 0.99), ("slowest", 1.0))
    }
    return {
        "p99_ttft_over_resident": over["p99"]["median"],
        "ttft_over_resident": over,
        "requests": sum(len(of) for rounds in kept.values() for of in rounds),
    }


def run(shape: str, device: torch.device, requests: int, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures, then judges every answer; the result, and every time to the first token."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = shaped(shape, device, torch.float32)
        write_base(base, folder / "base")
        folders = [write_low_rank(base, folder / str(seed), seed, RANK) for seed in range(DEPLOYMENTS)]
        size = (folders[0] / "adapter_model.safetensors").stat().st_size
        prompts = [list(prompt) for prompt in drawn(PROMPTS, PROMPT, ANSWER, base.config.vocab_size, seed=3).prompts]
        load = Load(prompts=prompts, streams=[], answer=ANSWER)
        with both(folder / "base", device, ON_HOST * size / 2**30) as servers:
            create(servers["resident"], folders[:HOT])
            grown = create(servers["fetched"], folders)
            print(
                f"{DEPLOYMENTS} deployments made, for {grown / DEPLOYMENTS / 1e3:.0f} kB each on the host", flush=True
            )
            replies = rounds_of(servers, load, requests, rounds)
        result = {**result_of(replies), "host_bytes_per_adapter": grown // DEPLOYMENTS, "adapter_bytes": size}
        return result | judged(base, folders[:HOT], prompts, replies), points(replies)


def judged(
    base: LlamaForCausalLM, folders: Sequence[Path], prompts: list[list[int]], replies: dict[str, list[list[Reply]]]
) -> dict[str, Any]:
    """Whether every answer is its adapter's."""
    every = [reply for rounds in replies.values() for of in rounds for reply in of]
    digests = {read_checkpoint(each).digest: each for each in folders}
    verdict = judge(base, digests, prompts, every)
    told = {"wrong": verdict.wrong, "lost": verdict.lost, "told_apart": verdict.told_apart}
    return {**told, "lost_because": reasons(every)}


def points(replies: dict[str, list[list[Reply]]]) -> dict[str, Any]:
    """Seconds to the first token of every request: median, and 99th percentile, of each round."""
    return {
        name: {
            "p50": [statistics.median(reply.first or 0.0 for reply in of) for of in rounds[1:]],
            "p99": [first_token(of) for of in rounds[1:]],
        }
        for name, rounds in replies.items()
    }


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short rounds: under two minutes")
    parser.add_argument("--requests", type=int, help="of one round; 1600, or 240 if quick")
    parser.add_argument("--rounds", type=int, help="5, or 3 if quick")
    parser.add_argument("--shape", choices=[*SHAPES], help="small, or tiny if quick, unless given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--record", action="store_true", help="keep the result under bench/results/")
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    arguments = parsed()
    warnings.filterwarnings("ignore", module="peft|transformers")
    logging.set_verbosity_error()
    device = pick_device(arguments.device)
    shape = arguments.shape or ("tiny" if arguments.quick else "small")
    requests = arguments.requests or (240 if arguments.quick else 1600)
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    result, every = run(shape, device, requests, rounds)
    sizes = {"deployments": DEPLOYMENTS, "hot": HOT, "device_slots": SLOTS, "host_slots": ON_HOST, "rank": RANK}
    with torch.device("meta"):
        model = shaped(shape, torch.device("meta"), torch.float32)
    result |= {**sizes, "shape": shape, "rounds": rounds, "streams": STREAMS, **describe(device, model)}
    for line in missed(result, device.type):
        print(f"below target: {line}")
    if arguments.record:
        print(f"every timing: {record('many_adapters', result, series(every))}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
