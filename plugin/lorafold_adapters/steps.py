"""What a site runs while rows are routed: its module's own forward, then the adapters of the rows.

Shapes in the names: N tokens of a batch, O out-features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafold_adapters.cpu_products import SMALL_BYTES, SMALL_TOKENS
from lorafold_adapters.errors import RoutingMismatch
from lorafold_adapters.lone import LoneWork
from lorafold_adapters.parts import Expand, Other
from lorafold_adapters.sharing import Shared, Sightings
from lorafold_adapters.two_path import Site


@dataclass(slots=True)
class Batch:
    """The batch of the forward pass that runs now."""

    tokens: int | None = None
    """None until it is known."""
    active: bool = False
    """True while rows are routed."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one site does for one composition of the batch."""

    shared: Shared | None
    expands: tuple[Expand | None, ...]
    """One for each product of `shared`; None where the adapter does not change this site."""
    others: tuple[Other, ...]
    small: bool
    """True if it is done by one thread, where tokens are few."""

    @classmethod
    def of(
        cls, shared: Shared | None, expands: Sequence[Expand | None], others: Sequence[Other], *, on_cpu: bool
    ) -> "Work":
        """Without what has nothing to do."""
        read = sum(expand.nbytes for expand in expands if expand is not None)
        small = on_cpu and not others and read <= SMALL_BYTES
        return cls(shared if read else None, tuple(expands), tuple(others), small)

    def __call__(self, inputs: Tensor, outputs_NO: Tensor, tokens_per_unit: int) -> None:
        """Writes the adapted outputs over the base's."""
        if self.shared is not None:
            for expand, products in zip(self.expands, self.shared.of(inputs, tokens_per_unit), strict=True):
                if expand is not None:
                    expand(products, outputs_NO, tokens_per_unit)
        if self.others:
            feature_axes = 0 if inputs.dtype in (torch.int32, torch.int64) else 1
            inputs_N = inputs.reshape(outputs_NO.shape[0], *inputs.shape[inputs.dim() - feature_axes :])
            for other in self.others:
                other(inputs_N, outputs_NO, tokens_per_unit)


@dataclass(frozen=True, kw_only=True, slots=True)
class EagerStep:
    """A site's forward for one composition of the batch."""

    site: Site
    batch: Batch
    sightings: Sightings
    units: int
    rowwise: Work | LoneWork
    """For any number of tokens per unit."""
    grouped: Work | None
    """For one token per unit, if that is another way."""

    def forward(self, inputs: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """See `Step`. Raises RoutingMismatch if the module works on something else than the routed rows."""
        site = self.site
        if site.own is None:
            outputs = type(site.module).forward(site.module, inputs, *args, **kwargs).contiguous()
        else:
            outputs = site.own(inputs, *args, **kwargs).contiguous()
        outputs_NO = outputs.view(-1, outputs.shape[-1])
        tokens, units = outputs_NO.shape[0], self.units
        if tokens != self.batch.tokens or tokens % units:
            self.check(tokens)
        if self.sightings.open:
            self.sightings.saw(inputs, site)
        work = self.rowwise if self.grouped is None or tokens != units else self.grouped
        if work.small and tokens <= SMALL_TOKENS:
            on_one_thread(work, inputs, outputs_NO, tokens // units)
        else:
            work(inputs, outputs_NO, tokens // units)
        return outputs

    def check(self, tokens: int) -> None:
        """Raises RoutingMismatch unless the rows can be told apart."""
        expected = None if self.site.is_head else self.batch.tokens
        if tokens % self.units or expected not in (None, tokens):
            raise RoutingMismatch(
                f"a layer got {tokens} tokens of a batch of {expected or self.units}: it does not work row by row; "
                "fold the adapter, or run one row at a time"
            )


def on_one_thread(work: Work | LoneWork, inputs: Tensor, outputs_NO: Tensor, tokens_per_unit: int) -> None:
    """Does the work without other threads; changing their number takes less than a microsecond."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        work(inputs, outputs_NO, tokens_per_unit)
    finally:
        torch.set_num_threads(threads)
