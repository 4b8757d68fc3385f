"""Knows a base by its content: a digest per tensor and one fingerprint over all of them.

XXH3 (128 bit) tells apart what chance or a mistake would mix up, at memory speed; it is no defence against an attacker.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What a base was when it was loaded."""

    digest: str
    """SHA-256 over the names, dtypes, shapes and digests of all tensors, hexadecimal."""
    tensors: Mapping[str, str]
    """Digest of each tensor by its name in the model."""

    def mismatches(self, model: nn.Module) -> list[str]:
        """Names of the tensors of `model` that differ from the ones fingerprinted; reads all of them."""
        now = tensor_digests(model)
        return sorted(name for name in self.tensors.keys() | now.keys() if self.tensors.get(name) != now.get(name))


def fingerprint(model: nn.Module) -> Fingerprint:
    """Reads every parameter and every buffer that a checkpoint would hold."""
    tensors = tensor_digests(model)
    lines = "\n".join(f"{name} {tensors[name]}" for name in sorted(tensors))
    return Fingerprint(digest=hashlib.sha256(lines.encode()).hexdigest(), tensors=tensors)


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """Digest of each parameter and saved buffer; tensors that share memory are read once, under their first name."""
    seen: set[tuple[int, torch.Size]] = set()
    digests = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in seen:
            seen.add(key)
            digests[name] = tensor_digest(tensor.detach())
    return digests


def tensor_digest(tensor: Tensor) -> str:
    """Dtype, shape and XXH3-128 of the tensor's bytes."""
    data = tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data
    return f"{tensor.dtype}{list(tensor.shape)}:{xxhash.xxh3_128_hexdigest(data)}"
