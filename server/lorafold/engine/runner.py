"""Runs one forward step for one batch. Holds tensors, knows nothing of queues or requests."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafold.engine.attention_choice import choose_means
from lorafold.engine.attention_means import IN_PLACE, PLAIN, Means, decode_triton
from lorafold.engine.compiled import CompiledDecode
from lorafold.engine.families import GraphedDecode, graphs_work
from lorafold.engine.graphs import DecodeGraphs
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.pages import SCRATCH
from lorafold.engine.step import Part, Step, plan_step
from lorafold_adapters import AdapterManager
from lorafold_adapters.errors import DeviceFull

log = structlog.get_logger(__name__)


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
        self._graphed: GraphedDecode | None = None
        self._compiled: CompiledDecode | None = None

    def use_device(self) -> None:
        """Makes the model's GPU that of the calling thread: kernels and graphs go there."""
        if self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)

    def warm_up(self) -> None:
        """Runs one token, so that the cache takes its memory now. Raises DeviceFull if there is not enough."""
        self.use_device()
        try:
            self.run([Piece(tokens=[0], pages=[SCRATCH], past=0, adapter=None, samples=True)])
        except torch.OutOfMemoryError as error:
            raise DeviceFull("the device's memory does not hold the cache: lower engine.kv_memory_gib") from error

    def record(self, max_batch: int, context: int) -> None:
        """On a GPU: chooses the means of attention, and records decode steps of up to `max_batch` rows as graphs.

        `context`: tokens of a sequence at most. What cannot be recorded runs eagerly, with a warning.
        """
        if self._model.device.type != "cuda":
            return
        self.use_device()
        self._means = choose_means(self._model, self._cache)
        if self._means.decode is not decode_triton or not graphs_work(self._model.device, self._manager.quantised):
            log.warning("decode steps are not recorded as CUDA graphs: launching them takes longer")
            return
        graphs = DecodeGraphs(self._model, self._cache, self._means, max_batch=max_batch, context=context)
        graphed = GraphedDecode(graphs, self._manager)
        try:
            graphed.warm_up()
        except torch.AcceleratorError:
            raise  # The device's context is lost: nothing can run.
        except RuntimeError as error:
            log.warning("decode steps cannot be recorded as CUDA graphs", error=str(error).split("\n")[0])
            return
        self._graphed = graphed

    def compile(self) -> None:
        """On a CPU: compiles decode steps without low-rank paths, for one row and for several.

        What cannot be compiled runs as it is, with a warning.
        """
        if self._model.device.type != "cpu":
            return
        self._compiled = CompiledDecode(self._model)
        one = Piece(tokens=[0], pages=[SCRATCH], past=1, adapter=None, samples=True)
        try:
            for pieces in ([one], [one] * 2):
                self.run(pieces)
        except Exception as error:  # Compilers raise whatever they come upon.
            self._compiled = None
            why = str(error).split("\n")[0]
            log.warning("engine.compile is left out; it needs a C++ compiler, g++ or what CXX names", error=why)

    def fill(self, pages: Sequence[Sequence[int]]) -> None:
        """Writes something to these pages, each element a piece without gaps; they must be free."""
        with torch.inference_mode():
            for piece in pages:
                self._cache.fill(piece)

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits [S, V], fp32, one row for each piece that samples, in the order of `pieces`; valid until the next."""
        if self._graphed is not None and all(piece.decodes for piece in pieces):
            ids, adapters = [piece.tokens[0] for piece in pieces], [piece.adapter for piece in pieces]
            logits_SV = self._graphed.run(ids, [piece.part for piece in pieces], adapters)
            if logits_SV is not None:
                return logits_SV
        order = sorted(range(len(pieces)), key=lambda index: (not pieces[index].decodes, pieces[index].adapter or ""))
        logits_SV = self._forward([pieces[index] for index in order])
        asked = [index for index in order if pieces[index].samples]
        if asked != sorted(asked):
            back = sorted(range(len(asked)), key=asked.__getitem__)
            logits_SV = logits_SV[torch.tensor(back, device=logits_SV.device)]
        return logits_SV[: len(asked)].float()

    def _forward(self, batch: Sequence[Piece]) -> Tensor:
        """Logits [S, V] of the pieces that sample, in order; of one more place where none does."""
        device = self._model.device
        step = plan_step(self._cache, [piece.part for piece in batch], device, with_tables=self._means.tables)
        ids_1T = torch.tensor([[token for piece in batch for token in piece.tokens]], device=device)
        body = [piece.adapter for piece in batch for _ in piece.tokens]
        if self._compiled is not None and step.decoding == len(body) and not any(body):
            return self._compiled(ids_1T, step)
        ends, heads = self._ends(batch)
        with self._manager.routed(body, heads) if any(body) else nullcontext():
            return self._model_logits(ids_1T, step, ends)

    def _model_logits(self, ids_1T: Tensor, step: Step, ends: Sequence[int]) -> Tensor:
        logits_SV: Tensor = self._model(
            input_ids=ids_1T,
            position_ids=step.position_T[None],
            logits_to_keep=0 if len(ends) == ids_1T.shape[1] else torch.tensor(ends, device=ids_1T.device),
            use_cache=False,
            step=step,
            means=self._means,
        ).logits[0]
        return logits_SV

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
