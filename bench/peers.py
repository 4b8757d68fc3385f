"""What transformers itself offers for the same work: `generate`, and its continuous batching.

Every peer has a model of its own, with sdpa attention, greedy, no token that ends an answer, no gradients. A peer that
the installed version cannot run raises; whoever measures says why.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from bench.rounds import settle
from bench.work import Run, Work

PAGE = 256
"""Tokens of a page in the cache of continuous batching, by its default."""
MAX_BATCH_TOKENS = 2048
"""Of one of its steps: its mask is dense, tokens by places in the cache, where there is no flash attention."""
Peer = Callable[[Work], Run]


class Clock(LogitsProcessor):
    """Notes when the logits of each token were there; changes nothing.

    A GPU is waited for at the first and the last token only, so that nothing is slowed down between them.
    """

    def __init__(self, device: torch.device, answer: int) -> None:
        self.times: list[float] = []
        self._device = device
        self._answer = answer

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by `generate` once per token."""
        if len(self.times) in (0, self._answer - 1):
            settle(self._device)
        self.times.append(time.perf_counter())
        return scores


def generate(model: Any, work: Work, cache: Literal["dynamic", "static"] = "dynamic", **options: Any) -> Run:
    """One call of `model.generate`; with a static cache transformers compiles the decode step on a GPU."""
    ids = torch.tensor(work.prompts, device=model.device)
    clock = Clock(model.device, work.answer)
    start = time.perf_counter()
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=work.answer,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static" if cache == "static" else None,
        logits_processor=LogitsProcessorList([clock]),
        **options,
    )
    tokens = output[:, ids.shape[1] :].tolist()
    times = tuple(clock.times[: work.answer])
    return Run(tokens=tuple(map(tuple, tokens)), times=(times,) * work.rows, start=start)


class ContinuousBatching:
    """transformers' continuous batching, its cache just large enough for the work: that is its fastest.

    One manager at a time is kept, as its caches and graphs are made for one batch.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model
        self._made_for: tuple[int, int] | None = None
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)

    def __call__(self, work: Work) -> Run:
        """Raises RuntimeError if a request did not end well."""
        if self._made_for != (work.rows, work.context):
            self.close()
        self._made_for = (work.rows, work.context)
        start = time.perf_counter()
        answers = self._model.generate_batch(
            [list(prompt) for prompt in work.prompts],
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=work.answer, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(**options_for(work)),
            record_timestamps=True,
            persistent_manager=True,
            max_new_tokens=work.answer,
        )
        rows = list(answers.values())
        errors = [row.error for row in rows if row.error]
        if errors or len(rows) != work.rows or any(len(row.generated_tokens) != work.answer for row in rows):
            raise RuntimeError(f"{len(rows)} of {work.rows} requests ended, {errors[:1] or 'without an error'}")
        return Run(
            tokens=tuple(tuple(row.generated_tokens) for row in rows),
            times=tuple(tuple(row.timestamps or ()) for row in rows),
            start=start,
        )

    def close(self) -> None:
        """Frees the cache."""
        self._model.destroy_cached_continuous_batching_manager()


def options_for(work: Work) -> dict[str, Any]:
    """Those of the options that the installed version knows."""
    wanted = {
        "num_blocks": work.rows * math.ceil(work.context / PAGE),
        "max_batch_tokens": min(work.rows * len(work.prompts[0]), MAX_BATCH_TOKENS),
        "max_requests_per_batch": work.rows,
        "allow_block_sharing": False,  # Or prompts of an earlier round would be found in its cache.
        "auto_switch_to_flash": find_spec("flash_attn") is not None,  # Else it would ask a hub for it.
    }
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    return {name: value for name, value in wanted.items() if name in known}
