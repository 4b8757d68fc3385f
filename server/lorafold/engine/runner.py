"""Runs one forward step for one batch. Holds tensors, knows nothing of queues or requests."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafold.engine.attention_means import IN_PLACE, PLAIN, Means
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.pages import SCRATCH
from lorafold.engine.step import Part, plan_step
from lorafold_adapters import AdapterManager
from lorafold_adapters.errors import DeviceFull


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Tokens of one sequence in one step."""

    tokens: Sequence[int]
    pages: Sequence[int]
    """Of the cache, with room for all tokens of the sequence so far."""
    past: int
    """Tokens of the sequence that are cached already."""
    adapter: str | None
    """Whose low-rank path to add; None: the weights as they are."""
    samples: bool
    """True if logits are wanted for the last token."""

    @property
    def decodes(self) -> bool:
        """True for a single token that continues a sequence."""
        return self.samples and len(self.tokens) == 1 and self.past > 0

    @property
    def part(self) -> Part:
        """Where it lies in the cache."""
        return Part(tokens=len(self.tokens), past=self.past, pages=self.pages, decodes=self.decodes)


class Runner:
    """One model, its cache, and the adapters on it."""

    def __init__(
        self, model: PreTrainedModel, manager: AdapterManager, cache: PagedCache, means: Means | None = None
    ) -> None:
        """`means`: of attention; what suits the device unless given."""
        self._model = model
        self._manager = manager
        self._cache = cache
        self._means = means or (IN_PLACE if model.device.type == "cpu" else PLAIN)

    def warm_up(self) -> None:
        """Runs one token, so that the cache takes its memory now. Raises DeviceFull if there is not enough."""
        try:
            self.run([Piece(tokens=[0], pages=[SCRATCH], past=0, adapter=None, samples=True)])
        except torch.OutOfMemoryError as error:
            raise DeviceFull("the device's memory does not hold the cache: lower engine.kv_memory_gib") from error

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits [S, V], fp32, one row for each piece that samples, in the order of `pieces`."""
        order = sorted(range(len(pieces)), key=lambda index: (not pieces[index].decodes, pieces[index].adapter or ""))
        batch = [pieces[index] for index in order]
        device = self._model.device
        step = plan_step(self._cache, [piece.part for piece in batch], device, with_tables=self._means.tables)
        ends, heads = self._ends(batch)
        body = [piece.adapter for piece in batch for _ in piece.tokens]
        with self._manager.routed(body, heads) if any(body) else nullcontext():
            logits_SV: Tensor = self._model(
                input_ids=torch.tensor([[token for piece in batch for token in piece.tokens]], device=device),
                position_ids=step.position_T[None],
                logits_to_keep=0 if len(ends) == len(body) else torch.tensor(ends, device=device),
                use_cache=False,
                step=step,
                means=self._means,
            ).logits[0]
        asked = [index for index in order if pieces[index].samples]
        if asked != sorted(asked):
            back = sorted(range(len(asked)), key=asked.__getitem__)
            logits_SV = logits_SV[torch.tensor(back, device=device)]
        return logits_SV[: len(asked)].float()

    @staticmethod
    def _ends(batch: Sequence[Piece]) -> tuple[list[int], list[str | None]]:
        """Places whose logits to compute, and their adapters; one unused place where nobody samples."""
        ends, adapters, stop = [], [], 0
        for piece in batch:
            stop += len(piece.tokens)
            if piece.samples:
                ends.append(stop - 1)
                adapters.append(piece.adapter)
        return (ends, adapters) if ends else ([0], [batch[0].adapter])
