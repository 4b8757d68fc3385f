"""What `bench.throughput` measures: which batches of which shapes, which variants in each, how often. Plain data."""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.beds import COMPILED, OURS, PEERS, Size
from bench.cases import Case, Rounds
from bench.models import SHAPES

GROUPS = {
    "generate": ("generate_dynamic", "generate_static"),
    "continuous": ("continuous_batching",),
    "peft": ("peft_mixed",),
    "peft-own": ("peft_unmerged", "peft_merged"),
}
"""Peers, as the command line calls them; `none` is for none of them."""
CLIENTS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The work that goes through gRPC."""

    shape: str
    prompt: int
    answer: int
    rounds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that is measured."""

    headline: str
    """The shape whose first prompt length the result's own keys are about."""
    cases: tuple[Case, ...]
    rounds: Rounds
    stream: Stream | None
    left_out: tuple[str, ...]
    """What a whole run has beyond this."""

    def of(self, shape: str) -> list[Case]:
        """The cases of one shape."""
        return [case for case in self.cases if case.shape == shape]

    @property
    def shapes(self) -> list[str]:
        """In the order of their cases."""
        return list(dict.fromkeys(case.shape for case in self.cases))

    def size(self, shape: str) -> Size:
        """What fits all cases of one shape."""
        cases = self.of(shape)
        return Size(
            slots=max(case.batch for case in cases),
            context=max(case.prompt + case.answer for case in cases),
            prefill=max(case.batch * case.prompt for case in cases),
        )


QUICK = Plan(
    headline="mid",
    cases=(
        Case(
            shape="mid",
            batch=1,
            prompt=8,
            answer=12,
            variants=("merged", "base", "unmerged_1", "generate_dynamic", "continuous_batching"),
        ),
        Case(
            shape="mid",
            batch=8,
            prompt=8,
            answer=6,
            variants=("merged", "unmerged_1", "unmerged_8", "generate_dynamic", "continuous_batching", "peft_mixed"),
        ),
    ),
    rounds=Rounds(seconds=7, least=2, most=20, short_warm_up=True),
    stream=Stream(shape="mid", prompt=8, answer=8, rounds=2),
    left_out=(
        "the tiny shape, and batch 32",
        "prompts of 64 and 512: here they have 8 tokens",
        "the static cache, the compiled engine, and at batch 8 merged over base",
        "PEFT's own unmerged over merged",
        "more rounds",
    ),
)


def parsed(description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the mid shape and a few rounds: under a minute")
    parser.add_argument("--shape", help=f"one or some of {', '.join(SHAPES)}; on a CPU tiny,mid unless given, else 8b")
    parser.add_argument("--batches", help="1,8,32 unless given, with 64 on a GPU")
    parser.add_argument("--prompts", default="64,512", help="lengths; results are headed by the first")
    parser.add_argument("--answer", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--peers", help=f"of {', '.join(GROUPS)}; all unless given, on a GPU without the last")
    parser.add_argument("--seconds", type=float, default=60, help="when to begin no more rounds of a case")
    parser.add_argument("--no-grpc", action="store_true", help="leave out the server")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU unless given, else float32")
    parser.add_argument("--record", action="store_true", help="keep every timing under bench/results/")
    return parser.parse_args()


def planned(arguments: argparse.Namespace, device: torch.device) -> Plan:
    """What the command line asks for."""
    if arguments.quick:
        return QUICK
    on_gpu = device.type == "cuda"
    shapes = (arguments.shape or ("8b" if on_gpu else "tiny,mid")).split(",")
    batches = numbers(arguments.batches or ("1,8,32,64" if on_gpu else "1,8,32"))
    groups = arguments.peers or ",".join(list(GROUPS)[: -1 if on_gpu else None])  # Which needs one more copy.
    peers = [name for group in groups.split(",") if group != "none" for name in GROUPS[group]]
    mine = [name for name in OURS if name != COMPILED or compiles(device)]
    variants = (*mine, *(name for name in PEERS if name in peers))
    prompts = numbers(arguments.prompts)
    cases = tuple(
        Case(shape=shape, batch=batch, prompt=prompt, answer=arguments.answer, variants=variants)
        for shape in shapes
        for prompt in prompts
        for batch in batches
    )
    stream = Stream(shape=shapes[-1], prompt=prompts[0], answer=arguments.answer, rounds=5)
    return Plan(
        headline=shapes[-1],
        cases=cases,
        rounds=Rounds(seconds=arguments.seconds, least=3, most=25, short_warm_up=False),
        stream=None if arguments.no_grpc else stream,
        left_out=() if on_gpu or compiles(device) else ("the compiled engine: there is no g++",),
    )


def compiles(device: torch.device) -> bool:
    """True where `engine.compile` does something."""
    return device.type == "cpu" and shutil.which("g++") is not None


def numbers(text: str) -> Sequence[int]:
    """`1,8` as numbers."""
    return [int(part) for part in text.split(",")]
