"""What the two-path forward costs: one decode step of the base, folded and two-path, alternating in one run.

    python -m bench.overhead [--quick] [--batches 1,8,32] [--rank 16] [--device cpu] [--dtype float32]

A Llama of 768 by 12 with random weights (4 layers with --quick); adapters on all linear layers, written by PEFT and
read back. In every round each variant runs once, in an order that rotates: its weights are brought into place and one
step runs before the clock starts. Reported are medians and quartiles of the per-round ratios; the last line is one
JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bench.environment import describe
from lorafold.engine.kv_cache import SlotCache
from lorafold.engine.runner import Piece, Runner
from lorafold.model import pick_device, use_our_attention
from lorafold_adapters import AdapterManager

CONTEXT = 64
ADAPTERS = 8
STEPS = 3
"""Steps in one timing."""
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a decode step."""

    prepare: Callable[[], object]
    """Brings the weights into place; not timed."""
    adapters: list[str]
    """Whose low-rank paths the rows take, in turn; none: the weights as they are."""


def llama(layers: int) -> LlamaForCausalLM:
    """Random weights, 768 wide, 12 heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=8192,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def written_adapters(folder: Path, layers: int, rank: int) -> Iterator[tuple[str, Path]]:
    """PEFT checkpoints with random factors."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=ALL_LINEAR, init_lora_weights=False)
    names = [f"adapter-{index}" for index in range(ADAPTERS)]
    adapted = get_peft_model(llama(layers), config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    adapted.save_pretrained(str(folder))
    yield from ((name, folder / name) for name in names)


def pieces(batch: int, adapters: list[str]) -> list[Piece]:
    """One token of each of `batch` sequences."""
    turns = [adapters[row % len(adapters)] if adapters else None for row in range(batch)]
    return [Piece(tokens=[7 + row], slot=row, past=CONTEXT, adapter=turns[row], samples=True) for row in range(batch)]


def measure(runner: Runner, variants: dict[str, Variant], batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round; the first round is warm-up and not kept."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            variants[name].prepare()
            work = pieces(batch, variants[name].adapters)
            taken = timed(lambda work=work: runner.run(work))  # type: ignore[misc]
            if number:
                seconds[name].append(taken)
    return seconds


def timed(step: Callable[[], torch.Tensor]) -> float:
    """Seconds of `STEPS` steps after one that is not timed; copying logits to the host ends the last one."""
    step().cpu()
    start = time.perf_counter()
    for _ in range(STEPS):
        step().cpu()
    return time.perf_counter() - start


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of the per-round ratios."""
    low, middle, high = statistics.quantiles([one / other for one, other in zip(over, under, strict=True)], n=4)
    return {"median": round(middle, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}


def compare(runner: Runner, manager: AdapterManager, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """The ratios at one batch size."""
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
    seconds = measure(runner, variants, batch, rounds)
    unmerge()
    result = {
        "same_over_same": ratio(seconds["base_again"], seconds["base"]),
        "merged_over_base": ratio(seconds["merged"], seconds["base"]),
        "unmerged_over_merged_1_adapter": ratio(seconds["unmerged_1"], seconds["merged"]),
    }
    if "unmerged_8" in seconds:
        result["unmerged_over_merged_8_adapters"] = ratio(seconds["unmerged_8"], seconds["merged"])
    return result


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
    model = llama(layers).eval().requires_grad_(False)
    torch.nn.Module.to(model, device=device, dtype=getattr(torch, arguments.dtype))
    use_our_attention(model)
    manager = AdapterManager(model)
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in written_adapters(Path(scratch), layers, arguments.rank):
            manager.load(name, folder)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    runner = Runner(model, manager, SlotCache(slots=max(batches), length=CONTEXT + 1))
    results = {}
    for batch in batches:
        results[str(batch)] = compare(runner, manager, batch, rounds)
        print(f"batch {batch}: " + ", ".join(f"{key} {value['median']}" for key, value in results[str(batch)].items()))
    print(json.dumps({"decode_step": results, "rank": arguments.rank, "rounds": rounds, **describe(device, model)}))


if __name__ == "__main__":
    main()
