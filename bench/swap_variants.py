"""The ways to change which adapter is in the weights, each on a model of its own."""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from bench.adapters import ALL_LINEAR
from bench.models import attach, llama, placed, undo_bytes
from bench.rounds import Timing, stopwatch
from lorafold_adapters.undo_kinds import UndoKind

LAYERS = 12
NAMES = ("a", "b")
COPIES = 3
"""In one timing of the floor, which is short beside the others; their median counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """A plain copy of every weight that the adapters change."""

    model: LlamaForCausalLM
    timing: Timing
    weight_bytes: int
    """Of those weights."""

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return 2 * self.weight_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Folding:
    """What is measured of an AdapterManager."""

    swap: Timing
    """From one folded adapter to the other."""
    unmerge: Timing
    """From a folded adapter to the base."""
    undo_bytes: Callable[[], int]
    """Memory that the undo holds."""


def fresh(device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """The base; drawing its weights takes long, copying them does not."""
    return placed(copy.deepcopy(drawn()), device, dtype)


@cache
def drawn() -> LlamaForCausalLM:
    """The base in fp32, on the CPU; nobody changes it."""
    return llama(LAYERS)


def floor_of(device: torch.device, dtype: torch.dtype) -> Floor:
    """Copies from a second set, on the same device, so that nothing is read from where it is written."""
    model = fresh(device, dtype)
    live = [weight for name, weight in model.named_parameters() if name.split(".")[-2] in ALL_LINEAR]
    pristine = [weight.detach().clone() for weight in live]

    def copy() -> None:
        for weight, source in zip(live, pristine, strict=True):
            weight.copy_(source)

    def timing(_: int) -> float:
        return statistics.median(stopwatch(device, copy) for _ in range(COPIES))

    return Floor(model=model, timing=timing, weight_bytes=sum(weight.nbytes for weight in live))


def folding_of(
    device: torch.device, dtype: torch.dtype, undo: UndoKind, base: Path, adapters: Sequence[Path]
) -> Folding:
    """Both adapters loaded; before each timing the one of the round before is folded."""
    manager = attach(fresh(device, dtype), undo, base)
    for name, folder in zip(NAMES, adapters, strict=True):
        manager.load(name, folder)
        manager.fidelity(name)  # Measured once, before the first fold; no part of a swap.

    def swap(number: int) -> float:
        manager.merge_adapter(before(number))
        return stopwatch(device, lambda: manager.merge_adapter(after(number)))

    def unmerge(number: int) -> float:
        manager.merge_adapter(before(number))
        return stopwatch(device, manager.unmerge_adapter)

    def held() -> int:
        manager.merge_adapter(NAMES[0])
        return undo_bytes(manager)

    return Folding(swap=swap, unmerge=unmerge, undo_bytes=held)


def peft_of(device: torch.device, dtype: torch.dtype, adapters: Sequence[Path]) -> Timing:
    """PEFT's own way, both adapters loaded, with its defaults."""
    model = PeftModel.from_pretrained(fresh(device, dtype), str(adapters[0]), adapter_name=NAMES[0])
    model.load_adapter(str(adapters[1]), adapter_name=NAMES[1])
    model.merge_adapter([before(0)])

    def replace(name: str) -> None:
        model.unmerge_adapter()
        model.merge_adapter([name])

    return lambda number: stopwatch(device, lambda: replace(after(number)))


def before(number: int) -> str:
    """The adapter that is folded when round `number` begins."""
    return NAMES[number % 2]


def after(number: int) -> str:
    """The other one."""
    return NAMES[1 - number % 2]
