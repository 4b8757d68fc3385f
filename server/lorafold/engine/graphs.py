"""Decode steps as CUDA graphs: one for each size of batch, replayed with new inputs at the same addresses.

A graph stays valid because nothing that it reads ever moves: weights are changed in place, the cache is made once, and
all that differs from step to step is in one small tensor. Sizes between two graphs are padded with rows of length 0,
which write to the scratch page and are not read.

Shapes in the names: B rows, N pages of the longest sequence, V vocabulary.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafold.engine.attention_means import Means
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.pages import SCRATCH
from lorafold.engine.step import Part, Step, Tables

BARE = "bare"
"""The family of graphs without low-rank paths."""
PADDING = Part(tokens=1, past=0, pages=[SCRATCH], decodes=True)
SMALL = (1, 2, 4, 8)
STRIDE = 8
"""Between sizes above the small ones."""
Work = Callable[[], Tensor]
Within = Callable[[], AbstractContextManager[object]]
ID, POSITION, PLACE, LENGTH, PAGES = range(5)
"""Columns of the input; the last one is the first of many."""


class StaticBatch:
    """The inputs of a decode step of up to `rows` rows, at one address."""

    def __init__(self, rows: int, pages: int, device: torch.device) -> None:
        self.rows = rows
        pinned = device.type == "cuda"
        self._host_BX = torch.zeros(rows, PAGES + pages, dtype=torch.int32, pin_memory=pinned)
        self._device_BX = torch.zeros_like(self._host_BX, device=device)
        self._index_B = torch.arange(rows, dtype=torch.int32, device=device)
        self._one_B = torch.ones(rows, dtype=torch.int32, device=device)

    def fill(self, ids: Sequence[int], parts: Sequence[Part], size: int) -> None:
        """One token for each of the first rows; the others become padding. `size`: tokens of a page."""
        self._host_BX.zero_()
        numbers = self._host_BX.numpy()
        for row, (token, part) in enumerate(zip(ids, parts, strict=True)):
            used = part.past // size + 1
            place = part.pages[used - 1] * size + part.past % size
            numbers[row, :PAGES] = (token, part.past, place, part.length)
            numbers[row, PAGES : PAGES + used] = part.pages[:used]
        self._device_BX.copy_(self._host_BX, non_blocking=True)

    @property
    def ids_1B(self) -> Tensor:
        """int64."""
        return self._device_BX[:, ID].long()[None]

    def step(self, cache: PagedCache) -> Step:
        """The plan of the step; reads nothing on the host."""
        columns = self._device_BX
        return Step(
            cache=cache,
            place_T=columns[:, PLACE].long(),
            position_T=columns[:, POSITION].long(),
            decoding=self.rows,
            decoding_at=(),
            chunks=(),
            tables=Tables(
                pages_BN=columns[:, PAGES:],
                length_B=columns[:, LENGTH].contiguous(),
                start_B=self._index_B,
                count_B=self._one_B,
            ),
        )


class DecodeGraphs:
    """Runs decode steps of one model."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        means: Means,
        *,
        max_batch: int,
        context: int,
        record: "Callable[[Work], Work] | None" = None,
    ) -> None:
        """`context`: tokens of a sequence at most. `record` makes a replay of some work; a CUDA graph unless given."""
        self._model = model
        self._cache = cache
        self._means = means
        self._record = record or Recorder()
        pages = -(-context // cache.size)
        self._batches = {rows: StaticBatch(rows, pages, model.device) for rows in sizes(max_batch)}
        self._replays: dict[tuple[int, Hashable], Work] = {}

    @property
    def max_batch(self) -> int:
        """Rows that one step can have."""
        return max(self._batches)

    def record_all(self) -> None:
        """Records every size of the bare model, the largest first, so that the others find its memory."""
        for rows in sorted(self._batches, reverse=True):
            self.run([0] * rows, [PADDING] * rows, BARE)

    @torch.inference_mode()
    def run(self, ids: Sequence[int], parts: Sequence[Part], family: Hashable, within: Within = nullcontext) -> Tensor:
        """Logits [rows, V], fp32, valid until the next call.

        A graph is recorded, `within` its context, when the first batch of its size and family comes.
        """
        batch = next(batch for rows, batch in self._batches.items() if rows >= len(ids))
        batch.fill(ids, parts, self._cache.size)
        key = (batch.rows, family)
        if key not in self._replays:
            self._replays[key] = self._record(lambda: self._forward(batch, within))
        return self._replays[key]()[: len(ids)]

    def forget(self, family: Hashable) -> None:
        """Drops the graphs of a family whose modules have changed."""
        self._replays = {key: replay for key, replay in self._replays.items() if key[1] != family}

    def _forward(self, batch: StaticBatch, within: Within) -> Tensor:
        step = batch.step(self._cache)
        ids_1B, position_1B = batch.ids_1B, step.position_T[None]
        with within():
            output = self._model(
                input_ids=ids_1B, position_ids=position_1B, use_cache=False, step=step, means=self._means
            )
        logits_BV: Tensor = output.logits[0].float()
        return logits_BV


class Recorder:
    """Makes CUDA graphs that share their working memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Runs `work` twice to compile and allocate what it needs, then records it. The result is at one address."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def sizes(max_batch: int) -> list[int]:
    """Batches that have a graph of their own, ascending; the last one holds any batch."""
    small = [size for size in SMALL if size < max_batch]
    return [*small, *range(STRIDE * 2, max_batch, STRIDE), max_batch]
