"""Where a running total over descending weights reaches a bound, in the whole vocabulary: by counting, without a sort.

Takes weights as numbers in [0, 1] and masses as integers; knows nothing of what they stand for.
Shapes in the names: D rows, V vocabulary, K buckets.
"""

import torch
from torch import Tensor

BITS = 10
"""fp32 numbers from 0 to 1 have patterns of 30 bits: three digits of this size, whose buckets fit the fastest cache."""


def least_reaching(weight_DV: Tensor, mass_DV: Tensor, reach_D: Tensor) -> Tensor:
    """The least weight v of each row such that the tokens above v have less mass than `reach_D`; [D] fp32.

    `weight_DV` is fp32 in [0, 1], `mass_DV` and `reach_D` int64. With masses of 1 that is the `reach_D`-th largest
    weight. The order of such floats is that of their bit patterns, so v is looked up like a word: digit by digit, each
    among the tokens that share those before.
    """
    pattern_DV = weight_DV.view(torch.int32)
    pattern_D = torch.zeros_like(reach_D)
    for shift in (2 * BITS, BITS, 0):
        if shift < 2 * BITS:
            mass_DV = mass_DV * (pattern_DV >> shift + BITS == pattern_D[:, None])
        digit_DV = (pattern_DV >> shift).bitwise_and_((1 << BITS) - 1)
        digit_D, above_D = digit_reaching(digit_DV, mass_DV, reach_D)
        pattern_D = pattern_D << BITS | digit_D
        reach_D = reach_D - above_D
    return pattern_D.to(torch.int32).view(torch.float32)


def digit_reaching(digit_DV: Tensor, mass_DV: Tensor, reach_D: Tensor) -> tuple[Tensor, Tensor]:
    """The least digit such that those above it have less mass than `reach_D`, and that mass; [D] int64 each."""
    size = 1 << BITS
    mass_DK = mass_DV.new_zeros(mass_DV.shape[0], size).scatter_add_(1, digit_DV.long(), mass_DV)
    up_to_DK = mass_DK.cumsum_(dim=-1)
    total_D1 = up_to_DK[:, -1:]
    digit_D1 = torch.searchsorted(up_to_DK, total_D1 - reach_D[:, None], right=True).clamp_(max=size - 1)
    return digit_D1[:, 0], (total_D1 - up_to_DK.gather(1, digit_D1))[:, 0]
