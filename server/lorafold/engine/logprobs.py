"""Log probabilities of chosen tokens and of the most likely ones. Knows nothing of how the tokens were chosen.

Shapes in the names: S rows, V vocabulary, L rows that ask, K alternatives.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.requests import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Report:
    """What to tell some rows, still on the device."""

    rows: tuple[int, ...]
    """Which rows of the batch."""
    counts: tuple[int, ...]
    """How many alternatives each of them wants."""
    numbers_LN: Tensor
    """fp64, N = 1 + 2 K: log probability of the chosen token; those of the K most likely ones; their ids."""

    def read(self, tokens: Sequence[int], numbers: Sequence[float]) -> Iterator[tuple[int, TokenLogprobs]]:
        """(row of the batch, its report), from the batch's `tokens` and `numbers_LN` as a flat list."""
        width = self.numbers_LN.shape[1]
        for place, (row, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            own, *rest = numbers[place * width : (place + 1) * width]
            ids = [int(number) for number in rest[width // 2 : width // 2 + count]]
            yield row, TokenLogprobs(tokens[row], own, tuple(zip(ids, rest[:count], strict=True)))


def report(logits_SV: Tensor, token_S: Tensor, counts: Sequence[int | None]) -> Report | None:
    """For the rows whose count is not None: under the model's own distribution, before penalties and cuts."""
    rows = [row for row, count in enumerate(counts) if count is not None]
    if not rows:
        return None
    wanted = [min(count, logits_SV.shape[1]) for count in counts if count is not None]
    row_L = torch.tensor(rows).to(logits_SV.device)
    logprob_LV = logits_SV[row_L].log_softmax(dim=-1, dtype=torch.float32)
    own_L1 = logprob_LV.gather(1, token_S[row_L, None].clamp(min=0))
    top_LK = logprob_LV.topk(max(wanted))
    numbers_LN = torch.cat([part.double() for part in (own_L1, top_LK.values, top_LK.indices)], dim=1)
    return Report(tuple(rows), tuple(wanted), numbers_LN)
