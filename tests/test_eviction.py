"""Adapters that leave the device and come back from disk: the same bits, the same slots, and nothing left behind."""

import gc
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch
from torch import Tensor

from lorafold.services.status import code_and_reason
from lorafold_adapters import AdapterManager, Checkpoint, read_again, read_checkpoint
from lorafold_adapters.errors import AdapterChanged, AdapterNotFound
from lorafold_adapters.kernels import Reference
from lorafold_adapters.residency import Limits, Residency
from tests.models import KINDS, apart, logits_of, prompts, save_adapter, tiny_llama
from tests.tolerances import EFFECT

MakeAdapter = Callable[..., Path]
CYCLES = 300


def outputs(manager: AdapterManager, name: str) -> tuple[Tensor, Tensor]:
    """Beside the weights, and folded."""
    ids = prompts(2, 7)
    with manager.routed([name, name]):
        routed = logits_of(manager.model, ids)
    manager.merge_adapter(name)
    folded = logits_of(manager.model, ids)
    manager.unmerge_adapter()
    return routed, folded


@pytest.mark.parametrize("kind", ["plain", "dora", "patterns", "saved-head", "saved-norm"])
def test_an_adapter_that_comes_back_computes_the_same_bits(kind: str, adapter_on_llama: MakeAdapter) -> None:
    folder = adapter_on_llama(**KINDS[kind])
    manager = AdapterManager(model := tiny_llama())
    plain = logits_of(model, prompts(2, 7))
    digest = manager.load("it", folder).digest
    before = outputs(manager, "it")
    manager.drop("it")
    assert torch.equal(logits_of(model, prompts(2, 7)), plain)
    manager.load("other", adapter_on_llama(seed=8, **KINDS["all-linear"]))  # Something else is there meanwhile.
    back = manager.bind(read_again(folder, digest))
    assert back.digest == digest
    manager.load("it", manager.stage(manager.pinned(back)))
    for one, other in zip(before, outputs(manager, "it"), strict=True):
        assert torch.equal(one, other)
        assert apart(one, plain) > EFFECT
        assert not torch.equal(one, outputs(manager, "other")[0])


def test_a_folder_that_changed_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama(), tmp_path / "it", **KINDS["plain"])
    digest = read_checkpoint(folder).digest
    assert read_again(folder, digest).digest == digest
    shutil.copytree(folder, tmp_path / "kept")
    save_adapter(tiny_llama(), folder, seed=2, **KINDS["plain"])
    with pytest.raises(AdapterChanged, match=r"it' changed since it was deployed: it holds .*, not .*: put its files"):
        read_again(folder, digest)
    assert read_again(tmp_path / "kept", digest).digest == digest
    shutil.rmtree(folder)
    with pytest.raises(AdapterNotFound):
        read_again(folder, digest)
    assert code_and_reason(AdapterChanged("")) == (grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_CHANGED")


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


class TwoSlots:
    """Four adapters on two slots, chosen by the residency and routed together, by kernels, whose tables have slots."""

    def __init__(self, folders: list[Path]) -> None:
        self.checkpoints = [read_checkpoint(folder) for folder in folders]
        self.manager = AdapterManager(tiny_llama(), device_slots=2, kernels=Reference())
        self.residency = Residency(Limits(device_slots=2, device_bytes=1 << 20, host_bytes=1 << 20))
        for bound in map(self.manager.bind, self.checkpoints):
            size = self.manager.device_bytes(bound)
            self.residency.add(bound.digest, host_bytes=bound.nbytes, device_bytes=size)
        self.seen: dict[tuple[str, ...], Tensor] = {}
        self.swaps = 0

    def bring(self, checkpoint: Checkpoint) -> None:
        if checkpoint.digest in self.residency.device:
            return
        for victim in self.residency.room_on_device(checkpoint.digest) or ():
            self.residency.left_device(victim)
            self.manager.drop(victim)
        self.residency.placed_on_device(checkpoint.digest)
        self.manager.load(checkpoint.digest, self.manager.stage(checkpoint))
        self.swaps += 1

    def cycle(self, number: int) -> None:
        pair = [self.checkpoints[number % 4], self.checkpoints[(number + 1 + number // 4 % 3) % 4]]
        names = tuple(checkpoint.digest for checkpoint in pair)
        for name in names:
            self.residency.use(name)
        for checkpoint in pair:
            self.bring(checkpoint)
        for _ in range(1 if number else 2):  # The very first forward pass shows which layers share an input.
            with self.manager.routed(names):
                got = logits_of(self.manager.model, prompts(2, 1))
        assert torch.equal(self.seen.setdefault(names, got), got)
        groups = self.manager._router._together._groups
        assert groups is not None
        assert groups.covers(names)
        assert len(groups.slots) + len(groups._free) == 2
        for name in names:
            self.residency.unuse(name)


def test_many_cycles_leak_neither_memory_nor_slots(adapter_on_llama: MakeAdapter) -> None:
    server = TwoSlots([adapter_on_llama(seed=seed, **KINDS["plain"]) for seed in range(4)])
    tracemalloc.start()
    try:
        for number in range(24):  # Whatever is made once is there then, and traced.
            server.cycle(number)
        alive, start, swaps = tensors_alive(), tracemalloc.get_traced_memory()[0], server.swaps
        for number in range(24, 24 + CYCLES):  # A multiple of 12, after which the pairs come again.
            server.cycle(number)
        assert server.swaps - swaps > CYCLES // 2
        assert tensors_alive() == alive
        assert tracemalloc.get_traced_memory()[0] - start < CYCLES * 500  # One bound adapter has several kB.
    finally:
        tracemalloc.stop()
    assert server.manager.adapters.keys() == {
        c.digest for c in server.checkpoints if c.digest in server.residency.device
    }
    assert len(server.seen) == 12  # Every ordered pair came by, many times.
