"""A checksum of a tensor where it lies, cheap enough to be taken after every unfold.

On the CPU it is the tensor's digest in the base's fingerprint. On another device the bytes stay there: 32-bit lanes
are multiplied by odd numbers that depend on their place and summed, so that any one changed lane changes the sum, and
an exchange of lanes nearly always does. It is no defence against an attacker.
"""

import torch
from torch import Tensor

from lorafold_adapters.identity import tensor_digest

ROW = 4096
"""Lanes that are summed with the same multipliers before the sums are summed again."""
ROWS_AT_ONCE = 4096


def checksum(tensor: Tensor) -> str:
    """Of dtype, shape and bytes; for comparing with one taken on the same kind of device."""
    if tensor.device.type == "cpu":
        return tensor_digest(tensor.detach())
    return f"{tensor.dtype}{list(tensor.shape)}:{lane_sum(tensor.detach()):08x}"


def lane_sum(tensor: Tensor) -> int:
    """The weighted sum of the tensor's 32-bit lanes, modulo 2**32."""
    raw = tensor.contiguous().flatten().view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % (4 * ROW)))
    lanes = raw.view(torch.int32).view(-1, ROW)
    columns = odd_numbers(ROW, tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, lanes.shape[0], ROWS_AT_ONCE):
        part = lanes[start : start + ROWS_AT_ONCE]
        sums = (part * columns).sum(dim=1, dtype=torch.int64)
        places = odd_numbers(part.shape[0], tensor.device, first=start).long()
        total += (sums.remainder(2**32) * places.remainder(2**16)).sum()
    return int(total) % 2**32


def odd_numbers(count: int, device: torch.device, first: int = 0) -> Tensor:
    """Odd int32 numbers that differ from their neighbours in many bits."""
    numbers = torch.arange(first, first + count, dtype=torch.int64, device=device)
    mixed = (numbers * 0x9E3779B1).remainder(2**32) * 2 + 1
    return (mixed.remainder(2**32) - 2**31).to(torch.int32) | 1
