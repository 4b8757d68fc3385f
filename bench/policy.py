"""What `auto` is worth: three replayed workloads, served always merged, always unmerged, and as `auto` decides.

    python -m bench.policy [--quick] [--seconds 20] [--rounds 5] [--adapters 16] [--record]

The engine runs in process, with real adapters of rank 64 on all linear layers. Requests arrive at seeded Poisson times,
at a share of the rate at which the same engine answers an even mix unmerged, which is measured first. A request's
latency per token is the time from when it was due to its last token, over its tokens, and over what bare steps of the
base take right before and after the replay, as the speed of machines drifts; of each request the median of all rounds
counts. Every round replays each workload once under each policy, in an order that rotates; a policy that takes
more than twice as long as another one in the first round is not replayed again. The last line is one JSON object. See
bench/README.md.
"""

import argparse
import json
import random
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from transformers import LlamaForCausalLM
from transformers.utils import logging

from bench.arrivals import KINDS, arrivals
from bench.engines import Driven, engine_of
from bench.environment import describe
from bench.low_rank import write_low_rank
from bench.models import SHAPES, shaped
from bench.replay import Traffic, replay, summary
from bench.rounds import ratio, record, series
from bench.serving import tokenizer_of
from bench.work import drawn
from lorafold.config import LogConfig
from lorafold.engine.loop import Engine
from lorafold.logs import set_up_logging
from lorafold.metrics import Metrics
from lorafold.model import pick_device
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.policy import PolicyKind

RANK, SLOTS, PROMPT, ANSWER = 64, 16, 16, 24
LOAD = 0.5
"""Of the rate at which an even mix is answered unmerged."""
PROBE = 16
"""Tokens of an answer that tells how fast the machine is."""
TARGET = 1.05
POLICIES = (PolicyKind.MERGED, PolicyKind.UNMERGED, PolicyKind.AUTO)
HOPELESS = 2.0
"""Times the mean of the best policy."""
Rounds = dict[PolicyKind, list[list[float]]]
"""By policy: of each round, the latency per token of each request in order of arrival, in bare steps."""
Found = dict[str, Rounds]
"""By workload."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What answers the traffic."""

    driven: Driven
    engine: Engine
    adapters: list[BoundAdapter]
    vocabulary: int


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and short rounds, in two minutes on two cores"
    )
    parser.add_argument("--seconds", type=float, help="in which requests arrive; 20, or 3.5 if quick")
    parser.add_argument("--rounds", type=int, help="5, or 3 if quick")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument(
        "--shape", choices=[*SHAPES], help="8b on a GPU, mid on a CPU, tiny there if quick, unless given"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--record", action="store_true", help="keep the result in bench/results")
    return parser.parse_args()


def capacity(driven: Driven, adapters: Sequence[BoundAdapter], vocabulary: int) -> float:
    """Requests a second that an even mix is answered at, unmerged and with all places taken."""
    work = drawn(4 * SLOTS, PROMPT, ANSWER, vocabulary, seed=1)
    driven.run(work, adapters)
    seconds = driven.run(drawn(4 * SLOTS, PROMPT, ANSWER, vocabulary, seed=2), adapters).seconds
    return work.rows / seconds


def traffic_of(kind: str, rate: float, seconds: float, adapters: int, vocabulary: int) -> Traffic:
    """One of the workloads."""
    times = arrivals(kind, rate=rate, seconds=seconds, adapters=adapters, seed=0)
    return Traffic(arrivals=tuple(times), prompt=PROMPT, answer=ANSWER, vocabulary=vocabulary)


def bare_step(driven: Driven, vocabulary: int) -> float:
    """Seconds of a decode step of the base now, with half of all places taken."""
    times = driven.run(drawn(SLOTS // 2, PROMPT, PROBE, vocabulary, seed=4)).times[0]
    return (times[-1] - times[0]) / (len(times) - 1)


def measure(driven: Driven, engine: Engine, traffic: dict[str, Traffic], digests: Sequence[str], rounds: int) -> Found:
    """Every workload under every policy that is worth it in every round."""
    found: Found = {kind: {policy: [] for policy in POLICIES} for kind in traffic}
    seeds = iter(range(10, 10_000))
    for number in range(rounds):
        turn = number % len(POLICIES)
        for kind, replayed in traffic.items():
            for policy in POLICIES[turn:] + POLICIES[:turn]:
                if number and hopeless(found[kind], policy):
                    continue
                before = bare_step(driven, replayed.vocabulary)
                seconds = replay(engine, replayed, digests, policy, next(seeds))
                step = (before + bare_step(driven, replayed.vocabulary)) / 2
                found[kind][policy].append([each / step for each in seconds])
                mean, p99 = summary(found[kind][policy][-1]).values()
                print(f"  {kind:<9} {policy.value:<9} mean {mean:6.2f} steps a token, p99 {p99:6.2f}", flush=True)
    return found


def hopeless(rounds: Rounds, policy: PolicyKind) -> bool:
    """True if a policy was far behind another one in the first round."""
    means = {each: statistics.fmean(of[0]) for each, of in rounds.items()}
    return means[policy] > HOPELESS * min(means.values())


def usual(rounds: list[list[float]]) -> dict[str, float]:
    """Mean and 99th percentile of the requests, of each of which the median of the rounds counts."""
    return summary([statistics.median(of) for of in zip(*rounds, strict=True)])


def over_best(rounds: Rounds, key: str) -> float:
    """`auto` over the better of the two fixed policies."""
    values = {policy: usual(of)[key] for policy, of in rounds.items()}
    return round(values[PolicyKind.AUTO] / min(values[PolicyKind.MERGED], values[PolicyKind.UNMERGED]), 3)


def spread(rounds: Rounds) -> dict[str, float]:
    """Median and quartiles, over the rounds, of the mean of `auto` over that of the better fixed policy."""
    means = {policy: [statistics.fmean(each) for each in of] for policy, of in rounds.items()}
    best = min((PolicyKind.MERGED, PolicyKind.UNMERGED), key=lambda policy: usual(rounds[policy])["mean"])
    return ratio(means[PolicyKind.AUTO], means[best])


def over_merged(rounds: Rounds) -> float:
    """Always unmerged over always merged."""
    return round(usual(rounds[PolicyKind.UNMERGED])["mean"] / usual(rounds[PolicyKind.MERGED])["mean"], 3)


def decisions(registry: CollectorRegistry) -> dict[str, int]:
    """How often the policy changed its plan in the whole run, by cause."""
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    wanted = [sample for sample in samples if sample.name == "lorafold_policy_decisions_total"]
    return {sample.labels["cause"]: int(sample.value) for sample in wanted}


@contextmanager
def serving(model: LlamaForCausalLM, folder: Path, adapters: int, registry: CollectorRegistry) -> Iterator[Served]:
    """An engine with adapters on it, as a server would have them."""
    vocabulary = model.config.vocab_size
    folders = [write_low_rank(model, folder / str(seed), seed, RANK) for seed in range(adapters)]
    engine, manager, _ = engine_of(
        model,
        tokenizer_of(vocabulary),
        slots=SLOTS,
        context=4 * (PROMPT + ANSWER),
        prefill_tokens=128,
        waiting=100_000,
        metrics=Metrics(registry),
    )
    with Driven(engine, manager) as driven:
        bound = [driven.manager.bind(path) for path in folders]
        driven.put_on(bound)
        for adapter in bound:
            driven.call(partial(manager.gate.check, adapter))  # As a server does before an adapter is deployed.
        yield Served(driven=driven, engine=engine, adapters=bound, vocabulary=vocabulary)


def run(arguments: argparse.Namespace, served: Served) -> tuple[dict[str, Any], Found]:
    """Measures."""
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    seconds = arguments.seconds or (3.5 if arguments.quick else 20.0)
    count, vocabulary = len(served.adapters), served.vocabulary
    digests = [bound.digest for bound in served.adapters]
    rate = LOAD * capacity(served.driven, served.adapters, vocabulary)
    print(f"{rate:.1f} requests a second, {LOAD:.0%} of what an even mix is answered at unmerged")
    traffic = {kind: traffic_of(kind, rate, seconds, count, vocabulary) for kind in KINDS}
    for policy in POLICIES:
        replay(served.engine, traffic_of("even", rate, 4 / rate, count, vocabulary), digests, policy, seed=3)
    found = measure(served.driven, served.engine, traffic, digests, rounds)
    result = {
        "auto_over_best": {kind: over_best(of, "mean") for kind, of in found.items()},
        "auto_over_best_p99": {kind: over_best(of, "p99") for kind, of in found.items()},
        "auto_over_best_rounds": {kind: spread(of) for kind, of in found.items()},
        "unmerged_over_merged": {kind: over_merged(of) for kind, of in found.items()},
        "requests": {kind: len(of.arrivals) for kind, of in traffic.items()},
        "rounds": rounds,
        "rank": RANK,
        "load": LOAD,
    }
    return result, found


def main() -> None:
    """Measures and prints."""
    arguments = parsed()
    warnings.filterwarnings("ignore", module="peft|transformers")
    logging.set_verbosity_error()
    set_up_logging(LogConfig(level="warning"))
    random.seed(0)
    device = pick_device(arguments.device)
    shape = arguments.shape or ("8b" if device.type == "cuda" else "tiny" if arguments.quick else "mid")
    model = shaped(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    registry = CollectorRegistry()
    with tempfile.TemporaryDirectory() as name, serving(model, Path(name), arguments.adapters, registry) as served:
        result, found = run(arguments, served)
    result |= {"decisions": decisions(registry), "shape": shape, **describe(device, model)}
    for kind, value in result["auto_over_best"].items():
        if value > TARGET or (kind == "shifting" and value >= 1):
            print(f"below target: auto over the better fixed policy is {value} on '{kind}'")
    if arguments.record:
        points = {
            kind: {policy.value: [statistics.fmean(each) for each in rounds] for policy, rounds in of.items()}
            for kind, of in found.items()
        }
        print(f"every mean: {record('policy', result, series(points))}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
