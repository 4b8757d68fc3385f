"""What the two-path forward costs: one decode step, base, folded and two-path, alternating in one run.

    python -m bench.overhead [--quick] [--batches 1,8,32] [--rank 16] [--device cpu] [--dtype float32]

A Llama of 768 by 12 with random weights; adapters on all linear layers, written by PEFT and read back. Every round runs
each variant once, in an order that rotates; reported are medians of the per-round ratios with their quartiles. The last
line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.environment import describe
from lorafold.engine.kv_cache import SlotCache
from lorafold.engine.runner import Piece, Runner
from lorafold.model import pick_device, use_our_attention
from lorafold_adapters import AdapterManager

CONTEXT = 64
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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


def write_adapter(folder: Path, layers: int, rank: int, seed: int) -> Path:
    """A PEFT checkpoint with random factors."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=ALL_LINEAR, init_lora_weights=False)
    get_peft_model(llama(layers), config).save_pretrained(str(folder))
    return folder


def pieces(batch: int, adapters: list[str]) -> list[Piece]:
    """One token of each of `batch` sequences; the adapters take turns over the rows."""
    return [
        Piece(
            tokens=[7 + row],
            slot=row,
            past=CONTEXT,
            adapter=adapters[row % len(adapters)] if adapters else None,
            samples=True,
        )
        for row in range(batch)
    ]


def measure(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after two rounds of warm-up."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 2):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            variants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median and quartiles of the per-round ratios."""
    ratios = [one / other for one, other in zip(over, under, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}


def measure_batch(
    runner: Runner, manager: AdapterManager, names: list[str], batch: int, rounds: int
) -> dict[str, object]:
    """The ratios at one batch size."""

    def folded() -> object:
        return runner.run(pieces(batch, []))

    steps: dict[str, Callable[[], object]] = {
        "base": lambda: runner.run(pieces(batch, [])),
        "unmerged_1": lambda: runner.run(pieces(batch, names[:1])),
        "unmerged_8": lambda: runner.run(pieces(batch, names)),
    }
    seconds = measure(steps, rounds)
    manager.merge_adapter(names[0])
    merged = measure({"merged": folded, "again": folded}, rounds)
    manager.unmerge_adapter()
    base = measure({"base": folded, "again": folded}, rounds)
    result: dict[str, object] = {
        "unmerged_over_base_1_adapter": ratio(seconds["unmerged_1"], seconds["base"]),
        "merged_over_base": ratio(merged["merged"], base["base"]),
        "same_over_same": ratio(seconds["base"], base["base"]),
    }
    if batch >= len(names):
        result["unmerged_over_base_8_adapters"] = ratio(seconds["unmerged_8"], seconds["base"])
    return result


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer layers and rounds")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    layers, rounds = (4, 12) if arguments.quick else (12, 40)
    device, dtype = torch.device(pick_device(arguments.device)), getattr(torch, arguments.dtype)
    model: PreTrainedModel = llama(layers).eval().requires_grad_(False)
    torch.nn.Module.to(model, device=device, dtype=dtype)
    use_our_attention(model)
    manager = AdapterManager(model)
    names = [f"adapter-{index}" for index in range(8)]
    with tempfile.TemporaryDirectory() as scratch:
        for index, name in enumerate(names):
            manager.load(name, write_adapter(Path(scratch) / name, layers, arguments.rank, index))
    batches = [int(batch) for batch in arguments.batches.split(",")]
    runner = Runner(model, manager, SlotCache(slots=max(batches), length=CONTEXT + 1))
    results = {}
    for batch in batches:
        results[str(batch)] = measure_batch(runner, manager, names, batch, rounds)
        print(f"batch {batch}: {results[str(batch)]}")
    print(json.dumps({"decode_step": results, "rank": arguments.rank, "rounds": rounds, **describe(device, model)}))


if __name__ == "__main__":
    main()
