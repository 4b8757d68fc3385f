"""The largest logit of each row, in one pass that the CPU can vectorise, which `argmax` is not.

Shapes in the names: S rows, V vocabulary, W the width of a window.
"""

import torch
from torch import Tensor

WIDTH = 256
PAYS = 1 << 16
"""Logits from which on the vectorised pass is faster than `argmax` in spite of its more calls."""


def largest(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """Values [S] in the logits' dtype, and places [S] int64: of equals the first. A NaN counts as the largest."""
    if not logits_SV.is_cpu:
        value_S, place_S = logits_SV.max(dim=-1)
        return value_S, place_S
    whole = logits_SV.shape[1] // WIDTH * WIDTH
    if logits_SV.numel() < PAYS or not whole:
        # Not `max(dim)`: it wakes every thread for any size, which costs milliseconds where cores are taken.
        place_S1 = logits_SV.argmax(dim=-1, keepdim=True)
        return logits_SV.gather(1, place_S1)[:, 0], place_S1[:, 0]
    peaks = logits_SV[:, :whole].reshape(-1, whole // WIDTH, WIDTH).amax(dim=-1)
    if whole < logits_SV.shape[1]:
        peaks = torch.cat([peaks, logits_SV[:, whole:].amax(dim=-1, keepdim=True)], dim=1)
    first_S1 = peaks.argmax(dim=-1, keepdim=True) * WIDTH
    place_SW = (first_S1 + torch.arange(WIDTH)).clamp_(max=logits_SV.shape[1] - 1)
    window_SW = logits_SV.gather(1, place_SW)
    within_S1 = window_SW.argmax(dim=-1, keepdim=True)
    return window_SW.gather(1, within_S1)[:, 0], place_SW.gather(1, within_S1)[:, 0]
