"""A paged cache to test with, poisoned wherever nothing lies, and the plain attention that its kernels must equal."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pages:
    """Sequences in shuffled pages; every other place, and the page that unused table entries name, holds NaN."""

    keys_PSKD: Tensor
    values_PSKD: Tensor
    pages_BN: Tensor
    length_B: Tensor
    key_BLKD: list[Tensor]
    """The same keys, one tensor a sequence, fp32."""
    value_BLKD: list[Tensor]

    def places(self, row: int) -> Tensor:
        """Where the tokens of a sequence lie: page * PAGE + offset."""
        place = torch.arange(int(self.length_B[row]), device=DEVICE)
        return self.pages_BN[row].long()[place // PAGE] * PAGE + place % PAGE


def fill_pages(lengths: Sequence[int], *, kv_heads: int, width: int, dtype: torch.dtype, seed: int = 0) -> Pages:
    """Sequences of these lengths with random keys and values; page 0 stays poisoned."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // PAGE) for length in lengths]
    free = (1 + torch.randperm(sum(needed) + 3, generator=generator)).tolist()
    rows = [[free.pop() for _ in range(count)] for count in needed]
    table = torch.tensor([[*row, *[0] * (max(needed) + 1 - len(row))] for row in rows], dtype=torch.int32)
    empty = torch.full((sum(needed) + 4, PAGE, kv_heads, width), float("nan"), dtype=dtype, device=DEVICE)
    keys, values = (
        [torch.randn(length, kv_heads, width, generator=generator).to(DEVICE, dtype) for length in lengths]
        for _ in "kv"
    )
    pages = Pages(
        keys_PSKD=empty,
        values_PSKD=empty.clone(),
        pages_BN=table.to(DEVICE),
        length_B=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        key_BLKD=[key.float() for key in keys],
        value_BLKD=[value.float() for value in values],
    )
    for row in range(len(lengths)):
        pages.keys_PSKD.flatten(0, 1)[pages.places(row)] = keys[row]
        pages.values_PSKD.flatten(0, 1)[pages.places(row)] = values[row]
    return pages


def plain_attention(
    query_MHD: Tensor,
    key_LKD: Tensor,
    value_LKD: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The last M tokens of one sequence over all of it: gather, mask, softmax, in fp32; returns [M, H, D]."""
    groups = query_MHD.shape[1] // key_LKD.shape[1]
    key_LHD, value_LHD = (tensor.float().repeat_interleave(groups, dim=1) for tensor in (key_LKD, value_LKD))
    score_HML = torch.einsum("mhd,lhd->hml", query_MHD.float(), key_LHD) * scale
    if softcap is not None:
        score_HML = torch.tanh(score_HML / softcap) * softcap
    place_L = torch.arange(len(key_LKD), device=key_LKD.device)
    position_M1 = place_L[len(key_LKD) - len(query_MHD) :, None]
    seen_ML = place_L <= position_M1
    if window is not None:
        seen_ML = seen_ML & (place_L > position_M1 - window)
    weight_HML = score_HML.masked_fill(~seen_ML, float("-inf")).softmax(dim=-1)
    return torch.einsum("hml,lhd->mhd", weight_HML, value_LHD)


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """While this is open, what is allocated without being filled holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def distance(result: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected number; infinite where a number is none."""
    difference = (result.float() - expected).abs().max() / expected.abs().max()
    return float(difference.nan_to_num(float("inf")))
