"""Folds adapters in random order, breaks some folds on purpose, and compares the base with a copy each time."""

import random
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from bench.faults import Fault, Kind
from bench.models import tensors, undo_bytes, weight_bytes
from lorafold_adapters import AdapterManager
from lorafold_adapters.errors import FoldFailed

BROKEN_SHARE = 0.25
UNFOLDED_SHARE = 0.5


class Trial:
    """One manager on one model, and what was seen of it."""

    def __init__(self, model: nn.Module, manager: AdapterManager, seed: str) -> None:
        self.sequence: list[str] = []
        """The adapters whose folds went through, in order."""
        self.failures: Counter[str] = Counter()
        self.comparisons = 0
        self.differing: set[str] = set()
        """Names of tensors that were ever found different from the base."""
        self.undo_share = 0.0
        """The most memory that the undo held, over that of all weights."""
        self._manager = manager
        self._live = tensors(model)
        self._kept = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._weight_bytes = weight_bytes(model)
        self._random = random.Random(seed)
        self._counts: dict[str, Fault] = {}
        """How many operations a fold of each adapter has; known after its first."""

    def run(self, folds: int) -> None:
        """Goes on until `folds` folds went through."""
        while len(self.sequence) < folds:
            folded = self._manager.fold_state.folded
            self._fold(self._random.choice([name for name in self._manager.adapters if name != folded]))
            if self._random.random() < UNFOLDED_SHARE:
                self._unfold()
        self._unfold()

    def details(self) -> dict[str, Any]:
        """For the last line."""
        return {
            "folds": len(self.sequence),
            "injected_failures": dict(self.failures),
            "comparisons": self.comparisons,
            "differing": sorted(self.differing),
            "undo_bytes_over_weight_bytes": self.undo_share,
        }

    def _fold(self, name: str) -> None:
        fault = self._fault(name)
        try:
            with fault:
                self._manager.merge_adapter(name)
        except FoldFailed:
            if not fault.struck or fault.kind is None:
                raise
            self.failures[fault.kind.value] += 1
            self._compare()
            return
        self._refuse_no_effect(name, fault)
        self.sequence.append(name)
        if not fault.struck:
            self._counts[name] = fault
        self.undo_share = max(self.undo_share, round(undo_bytes(self._manager) / self._weight_bytes, 4))

    def _fault(self, name: str) -> Fault:
        """What is to go wrong this time: nothing, most of the time, and the first time."""
        if name not in self._counts or self._random.random() > BROKEN_SHARE:
            return Fault()
        kind = self._random.choice(list(Kind))
        count = self._counts[name].products if kind is Kind.NAN else self._counts[name].operations
        return Fault(kind, self._random.randrange(count)) if count else Fault()

    def _refuse_no_effect(self, name: str, fault: Fault) -> None:
        """Raises if a fold went through that should not have, or left the base as it was."""
        if fault.kind is Kind.NAN and fault.struck and all(bool(live.isfinite().all()) for live in self._live.values()):
            self.failures["nan_in_a_record"] += 1  # Not in a weight: the record notes it like any other difference.
        elif fault.struck:
            raise RuntimeError(f"the fold of '{name}' went through in spite of a failure ({fault.kind})")
        if not self._different():
            raise RuntimeError(f"the fold of '{name}' changed nothing")

    def _unfold(self) -> None:
        self._manager.unmerge_adapter()
        self._compare()

    def _compare(self) -> None:
        self.comparisons += 1
        self.differing.update(self._different())

    def _different(self) -> list[str]:
        return [name for name, kept in self._kept.items() if not torch.equal(bits(self._live[name]), bits(kept))]


def bits(tensor: Tensor) -> Tensor:
    """The same memory as bytes: there -0.0 is not 0.0, and NaN equals itself."""
    return tensor.detach().reshape(-1).view(torch.uint8)
