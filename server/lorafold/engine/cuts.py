"""Which tokens top_k, top_p and min_p leave, as the least weight that stays.

A weight is a probability over the largest one of its row, so min_p is a bound on it. top_p counts what top_k left, as
in transformers. Tokens with equal weights stay or go together, which makes a row's cut the same in every batch,
whatever order a kernel finds them in.

Shapes in the names: D rows, V vocabulary, C candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.engine.counting import least_reaching
from lorafold.requests import Sampling

UNIT = 2.0**40
"""The largest weight in fixed point: 2**22 tokens of it still add up within int64."""
FEW = 256
"""Candidates that are looked at first; almost every nucleus lies within them."""
MANY = 512
"""More than so many are not looked for."""


def is_cut(sampling: Sampling, vocabulary: int) -> bool:
    """True if some tokens may not be drawn."""
    return kept(sampling, vocabulary) < vocabulary or sampling.top_p < 1.0 or sampling.min_p > 0.0


def kept(sampling: Sampling, vocabulary: int) -> int:
    """How many tokens top_k leaves."""
    return min(sampling.top_k or vocabulary, vocabulary)


def fixed_point(weight: Tensor) -> Tensor:
    """int64, so that sums are the same in any order."""
    return (weight * UNIT).long()


@dataclass(frozen=True, slots=True)
class Candidates:
    """The largest weights of each row, in the order of their tokens."""

    weight_DC: Tensor
    token_DC: Tensor
    least_D: Tensor
    """The least weight that stays."""
    enough_D: Tensor
    """True if whatever stays is among the candidates; else `least_D` may be wrong."""


def candidates(weight_DV: Tensor, cuts: Sequence[Sampling]) -> Candidates:
    """A bounded number of tokens for each row, and the cuts found among them. `weight_DV` is fp32 in [0, 1]."""
    vocabulary = weight_DV.shape[1]
    wanted = [cut.top_k + 1 for cut in cuts if cut.top_k < MANY]
    weight_DC, token_DC = weight_DV.topk(min(vocabulary, max([FEW, *wanted])))
    order_DC = token_DC.argsort(dim=-1)
    in_order = weight_DC.gather(1, order_DC), token_DC.gather(1, order_DC)
    beyond_D = weight_DC[:, -1] if weight_DC.shape[1] < vocabulary else weight_DC.new_full((), -1.0)
    settings = [(kept(cut, vocabulary), cut.top_p, cut.min_p) for cut in cuts]
    count_D, share_D, bound_D = torch.tensor(settings, dtype=torch.float64).T.to(weight_DV.device)
    limited_D = count_D < vocabulary
    last_D1 = count_D.long()[:, None].clamp(max=weight_DC.shape[1]) - 1
    kth_D = torch.where(limited_D, weight_DC.gather(1, last_D1)[:, 0], 0.0)
    mass_DC = fixed_point(weight_DC) * (weight_DC >= kth_D[:, None])
    total_D = mass_DC.sum(dim=-1)
    if any(cut.top_p < 1.0 and kept(cut, vocabulary) == vocabulary for cut in cuts):
        total_D = torch.where(limited_D, total_D, fixed_point(weight_DV).sum(dim=-1))
    edge_D = torch.where(share_D < 1.0, nucleus_edge(weight_DC, mass_DC, reach(share_D, total_D)), 0.0)
    least_D = edge_D.maximum(kth_D).maximum(bound_D.float())
    enough_D = (least_D > beyond_D) & (~limited_D | (kth_D > beyond_D))
    return Candidates(*in_order, least_D, enough_D)


def nucleus_edge(weight_DC: Tensor, mass_DC: Tensor, reach_D: Tensor) -> Tensor:
    """The last of descending weights that are needed to reach a mass, [D] fp32; the very last if all fall short."""
    before_DC = mass_DC.cumsum(dim=-1) - mass_DC
    inside_D1 = (before_DC < reach_D[:, None]).sum(dim=-1, keepdim=True)
    return weight_DC.gather(1, (inside_D1 - 1).clamp(min=0))[:, 0]


def least_weights(weight_DV: Tensor, cuts: Sequence[Sampling]) -> Tensor:
    """The least weight that stays in each row, [D] fp32, found in the whole vocabulary."""
    device, vocabulary = weight_DV.device, weight_DV.shape[1]
    least_D = torch.tensor([cut.min_p for cut in cuts], dtype=torch.float32).to(device)
    counts = [kept(cut, vocabulary) for cut in cuts]
    if min(counts) < vocabulary:
        one_DV = torch.ones_like(weight_DV, dtype=torch.int64)
        least_D = least_D.maximum(kth_D := least_reaching(weight_DV, one_DV, torch.tensor(counts).to(device)))
        mass_DV = fixed_point(weight_DV) * (weight_DV >= kth_D[:, None])
    else:
        mass_DV = fixed_point(weight_DV)
    if any(cut.top_p < 1.0 for cut in cuts):
        share_D = torch.tensor([cut.top_p for cut in cuts], dtype=torch.float64).to(device)
        least_D = least_D.maximum(least_reaching(weight_DV, mass_DV, reach(share_D, mass_DV.sum(dim=-1))))
    return least_D


def reach(share_D: Tensor, total_D: Tensor) -> Tensor:
    """The mass that a nucleus must have, int64 (Holtzman et al. 2020)."""
    return (share_D * total_D).ceil().long()
