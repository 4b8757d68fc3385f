"""Penalties for tokens that occurred already. Knows no draws and no cuts.

Shapes in the names: S rows, V vocabulary, P rows with a penalty, E pairs of a row and a token that it contains.
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from lorafold.engine.sampling_state import SamplingState


def penalised(logits_SV: Tensor, rows: Sequence[SamplingState]) -> Tensor:
    """The logits after the penalties, in fp32: a new tensor, or the given one if no row has any.

    First the repetition penalty (Keskar et al. 2019, as transformers has it: over prompt and answer, positive logits
    divided, negative ones multiplied), then presence and frequency penalty (as OpenAI's API defines them: subtracted
    over the answer alone, once, and once for each occurrence).
    """
    asking = [row for row, state in enumerate(rows) if state.sampling.penalised]
    occurrences = [rows[row].occurrences() for row in asking]
    sizes = [len(tokens) for tokens, _ in occurrences]
    if not sum(sizes):
        return logits_SV
    device = logits_SV.device
    token_E = joined([tokens for tokens, _ in occurrences]).to(device)
    count_E = joined([counts for _, counts in occurrences]).to(device)
    settings_3P = torch.tensor([three(rows[row]) for row in asking], dtype=torch.float32).T
    repetition_E, presence_E, frequency_E = settings_3P.repeat_interleave(torch.tensor(sizes), dim=1).to(device)
    row_E = torch.tensor(asking).repeat_interleave(torch.tensor(sizes)).to(device)
    logits_SV = logits_SV.float()
    old_E = logits_SV[row_E, token_E]
    new_E = torch.where(old_E < 0, old_E * repetition_E, old_E / repetition_E)
    new_E -= presence_E * (count_E > 0) + frequency_E * count_E
    return logits_SV.index_put((row_E, token_E), new_E)


def three(state: SamplingState) -> tuple[float, float, float]:
    """The penalties of one row."""
    given = state.sampling
    return given.repetition_penalty, given.presence_penalty, given.frequency_penalty


def joined(parts: "Sequence[array[int]]") -> Tensor:
    """A copy of all parts, int64, on the host."""
    return torch.cat([torch.frombuffer(part, dtype=torch.int64) for part in parts if part])
