"""The arithmetic of low-rank updates: pure functions over tensors, in fp32.

Shapes in the names: R rank, I in-features, O out-features. Formulas: LoRA (Hu et al. 2021, section 4.1), rsLoRA
(Kalajdzievski 2023; its alpha/sqrt(r) arrives here as `scaling`), DoRA (Liu et al. 2024, equation 5).
"""

import torch
from torch import Tensor


def low_rank_delta(a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """`scaling * B A` as delta_OI, fp32 whatever the dtype of the factors."""
    return torch.mm(b_OR.float(), a_RI.float()).mul_(scaling)


def dora_gain(weight_OI: Tensor, delta_OI: Tensor, magnitude_O: Tensor) -> Tensor:
    """`m / ||W + delta||` by row, as gain_O in fp32: the two-path form multiplies the layer's output by it."""
    norm_O: Tensor = torch.linalg.vector_norm(weight_OI.float() + delta_OI, dim=1)
    return magnitude_O.float() / norm_O


def folded_weight(weight_OI: Tensor, delta_OI: Tensor, magnitude_O: Tensor | None) -> Tensor:
    """The weight with the update in it, fp32: `W + delta`, with DoRA each row scaled to length m."""
    folded_OI = weight_OI.float() + delta_OI
    if magnitude_O is None:
        return folded_OI
    return folded_OI * dora_gain(weight_OI, delta_OI, magnitude_O).unsqueeze(1)
