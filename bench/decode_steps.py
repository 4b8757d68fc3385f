"""One decode step, as the engine runs it and as transformers and PEFT do: the same tokens, context and adapters.

Whoever times them brings the weights into place first, outside of what is timed. All answer with logits, so that it can
be checked that they computed the same.
"""

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from bench.models import shell
from lorafold.engine.budget import PAGE_TOKENS
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.linear import choose_linear
from lorafold.engine.pages import PagePool
from lorafold.engine.runner import Piece, Runner
from lorafold.model import use_our_attention
from lorafold_adapters import AdapterManager


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One way to compute the next token of every row."""

    run: Callable[[], Tensor]
    """Logits [B, V]."""
    prepare: Callable[[], object]
    """Brings weights and cache into place; to be called before each step, and not timed."""


class Ours:
    """The engine's runner, on a model that it takes for itself."""

    def __init__(self, model: LlamaForCausalLM, prompts_BT: Tensor) -> None:
        """`prompts_BT`: what each row of the largest batch has in the cache."""
        use_our_attention(model)
        choose_linear(model)
        self.manager = AdapterManager(model, max_delta_error=float("inf"))
        rows, self._context = prompts_BT.shape
        pool = PagePool(pages=1 + rows * -(-(self._context + 1) // PAGE_TOKENS), size=PAGE_TOKENS)
        self._runner = Runner(model, self.manager, PagedCache(pages=pool.pages, size=pool.size))
        self._runner.warm_up()
        self._runner.record(rows, self._context + 1)
        pages = pool.borrow(rows, self._context + 1)
        assert pages is not None
        self._pages = pages
        for tokens, row in zip(prompts_BT.tolist(), pages, strict=True):
            self._runner.run([Piece(tokens=tokens, pages=row, past=0, adapter=None, samples=True)])

    def replace(self, folders: Sequence[Path]) -> None:
        """Takes these adapters instead of the ones before."""
        self.manager.unmerge_adapter()
        for name in list(self.manager.adapters):
            self.manager.drop(name)
        for folder in folders:
            self.manager.load(folder.name, folder)

    def base(self, tokens: Sequence[int]) -> Step:
        """Without an adapter."""
        return Step(run=self._runs(tokens, [None]), prepare=self.manager.unmerge_adapter)

    def merged(self, tokens: Sequence[int], adapter: str) -> Step:
        """With one in the weights."""
        return Step(run=self._runs(tokens, [None]), prepare=lambda: self.manager.merge_adapter(adapter))

    def unmerged(self, tokens: Sequence[int], adapters: Sequence[str], folded: str) -> Step:
        """Beside the weights in which one is folded already; rows take the adapters in turn.

        What comes out is of no use, but takes the same time as beside the base's, in the same memory as a folded step
        right before it.
        """
        run = self._runs(tokens, adapters)

        def rehearsed() -> Tensor:
            with self.manager.rehearsal():
                return run()

        return Step(run=rehearsed, prepare=lambda: self.manager.merge_adapter(folded))

    def _runs(self, tokens: Sequence[int], adapters: Sequence[str | None]) -> Callable[[], Tensor]:
        work = [
            Piece(
                tokens=[token],
                pages=self._pages[row],
                past=self._context,
                adapter=adapters[row % len(adapters)],
                samples=True,
            )
            for row, token in enumerate(tokens)
        ]
        return lambda: self._runner.run(work)


class Theirs:
    """transformers' forward, with its own cache, on the base, and through PEFT beside and in the weights."""

    def __init__(self, model: LlamaForCausalLM, prompts_BT: Tensor) -> None:
        """Reads the tensors of `model`, and does nothing to its modules."""
        self._plain = shell(model)
        self._prompts_BT = prompts_BT.to(model.device)
        self._adapted: Any = None
        self._layers: list[BaseTunerLayer] = []
        self._folded = ""

    def replace(self, folders: Sequence[Path]) -> None:
        """Takes these adapters instead of the ones before, while the tensors are those of the base."""
        self._adapted, self._layers = None, []
        gc.collect()
        self._adapted = peft_model(copy.deepcopy(self._plain), folders)
        self._folded = folders[0].name
        self._adapted.merge_adapter([self._folded])
        self._layers = [module for module in self._adapted.modules() if isinstance(module, BaseTunerLayer)]

    def plain(self, tokens: Sequence[int]) -> Step:
        """transformers without an adapter."""
        return self._step(self._plain, tokens)

    def merged(self, tokens: Sequence[int]) -> Step:
        """PEFT with the first adapter in the weights."""
        return self._step(self._adapted, tokens, lambda: self._say_merged([self._folded]))

    def unmerged(self, tokens: Sequence[int], adapters: Sequence[str]) -> Step:
        """PEFT beside the weights in which the first adapter is, for the reason that `Ours.unmerged` gives.

        With one adapter the active one, with several by `adapter_names`.
        """
        names = None if len(adapters) == 1 else [adapters[row % len(adapters)] for row in range(len(tokens))]

        def choose() -> None:
            self._say_merged([])
            if self._adapted.active_adapters != [adapters[0]]:
                self._adapted.set_adapter(adapters[0])

        return self._step(self._adapted, tokens, choose, **({} if names is None else {"adapter_names": names}))

    def _say_merged(self, names: Sequence[str]) -> None:
        """Has PEFT's layers take these adapters for merged, whatever is in their weights."""
        for layer in self._layers:
            layer.merged_adapters = list(names)

    def _step(
        self, model: Any, tokens: Sequence[int], choose: Callable[[], object] = lambda: None, **options: Any
    ) -> Step:
        ids_B1 = torch.tensor(tokens, device=self._prompts_BT.device)[:, None]
        cache = self._filled(len(tokens))

        def prepare() -> None:
            choose()
            if added := cache.get_seq_length() - self._prompts_BT.shape[1]:
                cache.crop(-added)

        @torch.inference_mode()
        def run() -> Tensor:
            logits_BV: Tensor = model(input_ids=ids_B1, past_key_values=cache, use_cache=True, **options).logits[:, -1]
            return logits_BV.float()

        return Step(run=run, prepare=prepare)

    @torch.inference_mode()
    def _filled(self, rows: int) -> DynamicCache:
        cache = DynamicCache(config=self._plain.config)
        self._plain(input_ids=self._prompts_BT[:rows], past_key_values=cache, use_cache=True)
        return cache


def peft_model(model: LlamaForCausalLM, folders: Sequence[Path]) -> PeftModel:
    """`model` with all adapters loaded, in its dtype; the first is active."""
    adapted = PeftModel.from_pretrained(
        model, str(folders[0]), adapter_name=folders[0].name, autocast_adapter_dtype=False
    )
    for folder in folders[1:]:
        adapted.load_adapter(str(folder), adapter_name=folder.name, autocast_adapter_dtype=False)
    return adapted.eval().requires_grad_(False)
