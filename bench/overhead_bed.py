"""What `bench.overhead` times: a model of one dtype with everything that decodes on it, and whether all do the same.

Times nothing.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bench.decode_steps import Ours, Step, Theirs
from bench.grid import TARGETS, Cell, Grid, Group
from bench.low_rank import write_low_rank
from bench.models import shaped

CONTEXT = 64
"""Tokens of each row in the cache."""
TOLERANCE = 1e-3
"""Of fp32 logits of ours and PEFT's, over the largest."""


class Bed:
    """A model of one dtype with everything that decodes on it."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype, grid: Grid, scratch: Path) -> None:
        model = shaped(shape, device, dtype)
        self._scratch = scratch
        self._drawn = torch.Generator().manual_seed(0)
        self._vocabulary = model.config.vocab_size
        prompts_BT = torch.randint(self._vocabulary, (max(grid.batches), CONTEXT), generator=self._drawn)
        self._model = model
        self.theirs = Theirs(model, prompts_BT)
        self.ours = Ours(model, prompts_BT)
        self._names: list[str] = []

    def put_on(self, group: Group, adapters: int) -> list[Path]:
        """Adapters of this rank on these layers instead of those before; their folders."""
        folder = self._scratch / f"{group.targets}-{group.rank}-{group.dtype}"
        folder.mkdir()
        targets = TARGETS[group.targets]
        folders = [
            write_low_rank(self._model, folder / f"adapter-{seed}", seed, group.rank, targets)
            for seed in range(adapters)
        ]
        self.ours.replace(folders)
        self.theirs.replace(folders)
        self._names = [each.name for each in folders]
        return folders

    def steps(self, cell: Cell) -> dict[str, Step]:
        """The variants of a cell, by name."""
        tokens = torch.randint(self._vocabulary, (cell.batch,), generator=self._drawn).tolist()
        names = self._names[: cell.adapters]
        self.ours.manager.unmerge_adapter()  # Their caches are filled by the base.
        return {
            "base": self.ours.base(tokens),
            "transformers": self.theirs.plain(tokens),  # Whose tensors are ours: right after the base, they are its.
            "merged": self.ours.merged(tokens, names[0]),
            "unmerged": self.ours.unmerged(tokens, names, folded=names[0]),
            "peft_merged": self.theirs.merged(tokens),
            "peft_unmerged": self.theirs.unmerged(tokens, names),
        }


def same(steps: Mapping[str, Step]) -> None:
    """Raises RuntimeError if a step of ours and theirs differ, or if the adapters change nothing."""
    logits: dict[str, Tensor] = {}
    for name, step in steps.items():
        step.prepare()
        logits[name] = step.run().float().clone()
    for one, other in (("base", "transformers"), ("merged", "peft_merged"), ("unmerged", "peft_unmerged")):
        apart = float((logits[one] - logits[other]).abs().max() / logits[other].abs().max())
        if apart > TOLERANCE:
            raise RuntimeError(f"{one} and {other} are {apart:.1e} apart: they did not compute the same")
    for one, other in (("merged", "base"), ("unmerged", "merged")):
        if torch.allclose(logits[one], logits[other], rtol=0, atol=10 * TOLERANCE):
            raise RuntimeError("the adapters change nothing: nothing was compared")
