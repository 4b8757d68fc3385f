"""Knows a base by its content: a digest per tensor and one fingerprint over all of them.

XXH3 (128 bit) tells apart what chance or a mistake would mix up, at memory speed; it is no defence against an attacker.
Digests depend on names, dtypes, shapes and bytes alone: they are the same in every process and on every device.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
import xxhash
from torch import Tensor, nn

CASTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that checkpoints are converted between."""
CHUNK = 1 << 20
"""Elements that are cast and hashed at once: few enough to stay in the processor's cache."""
# Hashing lets go of the GIL. Two threads on two cores read 1.6 times as fast as one; four saturate most memories.
THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What a base was when it was loaded."""

    digest: str
    """SHA-256 over the names, dtypes, shapes and digests of all tensors, hexadecimal."""
    dtype: str
    """The dtype of most of its weights, e.g. `bfloat16`."""
    tensors: Mapping[str, str]
    """Digest of each tensor by its name in the model."""
    casts: Mapping[str, str] = field(default_factory=dict)
    """Digests of the same content with all weights cast to one dtype, by dtype, as far as they are known.

    Of a base that was quantised when it was loaded: of the checkpoint, before that.
    """

    def mismatches(self, model: nn.Module) -> list[str]:
        """Names of the tensors of `model` that differ from the ones fingerprinted; reads all of them."""
        now = tensor_digests(model)
        return sorted(name for name in self.tensors.keys() | now.keys() if self.tensors.get(name) != now.get(name))


def fingerprint(model: nn.Module) -> Fingerprint:
    """Reads every parameter and every buffer that a checkpoint would hold."""
    tensors = tensor_digests(model)
    digest = digest_of(tensors)
    sizes: Counter[str] = Counter()
    for tensor in saved_tensors(model).values():
        if tensor.is_floating_point():
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    dtype = sizes.most_common(1)[0][0] if sizes else ""
    castable = sizes.keys() & CASTS.keys()
    return Fingerprint(
        digest=digest, dtype=dtype, tensors=tensors, casts={dtype: digest} if castable == {dtype} else {}
    )


def quantised_from(base: Fingerprint, checkpoint: Fingerprint) -> Fingerprint:
    """The fingerprint of a quantised base that knows what it was quantised from, so that stamps can be compared."""
    return replace(base, dtype=checkpoint.dtype, casts=checkpoint.casts)


def cast_digest(model: nn.Module, dtype: str, parameter: Callable[[str], Tensor] | None = None) -> str:
    """The fingerprint's digest that `model` would have with all its weights cast to `dtype`, a key of `CASTS`.

    `parameter`, where given, is asked for each parameter by its name, instead of the model.
    """
    return digest_of(tensor_digests(model, CASTS[dtype], parameter))


def digest_of(tensors: Mapping[str, str]) -> str:
    """SHA-256 over the digests of tensors and their names, hexadecimal."""
    lines = "\n".join(f"{name} {tensors[name]}" for name in sorted(tensors))
    return hashlib.sha256(lines.encode()).hexdigest()


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter and saved buffer; those that share memory once, under their first name."""
    distinct: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        distinct.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), (name, tensor))
    return dict(distinct.values())


def tensor_digests(
    model: nn.Module, dtype: torch.dtype | None = None, parameter: Callable[[str], Tensor] | None = None
) -> dict[str, str]:
    """Digest of each tensor of `saved_tensors`, weights cast to `dtype` if that is given.

    `parameter` is only called on this thread, and what it returned is not used any more when it is called again.
    """
    saved = saved_tensors(model)

    def read(name: str) -> str:
        if parameter is None or not isinstance(saved[name], nn.Parameter):
            return tensor_digest(saved[name], dtype)
        return tensor_digest(parameter(name), dtype)

    if parameter is not None:
        return {name: read(name) for name in saved}
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(saved, pool.map(read, saved), strict=True))


def tensor_digest(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """Dtype, shape and XXH3-128 of the tensor's bytes, as `dtype` if it is a weight and that is given."""
    target = dtype if dtype is not None and tensor.dtype in CASTS.values() else tensor.dtype
    hasher = xxhash.xxh3_128()
    for chunk in torch.split(tensor.detach().contiguous().flatten(), CHUNK):
        hasher.update(chunk.cpu().to(target).view(torch.uint8).numpy().data)
    return f"{target}{list(tensor.shape)}:{hasher.hexdigest()}"
