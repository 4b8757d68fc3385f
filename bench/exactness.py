"""Whether the base comes back bit for bit, over many folds and injected failures; PEFT's merge beside it.

    python -m bench.exactness [--quick] [--device cpu]

16 kinds of adapter on a tiny Llama in bf16, fp16 and fp32, folded in random order, seeded: half of the folds replace
the adapter before without undoing it, and every fourth is broken inside. After each unfold and each broken fold all
tensors are compared with a copy, as integers, so that -0.0 is not 0.0; a few such values are planted in every weight.
The last line is one JSON object. Exit status 1 if a single bit differs.
"""

import argparse
import json
import math
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from bench.adapters import KINDS, write_adapter
from bench.environment import describe
from bench.models import attach, placed, saved, tiny, undo_kinds, weight_bytes
from bench.peft_drift import Drift, drift
from bench.rounds import record
from bench.trial import Trial
from lorafold.model import pick_device
from lorafold_adapters.undo_kinds import UndoKind

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FOLDS = 10_000
QUICK_FOLDS = 1_000


def written(folder: Path) -> dict[str, Path]:
    """One adapter of each kind."""
    base = tiny()
    return {
        kind: write_adapter(base, folder / kind, seed, **config)
        for seed, (kind, config) in enumerate(KINDS.items(), start=1)
    }


def planted(device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """The base, with values in every weight that sums do not give back."""
    model = placed(tiny(), device, dtype)
    hard = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 4, -1.0, 2.0**-7], dtype=dtype, device=device)
    for parameter in model.parameters():
        parameter.view(-1)[1:5] = hard
    return model


def run(device: torch.device, dtype: torch.dtype, undo: UndoKind, adapters: dict[str, Path], folds: int) -> Trial:
    """All folds with one dtype and one kind of undo."""
    model = planted(device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        manager = attach(model, undo, saved(model, Path(folder)))
        for name, adapter in adapters.items():
            manager.load(name, adapter)
            manager.fidelity(name)  # Measured once; the faults are for the folds.
        trial = Trial(model, manager, seed=f"{dtype}, {undo}")
        trial.run(folds)
        manager.detach()
    return trial


def report(trials: dict[str, dict[str, Trial]], peft: Drift, undo: str) -> dict[str, Any]:
    """What the last line says."""
    every = [trial for kinds in trials.values() for trial in kinds.values()]
    return {
        "folds": sum(len(trial.sequence) for trial in every),
        "adapters": len(KINDS),
        "injected_failures": sum(trial.failures.total() for trial in every),
        "base_bitwise_equal": all(not trial.differing for trial in every),
        "undo_bytes_over_weight_bytes": trials["bfloat16"][undo].undo_share,
        "peft_drift_max": peft.largest,
        "peft_changed_share": peft.changed_share,
        "peft": peft.details(),
        "all": {dtype: {kind: trial.details() for kind, trial in by_kind.items()} for dtype, by_kind in trials.items()},
    }


def show(dtype: str, undo: str, trial: Trial) -> None:
    """One line for people."""
    verdict = f"{len(trial.differing)} tensors DIFFER" if trial.differing else "equal bit for bit"
    print(
        f"{dtype}, undo {undo}: {len(trial.sequence)} folds, {trial.failures.total()} broken ones, "
        f"{trial.comparisons} comparisons of the whole base: {verdict}"
    )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer folds: under a minute")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--record", action="store_true", help="keep every count under bench/results/")
    return parser.parse_args()


def main() -> int:
    """Folds, compares and prints."""
    warnings.filterwarnings("ignore", module="peft|transformers")
    arguments = parsed()
    device = pick_device(arguments.device)
    undos = undo_kinds(device)
    folds = math.ceil((QUICK_FOLDS if arguments.quick else FOLDS) / (len(DTYPES) * len(undos)))
    bits, every = 8 * weight_bytes(tiny()), folds * len(DTYPES) * len(undos)
    print(f"limit: after none of {every:,} folds may one of {bits:,} bits (in fp32) differ")
    trials: dict[str, dict[str, Trial]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        adapters = written(Path(scratch))
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            trials[name] = {undo: run(device, dtype, undo, adapters, folds) for undo in undos}
            for undo in undos:
                show(name, undo, trials[name][undo])
        peft = drift(planted(device, torch.bfloat16), adapters, trials["bfloat16"][undos[0]].sequence)
    print(peft.sentence())
    result = report(trials, peft, undos[0])
    result |= {**describe(device, tiny()), "dtype": list(trials)}
    if arguments.record:
        points = (
            {"dtype": dtype, "undo": undo, "adapters": trial.sequence, **trial.details()}
            for dtype, by_kind in trials.items()
            for undo, trial in by_kind.items()
        )
        print(f"every fold: {record('exactness', result, points)}")
    print(json.dumps(result))
    return 0 if result["base_bitwise_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
