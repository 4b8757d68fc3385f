"""The one object a server holds: it loads adapters onto a base, folds them in and out, and routes rows.

The only object that changes weights. Not thread-safe: one thread owns the model, and calls nothing here while a
forward pass runs, except from inside `routed`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lorafold_adapters.base_values import BaseValues
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.checkpoint import Checkpoint
from lorafold_adapters.errors import (
    AdapterInUse,
    AdapterNotLoaded,
    AdapterUnsupported,
    DeviceFull,
    RoutingMismatch,
)
from lorafold_adapters.fidelity import Fidelity
from lorafold_adapters.folded import Folded, FoldState
from lorafold_adapters.gate import MAX_DELTA_ERROR, FoldGate
from lorafold_adapters.identity import Fingerprint
from lorafold_adapters.kernels import Kernels
from lorafold_adapters.merged import Merged
from lorafold_adapters.preparing import Preparing
from lorafold_adapters.router import STACK_BYTES, Router
from lorafold_adapters.slot_groups import SLOTS
from lorafold_adapters.staging import Staged
from lorafold_adapters.stand_ins import FoldOptions
from lorafold_adapters.static_routing import StaticRouting
from lorafold_adapters.undo_kinds import UndoKind


class AdapterManager(Preparing):
    """Adapters on one transformers model, folded (`merge_adapter`) or two-path (`routed`).

    >>> manager = AdapterManager(model)
    >>> manager.load("sql", "adapters/sql")
    >>> manager.merge_adapter("sql")  # model(...) now is the base plus sql, at the base's cost
    >>> manager.unmerge_adapter()  # the base again, bit for bit
    >>> with manager.routed(["sql", None]):  # two rows of one batch: sql, and the base
    ...     model(input_ids)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        undo: UndoKind = "auto",
        source: str | Path | None = None,
        fingerprint: Fingerprint | None = None,
        max_delta_error: float = MAX_DELTA_ERROR,
        quantised: FoldOptions | None = None,
        stack_bytes: int = STACK_BYTES,
        device_slots: int = SLOTS,
        kernels: Kernels | None = None,
    ) -> None:
        """Takes the model as it is now for the base.

        `quantised`: how to fold where the base is quantised. `stack_bytes`: memory for copies of the adapters that
        share a batch of few tokens each; beyond it they run one by one. `device_slots`: how many adapters
        kernels and CUDA graphs can tell apart; others are routed one by one. `kernels`: for such batches, in place of
        what the device has.
        `undo`: how the base is kept; see `undo.make_undo`. `source`: the folder of the base's safetensors files, which
        is the one that the model was loaded from unless given. `fingerprint`: of the base, if it is known already.
        """
        self._router = Router(
            model, model.get_output_embeddings(), stack_bytes=stack_bytes, slots=device_slots, kernels=kernels
        )
        options = quantised or FoldOptions()
        base = BaseValues(model, undo=undo, source=source, fingerprint=fingerprint, options=options)
        super().__init__(model, base, max_delta_error)
        self._weights = base.weights
        self._folded = Folded(base)
        self._adapters: dict[str, BoundAdapter] = {}
        self._rehearsing = False
        self.gate = FoldGate(self._weights, max_delta_error, base.coarse)
        """Says which adapters may be folded, and what a fold keeps of them."""

    @property
    def stack_bytes(self) -> int:
        """Memory that copies for batches of several adapters take now."""
        return self._router.stack_bytes

    @property
    def fold_state(self) -> FoldState:
        """Which adapter is in the weights now."""
        return self._folded.state

    def take_phases(self) -> dict[str, float]:
        """Seconds of each part of the changes since the last call: `write`, `check`, `restore`, `compare`."""
        return self._weights.phases.take()

    @property
    def adapters(self) -> dict[str, BoundAdapter]:
        """The loaded adapters by name; a copy."""
        return dict(self._adapters)

    def route_error(self, name: str) -> float | None:
        """How far the low-rank form of a composition is off; None if everything in it is exact."""
        return self._known(name).route_error

    @torch.no_grad()
    def load(self, name: str, adapter: str | Path | Checkpoint | BoundAdapter | Staged) -> BoundAdapter:
        """Makes `adapter` known as `name`, replacing one of that name that is not folded.

        Of a staged one only what must happen between two steps is left to do. Raises a subclass of AdapterError,
        AdapterInUse, or DeviceFull.
        """
        staged = adapter if isinstance(adapter, Staged) else self.stage(adapter)
        try:
            bound, paths = self._completed(staged)
            if name in self._adapters:
                self.drop(name)
            self._router.add(name, {self._modules[module]: path for module, path in paths.items()})
        except torch.OutOfMemoryError as error:
            raise DeviceFull(f"the device's memory does not hold adapter '{name}': drop others first") from error
        self._adapters[name] = bound
        return bound

    def drop(self, name: str) -> None:
        """Forgets an adapter and frees its memory. Raises AdapterNotLoaded or AdapterInUse."""
        self._known(name)
        if name == self._folded.name or self._router.active:
            raise AdapterInUse(f"adapter '{name}' is in use: call unmerge_adapter() and leave routed() first")
        del self._adapters[name]
        self._router.drop(name)

    def merge_adapter(self, name: str) -> int:
        """Folds adapter `name` into the weights, in place of the one that is folded now; returns the bytes written.

        Raises AdapterNotLoaded, AdapterUnsupported if this adapter cannot be folded, DeltaLost if too little of it
        would survive, DeviceFull if a copy of quantised weights finds no memory (nothing is changed by these four),
        FoldFailed (the base was given back bit for bit) or BaseCorrupt (it could not be).
        """
        bound = self._known(name)
        self._refuse_while_routed()
        self._folded.refuse_dirty()
        if name == self._folded.name:
            return 0
        self.gate.check(bound)
        self._weights.reserve(bound)
        return self._folded.fold(name, bound)

    def unmerge_adapter(self) -> bool:
        """Gives the base back bit for bit; False if nothing was folded. Raises BaseCorrupt if it cannot.

        May be called again after BaseCorrupt; `reload` is the other way out.
        """
        self._refuse_while_routed()
        return self._folded.restore()

    def verify_base(self) -> list[str]:
        """Names of the tensors that are not what was loaded; none if all is well. Reads every weight.

        Only while nothing is folded: raises AdapterInUse otherwise.
        """
        self._folded.refuse_folded("call unmerge_adapter() first")
        return self.base.mismatches(self._model)

    @contextmanager
    def routed(self, body: Sequence[str | None], head: Sequence[str | None] | None = None) -> Iterator[None]:
        """Inside, `model(...)` runs row i of the batch with adapter `body[i]`, or with the base where that is None.

        Where rows are packed into one, `body` has an entry per token, and `head` one per position that reaches the
        output embedding. Raises AdapterNotLoaded, or AdapterInUse while an adapter is folded; `model(...)` raises
        RoutingMismatch for a batch of another size.
        """
        if not body:
            raise RoutingMismatch("no rows were routed: name an adapter, or None, for each")
        self._refuse_while_routed()
        self._refuse_unroutable({name for name in (*body, *(head or ())) if name is not None})
        with self._router.routed(body, head):
            yield

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, rows may be routed while an adapter is folded: for what a step takes, not for what it computes.

        Raises AdapterInUse if an adapter is folded into a quantised base, whose steps then take another time.
        """
        if self.quantised:
            self._folded.refuse_folded("call unmerge_adapter() before steps of the quantised base are timed")
        self._folded.refuse_dirty()
        self._rehearsing = True
        try:
            yield
        finally:
            self._rehearsing = False

    def static_routing(self, capacity: int, max_rank: int | None = None, *, overlap: bool = False) -> StaticRouting:
        """A routing of up to `capacity` rows that a CUDA graph can capture; it goes on as adapters come and go.

        It covers the modules that the adapters loaded now change, and ranks up to `max_rank`, which is the largest one
        now unless given. With `overlap`, products with A run on a stream of their own, beside the base's. Siblings that
        share an input share work if a forward inside `routed` has shown them before. Raises AdapterNotLoaded if no
        adapter has a low-rank product.
        """
        return self._router.static(capacity, max_rank, self._refuse_unroutable, overlap=overlap)

    def graphable(self, adapters: Sequence[str | None]) -> bool:
        """True if all of them are nothing but low-rank products: others run inside `routed` only."""
        return all(self._router.graphable(str(name)) for name in {*adapters} - {None})

    def reload(self, fresh: nn.Module) -> None:
        """Makes the weights what `fresh`, the same base newly loaded, holds. Raises BaseCorrupt if that differs too.

        The way out of a dirty state and of a base that `verify_base` finds changed.
        """
        self._refuse_while_routed()
        self._folded.reload(fresh)
        self.gate.forget()
        for name, bound in self.adapters.items():
            self.load(name, replace(bound, routes={}))  # What was computed from the damaged base is computed again.

    def merged(self, bound: BoundAdapter) -> Merged:
        """Reads tensors as they would be with `bound` folded, whatever is folded now; changes nothing.

        Raises BaseCorrupt, or DeviceFull.
        """
        self._folded.refuse_dirty()
        try:
            return Merged(self._model, self._weights, bound.to(self._model.device))
        except torch.OutOfMemoryError as error:
            raise DeviceFull(
                f"the device's memory does not hold adapter {bound.digest[:12]}: drop others first"
            ) from error

    def fidelity(self, name: str) -> Fidelity:
        """How much of adapter `name` a fold keeps; measured once, in about the time of three folds."""
        return self.gate.fidelity(self._known(name))

    def detach(self) -> None:
        """Gives the base back and leaves the model as if it had never been attached. Raises BaseCorrupt."""
        self.unmerge_adapter()
        for name in list(self._adapters):
            self.drop(name)

    def _known(self, name: str) -> BoundAdapter:
        if name not in self._adapters:
            raise AdapterNotLoaded(f"no adapter '{name}' is loaded: load() it first")
        return self._adapters[name]

    def _refuse_unroutable(self, names: set[str]) -> None:
        if not self._rehearsing:
            self._folded.refuse_folded("call unmerge_adapter() before routing rows")
        for name in names:
            if (refusal := self._known(name).route_refusal) is not None:
                raise AdapterUnsupported(f"adapter '{name}' cannot be routed: {refusal}; fold it")

    def _refuse_while_routed(self) -> None:
        if self._router.active:
            raise AdapterInUse("rows are routed now: leave routed() first")
