"""Breaks one tensor operation of whatever runs inside, once: an exception before or after it, or a NaN in a product."""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS = {"mm", "matmul", "__matmul__", "addmm", "addmm_", "bmm", "baddbmm", "einsum", "linear"}
"""What makes a low-rank delta."""
PLUMBING = {"__get__", "_set_grad_enabled"}
"""Properties, such as a shape, and the switches of torch.no_grad: nothing that computes."""


class Kind(Enum):
    """How an operation breaks."""

    RAISES_BEFORE = "raises_before"
    RAISES_AFTER = "raises_after"
    """Its result is written, then it raises: for a copy into a weight, too late."""
    NAN = "nan"


class Fault(TorchFunctionMode):
    """Counts operations on tensors; breaks the one whose number is `at`, counting only products for a NaN."""

    def __init__(self, kind: Kind | None = None, at: int = 0) -> None:
        super().__init__()
        self.kind = kind
        self.struck = False
        self.operations = 0
        self.products = 0
        self._at = at

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Runs `func`, or breaks it."""
        name = getattr(func, "__name__", "")
        if name in PLUMBING:
            return func(*args, **(kwargs or {}))
        strikes = self._strikes(name in PRODUCTS)
        self.struck = self.struck or strikes
        if strikes and self.kind is Kind.RAISES_BEFORE:
            raise RuntimeError(f"injected before {name}")
        result = func(*args, **(kwargs or {}))
        if strikes and self.kind is Kind.RAISES_AFTER:
            raise RuntimeError(f"injected after {name}")
        if strikes:
            broken = cast(Tensor, result)
            broken[(0,) * broken.dim()] = torch.nan
        return result

    def _strikes(self, product: bool) -> bool:
        """Counts, and says whether this operation is the one."""
        number = self.products if self.kind is Kind.NAN else self.operations
        counted = product or self.kind is not Kind.NAN
        self.operations += 1
        self.products += product
        return self.kind is not None and not self.struck and counted and number == self._at
