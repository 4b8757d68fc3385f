"""Runs one forward step for one batch. Holds tensors, knows nothing of queues or requests."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafold.engine.kv_cache import SlotCache, plan_step
from lorafold_adapters import AdapterManager
from lorafold_adapters.errors import DeviceFull


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Tokens of one sequence in one step."""

    tokens: list[int]
    slot: int
    past: int
    """Tokens of the sequence that are in the slot already."""
    adapter: str | None
    """Whose low-rank path to add; None: the weights as they are."""
    samples: bool
    """True if logits are wanted for the last token."""


class Runner:
    """One model, its cache, and the adapters on it."""

    def __init__(self, model: PreTrainedModel, manager: AdapterManager, cache: SlotCache) -> None:
        self._model = model
        self._manager = manager
        self._cache = cache

    def warm_up(self) -> None:
        """Runs one token, so that the cache takes its memory now. Raises DeviceFull if there is not enough."""
        try:
            self.run([Piece(tokens=[0], slot=0, past=0, adapter=None, samples=True)])
        except torch.OutOfMemoryError as error:
            raise DeviceFull(
                "the device's memory does not hold the cache: lower engine.max_batch or engine.max_context"
            ) from error

    @torch.inference_mode()
    def run(self, pieces: list[Piece]) -> Tensor:
        """Logits [S, V], fp32, one row for each piece that samples, in the order of `pieces`."""
        order = sorted(range(len(pieces)), key=lambda index: pieces[index].adapter or "")
        batch = [pieces[index] for index in order]
        device = self._model.device
        ids_T = torch.tensor([token for piece in batch for token in piece.tokens], device=device)
        step = plan_step(self._cache, [(piece.slot, piece.past, len(piece.tokens)) for piece in batch], device)
        ends, adapters = self._ends(batch)
        forward = {
            "input_ids": ids_T[None],
            "position_ids": step.position_T[None],
            "logits_to_keep": torch.tensor(ends, device=device),
            "use_cache": False,
            "step": step,
        }
        if any(piece.adapter for piece in batch):
            body = [piece.adapter for piece in batch for _ in piece.tokens]
            with self._manager.routed(body, adapters):
                logits_SV = self._model(**forward).logits[0]
        else:
            logits_SV = self._model(**forward).logits[0]
        asked = [index for index in order if pieces[index].samples]
        back = sorted(range(len(asked)), key=asked.__getitem__)
        chosen_SV: Tensor = logits_SV[torch.tensor(back, dtype=torch.int64, device=device)]
        return chosen_SV.float()

    @staticmethod
    def _ends(batch: list[Piece]) -> tuple[list[int], list[str | None]]:
        """Places whose logits to compute, and their adapters; one unused place where nobody samples."""
        ends, adapters, stop = [], [], 0
        for piece in batch:
            stop += len(piece.tokens)
            if piece.samples:
                ends.append(stop - 1)
                adapters.append(piece.adapter)
        return (ends, adapters) if ends else ([0], [batch[0].adapter])
