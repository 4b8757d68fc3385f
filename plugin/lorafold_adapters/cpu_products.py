"""Products of few tokens with one adapter's factors on a CPU: what is large, what is small, and what large ones run on.

BLAS is made for large matrices: for a few tokens it copies a factor before it multiplies by it, on one thread. oneDNN,
which torch brings along, reads factors as they lie. For one or two tokens BLAS is as fast, if it is asked for several
products at once. Where that pays was measured in fp32 on two cores, within decode steps: caches hold no factor then.

Shapes in the names: T tokens, I in-features, R rank, O out-features, P parts of a sum.
"""

import functools

import torch
from torch import Tensor

SMALL_BYTES = 192 * 1024
"""Of B, up to which one thread of a CPU is as fast as all for `SMALL_TOKENS` (measured, 2 cores): it need not wait for
others, whom the system may have sent elsewhere."""
SMALL_TOKENS = 16
LARGE = 1024 * 1024
"""Bytes of a factor from which on other means than BLAS pay."""
FEW_TOKENS = 128
"""Up to which they do."""
PARTS = 8
"""Parts of the in-features whose products run beside each other, and are summed."""


@functools.cache
def has_means() -> bool:
    """True if this torch has oneDNN for fp32, and the BLAS that it was compared with."""
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        with torch.inference_mode():
            product(torch.zeros(3, 8), torch.zeros(8, 8))
    except (RuntimeError, AttributeError):
        return False
    return True


def is_small(a_IR: Tensor, b_RO: Tensor) -> bool:
    """True if one thread does as well as all while tokens are few."""
    return b_RO.device.type == "cpu" and b_RO.nbytes <= SMALL_BYTES and a_IR.nbytes < LARGE


def is_large(factor: Tensor) -> bool:
    """True if a factor is to be multiplied by what is here."""
    on_cpu = factor.device.type == "cpu" and factor.dtype == torch.float32
    return on_cpu and factor.nbytes >= LARGE and has_means()


def shrunk(inputs_TI: Tensor, a_IR: Tensor) -> Tensor:
    """`inputs_TI @ a_IR`, of a large A."""
    tokens, features = inputs_TI.shape
    if tokens > 2:
        return product(inputs_TI, a_IR)
    if features % PARTS:
        return torch.mm(inputs_TI, a_IR)
    parts_PTI = inputs_TI.reshape(tokens, PARTS, features // PARTS).transpose(0, 1)
    return torch.bmm(parts_PTI, a_IR.view(PARTS, features // PARTS, -1)).sum(0)


def add_expanded(outputs_TO: Tensor, products_TR: Tensor, b_RO: Tensor) -> None:
    """Adds `products_TR @ b_RO` to the outputs, of a large B."""
    if 2 < products_TR.shape[0] <= FEW_TOKENS:
        outputs_TO.add_(product(products_TR, b_RO))
    else:
        outputs_TO.addmm_(products_TR, b_RO)


def product(inputs_TI: Tensor, factor_IO: Tensor) -> Tensor:
    """By oneDNN, of which autograd knows nothing, and of which a compiler wants weights that never change."""
    if inputs_TI.shape[0] > FEW_TOKENS or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.mm(inputs_TI, factor_IO)
    outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs_TI, factor_IO.T, None, "none", [], "")
    return outputs
