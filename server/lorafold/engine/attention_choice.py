"""Which means of attention is fastest on a GPU, by running the model's own steps with each.

A means that fails here, or computes something else than torch's, is left out with a warning.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import structlog
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafold.engine.attention_means import DECODE, PLAIN, PREFILL, Attend, Means
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.step import Part, plan_step

log = structlog.get_logger(__name__)
ROWS = 8
LENGTH = 512
ROUNDS = 5
# Largest difference of logits over the largest logit: some units in the last place, grown by the depth of the network.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@torch.inference_mode()
def choose_means(model: PreTrainedModel, cache: PagedCache) -> Means:
    """The fastest way to decode and the fastest to read prompts, on the model's device."""
    length = min(LENGTH, (cache.pages - 1) * cache.size)
    pages = range(1, cache.pages)
    reading = [Part(tokens=length - 1, past=0, pages=pages, decodes=False)]
    decoding = [Part(tokens=1, past=length - 1, pages=pages, decodes=True)] * ROWS

    def forward(parts: list[Part], means: Means) -> Tensor:
        step = plan_step(cache, parts, model.device, with_tables=means.tables)
        ids_1T = torch.full((1, len(step.position_T)), 1, device=model.device)
        output = model(
            input_ids=ids_1T,
            position_ids=step.position_T[None],
            use_cache=False,
            logits_to_keep=1,
            step=step,
            means=means,
        )
        logits: Tensor = output.logits[0].float()
        return logits

    prefill = fastest("prompts", PREFILL, lambda one: forward(reading, replace(PLAIN, prefill=one)), model.dtype)
    forward(reading, PLAIN)
    decode = fastest("decoding", DECODE, lambda one: forward(decoding, replace(PLAIN, decode=one)), model.dtype)
    return Means(decode=DECODE[decode], prefill=PREFILL[prefill], tables=True)


def fastest(what: str, candidates: Mapping[str, Attend], run: Callable[[Attend], Tensor], dtype: torch.dtype) -> str:
    """The name of the candidate that takes least time; "torch" is always one of them."""
    expected = run(candidates["torch"])
    milliseconds: dict[str, float] = {}
    for name, candidate in candidates.items():
        try:
            apart = float((run(candidate) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        except torch.AcceleratorError:
            raise  # The device's context is lost: nothing can run.
        except Exception as error:  # A compiler, a driver, a kernel: whatever is wrong there, torch's own remains.
            log.warning("attention left out", means=name, used_for=what, error=str(error).split("\n")[0])
            continue
        if not apart <= TOLERANCE.get(dtype, 1e-1):
            log.warning("attention left out", means=name, used_for=what, error=f"its logits are off by {apart:.2g}")
            continue
        milliseconds[name] = statistics.median(timings(lambda candidate=candidate: run(candidate)))  # type: ignore[misc]
    best = min(milliseconds, key=milliseconds.__getitem__)
    log.info("attention", used_for=what, means=best, milliseconds={k: round(v, 3) for k, v in milliseconds.items()})
    return best


def timings(work: Callable[[], Tensor]) -> list[float]:
    """Milliseconds of each round, until the result is on the host."""
    milliseconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work().cpu()
        milliseconds.append((time.perf_counter() - start) * 1e3)
    return milliseconds
