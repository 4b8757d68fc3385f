"""Logits to token ids, for a whole batch at once: penalties, then the largest logit or a draw from what the cuts leave.

A row's token depends on its own logits, settings and tokens alone. Draws are inverse-CDF sampling in fixed point:
probabilities are integers, whose sums are the same in any order, so neither the batch around a row nor the way in which
a device adds can change where its number falls.

Knows no queues, no text and no events. Shapes in the names: S rows, D rows that draw, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafold.engine.cuts import candidates, fixed_point, is_cut, least_weights
from lorafold.engine.largest import largest
from lorafold.engine.logprobs import Report, report
from lorafold.engine.penalties import penalised
from lorafold.engine.sampling_state import SamplingState
from lorafold.requests import Sampling, TokenLogprobs

COLDEST = 2.0**-125
"""Temperatures below it are as good as greedy, and would be 0 in fp32."""


@dataclass(frozen=True, slots=True)
class Pick:
    """What became of one row."""

    token: int | None
    """None if the logits were not numbers, or if there is a fault."""
    logprobs: TokenLogprobs | None = None
    fault: Exception | None = None
    """What was raised for this row alone."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """One token for each row of a batch."""

    token_S: Tensor
    """int64, on the device of the logits; -1 for a row that failed."""
    reports: tuple[Report, ...] = ()
    faults: tuple[tuple[int, Exception], ...] = ()
    """(row, what was raised for it)."""

    def read(self) -> list[Pick]:
        """Everything at once, in a single copy from the device."""
        if not self.reports and not self.faults:
            return [Pick(token if token >= 0 else None) for token in self.token_S.tolist()]
        parts = [self.token_S.double(), *(given.numbers_LN.flatten() for given in self.reports)]
        numbers = torch.cat(parts).tolist()
        size = self.token_S.numel()
        tokens, start = [int(number) for number in numbers[:size]], size
        reported: dict[int, TokenLogprobs] = {}
        for given in self.reports:
            stop = start + given.numbers_LN.numel()
            reported.update(given.read(tokens, numbers[start:stop]))
            start = stop
        faults = dict(self.faults)
        return [
            Pick(token, reported.get(row)) if token >= 0 else Pick(None, fault=faults.get(row))
            for row, token in enumerate(tokens)
        ]


@torch.inference_mode()
def sample(logits_SV: Tensor, rows: Sequence[SamplingState]) -> Chosen:
    """The next token of each row; `logits_SV` of any floating dtype, left as it is.

    Greedy choices do not wait for the device; the settings of other rows, and the look for rows whose cuts a few
    candidates do not cover, do. If the batch raises, each row is chosen for alone, and only the culprits fail.
    """
    try:
        return choose(logits_SV, rows)
    except torch.AcceleratorError:
        raise
    except Exception as error:
        if len(rows) == 1:
            return Chosen(logits_SV.new_full((1,), -1, dtype=torch.int64), faults=((0, error),))
    alone = [sample(logits_SV[row : row + 1], rows[row : row + 1]) for row in range(len(rows))]
    return Chosen(
        torch.cat([chosen.token_S for chosen in alone]),
        tuple(replace(given, rows=(row,)) for row, chosen in enumerate(alone) for given in chosen.reports),
        tuple((row, fault) for row, chosen in enumerate(alone) for _, fault in chosen.faults),
    )


def choose(logits_SV: Tensor, rows: Sequence[SamplingState]) -> Chosen:
    """`sample` without the isolation of faults."""
    changed_SV = penalised(logits_SV, rows)
    largest_S, token_S = largest(changed_SV)
    drawing = [row for row, state in enumerate(rows) if not state.sampling.greedy]
    if len(drawing) == len(rows):
        token_S = draw(changed_SV, largest_S, rows)
    elif drawing:
        row_D = torch.tensor(drawing).to(logits_SV.device)
        token_S[row_D] = draw(changed_SV[row_D], largest_S[row_D], [rows[row] for row in drawing])
    token_S.masked_fill_((largest_S < math.inf).logical_not_(), -1)  # NaN is not less either.
    told = report(logits_SV, token_S, [state.logprobs for state in rows])
    return Chosen(token_S, () if told is None else (told,))


def draw(logits_DV: Tensor, largest_D: Tensor, rows: Sequence[SamplingState]) -> Tensor:
    """Token ids [D] int64, drawn from the softmax that the cuts leave; -1 where no token has any weight."""
    # exp2, not exp: on the CPU that comes from a library that wakes every thread, however small the batch is.
    settings = [(max(row.sampling.temperature, COLDEST) * math.log(2.0), row.uniform()) for row in rows]
    octave_D, uniform_D = torch.tensor(settings, dtype=torch.float64).T.to(logits_DV.device)
    weight_DV = (logits_DV.float() - largest_D.float()[:, None]).div_(octave_D.float()[:, None]).exp2_()
    weight_DV.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    cut = [row for row, state in enumerate(rows) if is_cut(state.sampling, logits_DV.shape[1])]
    if not cut:
        return draw_from(weight_DV, uniform_D)
    cuts = [rows[row].sampling for row in cut]
    if len(cut) == len(rows):
        return draw_cut(weight_DV, uniform_D, cuts)
    row_C, row_U = (torch.tensor(part).to(logits_DV.device) for part in (cut, [*{*range(len(rows))} - {*cut}]))
    token_D = torch.empty_like(uniform_D, dtype=torch.int64)
    token_D[row_C] = draw_cut(weight_DV[row_C], uniform_D[row_C], cuts)
    token_D[row_U] = draw_from(weight_DV[row_U], uniform_D[row_U])
    return token_D


def draw_cut(weight_DV: Tensor, uniform_D: Tensor, cuts: Sequence[Sampling]) -> Tensor:
    """Token ids [D] int64: from a few candidates, or from the vocabulary for rows that these do not cover."""
    few = candidates(weight_DV, cuts)
    token_D = few.token_DC.gather(1, draw_from(few.weight_DC, uniform_D, few.least_D).clamp(min=0)[:, None])[:, 0]
    missed = few.enough_D.logical_not().nonzero()[:, 0].tolist()
    if missed:
        row_M = torch.tensor(missed).to(weight_DV.device)
        least_M = least_weights(weight_DV[row_M], [cuts[row] for row in missed])
        token_D[row_M] = draw_from(weight_DV[row_M], uniform_D[row_M], least_M)
    return token_D


def draw_from(weight_DV: Tensor, uniform_D: Tensor, least_D: Tensor | None = None) -> Tensor:
    """Places [D] int64 in the order of `weight_DV`, among weights of at least `least_D`; -1 where there is none."""
    mass_DV = fixed_point(weight_DV)
    if least_D is not None:
        mass_DV *= weight_DV >= least_D[:, None]
    up_to_DV = mass_DV.cumsum_(dim=-1)
    total_D = up_to_DV[:, -1]
    point_D = (uniform_D * total_D).long().minimum(total_D - 1)
    place_D = torch.searchsorted(up_to_DV, point_D[:, None], right=True)[:, 0]
    return place_D.masked_fill_(total_D == 0, -1)
