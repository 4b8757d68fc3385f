"""What the two-path forward costs: one decode step of the base, folded and two-path, alternating in one run.

    python -m bench.overhead [--quick] [--batches 1,8,32] [--rank 16] [--device cpu] [--dtype float32]

A Llama of 768 by 12 with random weights (4 layers with --quick); adapters on all linear layers, written by PEFT and
read back. In every round each variant runs once, in an order that rotates: its weights are brought into place and one
step runs before the clock starts. Reported are medians and quartiles of the per-round ratios, the ratio of the fastest
rounds, for machines with other work, and each variant's fastest step in milliseconds; the last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.adapters import ALL_LINEAR, write_adapter
from bench.environment import describe
from bench.models import llama, placed
from bench.rounds import Timing, measure, ratio
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.linear import choose_linear
from lorafold.engine.runner import Piece, Runner
from lorafold.model import pick_device, use_our_attention
from lorafold_adapters import AdapterManager

CONTEXT = 64
ADAPTERS = 8
STEPS = 3
"""Steps in one timing."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a decode step."""

    prepare: Callable[[], object]
    """Brings the weights into place; not timed."""
    adapters: list[str]
    """Whose low-rank paths the rows take, in turn; none: the weights as they are."""


def written_adapters(folder: Path, layers: int, rank: int) -> Iterator[tuple[str, Path]]:
    """PEFT checkpoints on all linear layers."""
    base = llama(layers)
    for seed in range(ADAPTERS):
        name = f"adapter-{seed}"
        yield name, write_adapter(base, folder / name, seed, r=rank, lora_alpha=rank, target_modules=ALL_LINEAR)


def pieces(batch: int, adapters: list[str]) -> list[Piece]:
    """One token of each of `batch` sequences."""
    turns = [adapters[row % len(adapters)] if adapters else None for row in range(batch)]
    return [
        Piece(tokens=[7 + row], pages=[row], past=CONTEXT, adapter=turns[row], samples=True) for row in range(batch)
    ]


def timing(runner: Runner, variant: Variant, batch: int) -> Timing:
    """Times `STEPS` steps after one that is not timed; copying logits to the host ends each."""
    work = pieces(batch, variant.adapters)

    def timed(_: int) -> float:
        variant.prepare()
        runner.run(work).cpu()
        start = time.perf_counter()
        for _ in range(STEPS):
            runner.run(work).cpu()
        return time.perf_counter() - start

    return timed


def over(one: list[float], other: list[float]) -> dict[str, float]:
    """The ratio of two variants."""
    return {**ratio(one, other), "fastest": round(min(one) / min(other), 3)}


def compare(runner: Runner, manager: AdapterManager, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """The ratios at one batch size, and the milliseconds of a step."""
    names = list(manager.adapters)
    unmerge = manager.unmerge_adapter
    variants = {
        "base": Variant(unmerge, []),
        "base_again": Variant(unmerge, []),
        "merged": Variant(lambda: manager.merge_adapter(names[0]), []),
        "unmerged_1": Variant(unmerge, names[:1]),
    }
    if batch >= len(names):
        variants["unmerged_8"] = Variant(unmerge, names)
    seconds = measure({name: timing(runner, variant, batch) for name, variant in variants.items()}, rounds)
    unmerge()
    result = {
        "milliseconds": {name: round(1e3 * min(taken) / STEPS, 2) for name, taken in seconds.items()},
        "same_over_same": over(seconds["base_again"], seconds["base"]),
        "merged_over_base": over(seconds["merged"], seconds["base"]),
        "unmerged_over_merged_1_adapter": over(seconds["unmerged_1"], seconds["merged"]),
    }
    if "unmerged_8" in seconds:
        result["unmerged_over_merged_8_adapters"] = over(seconds["unmerged_8"], seconds["merged"])
    return result


def line_of(result: dict[str, dict[str, float]]) -> str:
    """One batch size in words: median and fastest."""
    ratios = [f"{key} {value['median']} ({value['fastest']})" for key, value in result.items() if "median" in value]
    return ", ".join(ratios) + f", ms {result['milliseconds']}"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer layers and rounds: under a minute")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    return parser.parse_args()


def main() -> None:
    """Measures and prints."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT to transformers, about a name.
    arguments = parsed()
    layers, rounds = (4, 8) if arguments.quick else (12, 20)
    device = pick_device(arguments.device)
    model = placed(llama(layers), device, getattr(torch, arguments.dtype))
    use_our_attention(model)
    choose_linear(model)
    manager = AdapterManager(model)
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in written_adapters(Path(scratch), layers, arguments.rank):
            manager.load(name, folder)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    runner = Runner(model, manager, PagedCache(pages=max(batches), size=CONTEXT + 1))
    runner.record(max(batches), CONTEXT + 1)
    results = {}
    for batch in batches:
        results[str(batch)] = compare(runner, manager, batch, rounds)
        print(f"batch {batch}: {line_of(results[str(batch)])}")
    print(json.dumps({"decode_step": results, "rank": arguments.rank, "rounds": rounds, **describe(device, model)}))


if __name__ == "__main__":
    main()
