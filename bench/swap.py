"""What going from one folded adapter to the next costs, over a plain copy of the same weights and against PEFT.

    python -m bench.swap [--quick] [--device cpu] [--rank 16] [--record]

A Llama of 97 M parameters with random weights; adapters on all linear layers, as strong as trained ones. The floor is
`copy_` from a second set of exactly the weights that the adapters change, on the same device. PEFT does what it offers:
`unmerge_adapter()`, then `merge_adapter([other])`, with both adapters loaded, in the dtype that it chooses for them
(fp32). In every round each variant runs once, in an order that rotates. Reported are medians and quartiles of the
per-round ratios; the last line is one JSON object.
"""

import argparse
import copy
import json
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.adapters import ALL_LINEAR, STRENGTH, write_adapter
from bench.environment import describe
from bench.models import llama, saved, undo_kinds
from bench.rounds import measure, ratio, record, series
from bench.swap_variants import LAYERS, Floor, Folding, drawn, floor_of, folding_of, peft_of
from lorafold.model import pick_device
from lorafold_adapters.undo_kinds import UndoKind

DTYPES = (torch.float32, torch.bfloat16)
COPIES = ("device", "checkpoint")
"""Kinds of undo that hold a copy of the weights: on a GPU the nearest, on a CPU the default."""
Seconds = dict[str, list[float]]


@contextmanager
def written(rank: int) -> Iterator[list[Path]]:
    """The folders of two adapters, for as long as they are needed."""
    with tempfile.TemporaryDirectory() as scratch:
        base = copy.deepcopy(drawn())  # PEFT writes into it.
        options: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": ALL_LINEAR}
        yield [write_adapter(base, Path(scratch) / name, seed, **options) for seed, name in enumerate("ab")]


def run(
    device: torch.device, dtype: torch.dtype, adapters: list[Path], rounds: int, kinds: Sequence[UndoKind]
) -> tuple[dict[str, Any], Seconds]:
    """The results by kind of undo, and every timing, in one dtype."""
    with tempfile.TemporaryDirectory() as scratch:
        floor = floor_of(device, dtype)
        show_limit(floor, dtype)
        base = saved(floor.model, Path(scratch))
        foldings = {undo: folding_of(device, dtype, undo, base, adapters) for undo in kinds}
        variants = {"floor": floor.timing, "floor again": floor.timing, "peft": peft_of(device, dtype, adapters)}
        for undo, folding in foldings.items():
            variants |= {f"swap, {undo}": folding.swap, f"unmerge, {undo}": folding.unmerge}
        seconds = measure(variants, rounds)
        return {undo: compared(seconds, undo, floor, folding) for undo, folding in foldings.items()}, seconds


def show_limit(floor: Floor, dtype: torch.dtype) -> None:
    """The physical limit, for people."""
    floor.timing(0)
    seconds = statistics.median(floor.timing(0) for _ in range(3))
    print(
        f"{dtype}: a copy of the changed weights reads and writes {floor.moved / 1e6:.0f} MB, "
        f"here at {floor.moved / seconds / 1e9:.1f} GB/s; no swap is faster"
    )


def compared(seconds: Seconds, undo: str, floor: Floor, folding: Folding) -> dict[str, Any]:
    """Medians, with their quartiles beside them, of one kind of undo."""
    ratios = {
        "same_over_same": ratio(seconds["floor again"], seconds["floor"]),
        "swap_over_floor": ratio(seconds[f"swap, {undo}"], seconds["floor"]),
        "unmerge_over_floor": ratio(seconds[f"unmerge, {undo}"], seconds["floor"]),
        "peft_over_floor": ratio(seconds["peft"], seconds["floor"]),
        "speedup_over_peft": ratio(seconds["peft"], seconds[f"swap, {undo}"]),
    }
    return {
        **{name: found["median"] for name, found in ratios.items()},
        "quartiles": {name: [found["quartile_1"], found["quartile_3"]] for name, found in ratios.items()},
        "undo_bytes_over_weight_bytes": round(folding.undo_bytes() / floor.weight_bytes, 4),
    }


def show(dtype: str, results: dict[str, Any]) -> None:
    """One line for people by kind of undo."""
    for undo, found in results.items():
        print(
            f"{dtype}, undo {undo}: swap {found['swap_over_floor']} times the floor, "
            f"PEFT {found['peft_over_floor']}, so {found['speedup_over_peft']} times as fast as PEFT; "
            f"unmerge {found['unmerge_over_floor']} times the floor"
        )


def milliseconds(device: torch.device, seconds: dict[str, Seconds]) -> dict[str, Any]:
    """Medians, where a GPU was measured; elsewhere only ratios are said."""
    if device.type != "cuda":
        return {}
    medians = {
        dtype: {variant: round(statistics.median(taken) * 1e3, 3) for variant, taken in variants.items()}
        for dtype, variants in seconds.items()
    }
    return {"milliseconds": medians}


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under a minute")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--record", action="store_true", help="keep every timing under bench/results/")
    return parser.parse_args()


def reported(results: dict[str, dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What the last line says, without what was asked for."""
    headline = results["float32"][next(undo for undo in COPIES if undo in results["float32"])]
    with torch.device("meta"):
        shape = llama(LAYERS)
    return {
        **{key: headline[key] for key in ("swap_over_floor", "peft_over_floor", "speedup_over_peft")},
        "all": results,
        "delta_rms_over_weight_rms": STRENGTH,
        **describe(device, shape),
        "dtype": list(results),
    }


def main() -> None:
    """Measures and prints."""
    warnings.filterwarnings("ignore", module="peft|transformers")
    arguments = parsed()
    device = pick_device(arguments.device)
    rounds = 5 if arguments.quick else 25
    kinds = [kind for kind in undo_kinds(device) if not arguments.quick or kind in (*COPIES, "sparse")]
    results: dict[str, dict[str, Any]] = {}
    seconds: dict[str, Seconds] = {}
    with written(arguments.rank) as adapters:
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            results[name], seconds[name] = run(device, dtype, adapters, rounds, kinds)
            show(name, results[name])
    asked = {"rank": arguments.rank, "rounds": rounds}
    result = {**reported(results, device), **milliseconds(device, seconds), **asked}
    if arguments.record:
        print(f"every timing: {record('swap', result, series(seconds))}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
