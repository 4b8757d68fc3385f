"""The one object a server holds: it loads adapters onto a base, folds them in and out, and routes rows.

The only object that changes weights. Not thread-safe: one thread owns the model, and calls nothing here while a
forward pass runs, except from inside `routed`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafold_adapters.binding import BoundAdapter, bind
from lorafold_adapters.checkpoint import Checkpoint, read_checkpoint
from lorafold_adapters.checksum import checksum
from lorafold_adapters.compose import Composition
from lorafold_adapters.composed import Composed, compose
from lorafold_adapters.errors import (
    AdapterInUse,
    AdapterNotLoaded,
    AdapterUnsupported,
    BaseCorrupt,
    DeviceFull,
    RoutingMismatch,
)
from lorafold_adapters.fidelity import Fidelity
from lorafold_adapters.fold import State, Weights
from lorafold_adapters.gate import MAX_DELTA_ERROR, FoldGate
from lorafold_adapters.identity import Fingerprint, cast_digest, tensor_digest
from lorafold_adapters.identity import fingerprint as fingerprint_of
from lorafold_adapters.kernels import Kernels
from lorafold_adapters.merged import Merged
from lorafold_adapters.paths import AdapterPath, path_of
from lorafold_adapters.quantised import dequantised, keep_as_loaded, quantised_modules, take_over
from lorafold_adapters.router import STACK_BYTES, Router
from lorafold_adapters.routes import route_of, unrouted, with_routes
from lorafold_adapters.stand_ins import ByStorage, FoldOptions, Provenance, StandIns
from lorafold_adapters.static_routing import StaticRouting
from lorafold_adapters.undo import Undo
from lorafold_adapters.undo_kinds import UndoKind, make_undo
from lorafold_adapters.updates import Pristine, Route


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldState:
    """What is in the weights now."""

    folded: str | None
    """Name of the folded adapter; None: the weights are the base's."""
    generation: int
    """Grows whenever weights change."""
    dirty: bool
    """True if a change was interrupted or the base could not be given back: nothing may run on the weights."""
    undo_bytes: int
    """Memory that is held to give the base back, dense copies of quantised weights included."""
    provenance: Provenance | None
    """What a fold into a quantised base starts from; None where no weight is quantised."""


class AdapterManager:
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
        kernels: Kernels | None = None,
    ) -> None:
        """Takes the model as it is now for the base.

        `quantised`: how to fold where the base is quantised. `stack_bytes`: memory for copies of the adapters that
        share a batch of few tokens each; beyond it they run one by one. `kernels`: for such batches, in place of what
        the device has.
        `undo`: how the base is kept; see `undo.make_undo`. `source`: the folder of the base's safetensors files, which
        is the one that the model was loaded from unless given. `fingerprint`: of the base, if it is known already.
        """
        self._model = model
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._router = Router(model, model.get_output_embeddings(), stack_bytes=stack_bytes, kernels=kernels)
        keep_as_loaded(model)
        self._quantised = quantised_modules(model)
        self._fold_options = quantised or FoldOptions()
        folder = Path(source or model.name_or_path or "/dev/null")
        self._weights = Weights(model, partial(self._make_undo, undo, folder if folder.is_dir() else None), checksum)
        self._adapters: dict[str, BoundAdapter] = {}
        self._folded: str | None = None
        self._generation = 0
        self.gate = FoldGate(self._weights, max_delta_error, self._coarse())
        """Says which adapters may be folded, and what a fold keeps of them."""
        self._fingerprint = fingerprint or fingerprint_of(model)
        on_cpu = model.device.type == "cpu"
        self._weights.keep_checksums(self._fingerprint.tensors if on_cpu else {})

    @property
    def model(self) -> PreTrainedModel:
        """The model that adapters are on."""
        return self._model

    @property
    def base(self) -> Fingerprint:
        """Content of the base as it was when the manager was made."""
        return self._fingerprint

    @property
    def stack_bytes(self) -> int:
        """Memory that copies for batches of several adapters take now."""
        return self._router.stack_bytes

    @property
    def quantised(self) -> bool:
        """True if some of the base's weights are: then folds put other tensors in front of them."""
        return bool(self._quantised)

    def base_as(self, dtype: str) -> str:
        """The base's digest with all weights cast to `dtype`, whatever is folded now; reads every weight.

        Raises BaseCorrupt if one is not what was loaded.
        """
        return cast_digest(self._model, dtype, self._stored)

    @property
    def fold_state(self) -> FoldState:
        """Which adapter is in the weights now."""
        return FoldState(
            folded=self._in_weights(),
            generation=self._generation,
            dirty=self._dirty(),
            undo_bytes=self._weights.undo_bytes,
            provenance=self._fold_options.provenance if self._quantised else None,
        )

    @property
    def adapters(self) -> dict[str, BoundAdapter]:
        """The loaded adapters by name; a copy."""
        return dict(self._adapters)

    def bind(self, adapter: str | Path | Checkpoint) -> BoundAdapter:
        """Reads and checks an adapter against this base, without changing anything. Any thread may call it.

        Raises a subclass of AdapterError that says what is wrong and what to do.
        """
        checkpoint = adapter if isinstance(adapter, Checkpoint) else read_checkpoint(adapter)
        return bind(checkpoint, self._model, self._is_base)

    def compose(self, parts: Sequence[tuple[BoundAdapter, float]], spec: Composition) -> BoundAdapter:
        """One adapter out of several, each with its weight. Any thread may call it. Raises CompositionInvalid."""
        return compose(parts, spec, self._model)

    @torch.no_grad()
    def route(self, bound: BoundAdapter, module_name: str) -> Route:
        """The form beside the weights that `routes.unrouted(bound)` asks for at one module. Raises DeviceFull."""
        update = bound.updates[module_name].to(self._model.device)
        assert isinstance(update, Composed)
        try:
            return route_of(update, self._modules[module_name], self._pristine_of(module_name))
        except torch.OutOfMemoryError as error:
            raise DeviceFull(f"the device's memory does not suffice to compose '{module_name}'") from error

    def with_routes(self, bound: BoundAdapter, routes: Mapping[str, Route]) -> BoundAdapter:
        """The adapter with those forms; it refuses to be routed if they are off by more than `max_delta_error`."""
        return with_routes(bound, routes, self.gate.max_delta_error)

    def route_error(self, name: str) -> float | None:
        """How far the low-rank form of a composition is off; None if everything in it is exact."""
        return self._known(name).route_error

    @torch.no_grad()
    def load(self, name: str, adapter: str | Path | Checkpoint | BoundAdapter) -> BoundAdapter:
        """Makes `adapter` known as `name`, replacing one of that name that is not folded.

        Raises a subclass of AdapterError, AdapterInUse, or DeviceFull.
        """
        bound = adapter if isinstance(adapter, BoundAdapter) else self.bind(adapter)
        bound = self.with_routes(bound, {module: self.route(bound, module) for module in unrouted(bound)})
        try:
            bound = bound.to(self._model.device)
            routable = bound.updates if bound.route_refusal is None else ()
            paths = {module: self._path(bound, module) for module in routable}
        except torch.OutOfMemoryError as error:
            raise DeviceFull(f"the device's memory does not hold adapter '{name}': drop others first") from error
        if name in self._adapters:
            self.drop(name)
        try:
            self._router.add(name, {self._modules[module]: path for module, path in paths.items()})
        except torch.OutOfMemoryError as error:
            raise DeviceFull(f"the device's memory does not hold adapter '{name}': drop others first") from error
        self._adapters[name] = bound
        return bound

    def drop(self, name: str) -> None:
        """Forgets an adapter and frees its memory. Raises AdapterNotLoaded or AdapterInUse."""
        self._known(name)
        if name == self._in_weights() or self._router.active:
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
        self._refuse_dirty()
        if name == self._in_weights():
            return 0
        self.gate.check(bound)
        self._weights.reserve(bound)
        self._folded, self._generation = None, self._generation + 1
        written = self._weights.fold(bound)
        self._folded = name
        return written

    def unmerge_adapter(self) -> bool:
        """Gives the base back bit for bit; False if nothing was folded. Raises BaseCorrupt if it cannot.

        May be called again after BaseCorrupt; `reload` is the other way out.
        """
        self._refuse_while_routed()
        if self._weights.state is State.BASE:
            return False
        self._generation += 1
        self._weights.restore()
        self._folded = None
        return True

    def verify_base(self) -> list[str]:
        """Names of the tensors that are not what was loaded; none if all is well. Reads every weight.

        Only while nothing is folded: raises AdapterInUse otherwise.
        """
        self._refuse_dirty()
        if self._in_weights() is not None:
            raise AdapterInUse(f"adapter '{self._folded}' is folded: call unmerge_adapter() first")
        return self._fingerprint.mismatches(self._model)

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
        self._folded, self._generation = None, self._generation + 1
        take_over(self._model, fresh)
        self._weights.reload(dict(fresh.named_parameters(remove_duplicate=False)))
        self.gate.forget()
        for name, bound in self.adapters.items():
            self.load(name, replace(bound, routes={}))  # What was computed from the damaged base is computed again.

    def extra_bytes(self, bound: BoundAdapter) -> int:
        """Memory that folding an adapter takes where the base is quantised: copies of the weights it changes."""
        return 0 if bound.fold_refusal else self._weights.extra_bytes(bound)

    def merged(self, bound: BoundAdapter) -> Merged:
        """Reads tensors as they would be with `bound` folded, whatever is folded now; changes nothing.

        Raises BaseCorrupt, or DeviceFull.
        """
        self._refuse_dirty()
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

    def _path(self, bound: BoundAdapter, module_name: str) -> AdapterPath:
        route = bound.routes.get(module_name)
        update = bound.updates[module_name] if route is None else route.update
        return path_of(update, self._modules[module_name], self._pristine_of(module_name), self._model.dtype)

    def _pristine_of(self, module_name: str) -> Pristine:
        return lambda key: self._computed_with(f"{module_name}.{key}")

    def _make_undo(self, kind: UndoKind, folder: Path | None, live: Mapping[str, Tensor]) -> Undo:
        others = make_undo(kind, live, folder)
        if not self._quantised:
            return others
        stand_ins = StandIns(self._quantised, self._model.dtype, self._fold_options, folder)
        return ByStorage(stand_ins, self._quantised, others)

    def _computed_with(self, name: str) -> Tensor:
        """The values of a parameter that the base computes with while nothing is folded."""
        return dequantised(self._quantised[name]) if name in self._quantised else self._weights.pristine(name)

    def _stored(self, name: str) -> Tensor:
        """A parameter as a checkpoint of the base would hold it."""
        stored = self._weights.live(name) if name in self._quantised else self._weights.pristine(name)
        if not self._weights.is_base(name, stored):
            raise BaseCorrupt(f"'{name}' is not what was loaded: load the base again")
        return stored

    def _coarse(self) -> str:
        requantised = self._quantised and self._fold_options.requantise
        return "requantised weights" if requantised else f"{self._model.dtype} weights"

    def _known(self, name: str) -> BoundAdapter:
        if name not in self._adapters:
            raise AdapterNotLoaded(f"no adapter '{name}' is loaded: load() it first")
        return self._adapters[name]

    def _is_base(self, name: str, tensor: Tensor) -> bool:
        like, first = self._weights.live(name), self._weights.first_name(name)
        if tensor.shape != like.shape:
            return False
        return tensor_digest(tensor.to(like.dtype)) == self._fingerprint.tensors.get(first)

    def _in_weights(self) -> str | None:
        """The folded adapter; right whichever line an exception struck last."""
        return self._folded if self._weights.state is State.FOLDED else None

    def _dirty(self) -> bool:
        """True if it is not known what is in the weights, or which adapter."""
        return self._weights.state is State.DIRTY or (self._weights.state is State.FOLDED and self._folded is None)

    def _refuse_dirty(self) -> None:
        if self._dirty():
            raise BaseCorrupt(
                "the weights are neither the base's nor an adapter's: unmerge_adapter() or reload() first"
            )

    def _refuse_unroutable(self, names: set[str]) -> None:
        self._refuse_dirty()
        if self._in_weights() is not None:
            raise AdapterInUse(f"adapter '{self._folded}' is folded: call unmerge_adapter() before routing rows")
        for name in names:
            if (refusal := self._known(name).route_refusal) is not None:
                raise AdapterUnsupported(f"adapter '{name}' cannot be routed: {refusal}; fold it")

    def _refuse_while_routed(self) -> None:
        if self._router.active:
            raise AdapterInUse("rows are routed now: leave routed() first")
