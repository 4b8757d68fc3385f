"""Makes adapters ready for one base: reads, binds, composes, stages. Changes neither the model nor what is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lorafold_adapters.base_values import BaseValues
from lorafold_adapters.binding import BoundAdapter, bind
from lorafold_adapters.checkpoint import Checkpoint, read_checkpoint
from lorafold_adapters.compose import Composition
from lorafold_adapters.composed import Composed, compose
from lorafold_adapters.errors import DeviceFull
from lorafold_adapters.identity import Fingerprint
from lorafold_adapters.paths import AdapterPath, path_of
from lorafold_adapters.routes import route_of, unrouted, with_routes
from lorafold_adapters.sizes import path_bytes
from lorafold_adapters.staging import Staged, Stager, routed_updates
from lorafold_adapters.structures import Structures
from lorafold_adapters.updates import Route, Update


class Preparing:
    """The part of `AdapterManager` that changes nothing."""

    def __init__(self, model: PreTrainedModel, base: BaseValues, max_delta_error: float) -> None:
        self._model = model
        self._base = base
        self._max_delta_error = max_delta_error
        self._stager = Stager(model.device, model.dtype)
        self._structures = Structures(model)
        self._modules: dict[str, nn.Module] = dict(model.named_modules())

    @property
    def model(self) -> PreTrainedModel:
        """The model that adapters are on."""
        return self._model

    @property
    def base(self) -> Fingerprint:
        """Content of the base as it was when the manager was made."""
        return self._base.fingerprint

    @property
    def quantised(self) -> bool:
        """True if some of the base's weights are: then folds put other tensors in front of them."""
        return self._base.quantised

    def base_as(self, dtype: str) -> str:
        """The base's digest with all weights cast to `dtype`, whatever is folded now; reads every weight.

        Raises BaseCorrupt if one is not what was loaded.
        """
        return self._base.cast_digest(dtype)

    def bind(self, adapter: str | Path | Checkpoint) -> BoundAdapter:
        """Reads and checks an adapter against this base, without changing anything. Any thread may call it.

        Raises a subclass of AdapterError that says what is wrong and what to do.
        """
        checkpoint = adapter if isinstance(adapter, Checkpoint) else read_checkpoint(adapter)
        return bind(checkpoint, self._model, self._base.is_base, self._structures)

    def compose(self, parts: Sequence[tuple[BoundAdapter, float]], spec: Composition) -> BoundAdapter:
        """One adapter out of several, each with its weight. Any thread may call it. Raises CompositionInvalid."""
        return compose(parts, spec, self._model)

    @torch.no_grad()
    def route(self, bound: BoundAdapter, module_name: str) -> Route:
        """The form beside the weights that `routes.unrouted(bound)` asks for at one module. Raises DeviceFull."""
        update = bound.updates[module_name].mapped(lambda tensor: tensor.to(self._model.device))
        assert isinstance(update, Composed)
        try:
            return route_of(update, self._modules[module_name], self._base.pristine_of(module_name))
        except torch.OutOfMemoryError as error:
            raise DeviceFull(f"the device's memory does not suffice to compose '{module_name}'") from error

    def with_routes(self, bound: BoundAdapter, routes: Mapping[str, Route]) -> BoundAdapter:
        """The adapter with those forms; it refuses to be routed if they are off by more than `max_delta_error`."""
        return with_routes(bound, routes, self._max_delta_error)

    def pinned(self, bound: BoundAdapter) -> BoundAdapter:
        """A copy in pinned host memory, which `stage` reads fastest; on a CPU the adapter itself. Any thread."""
        return self._stager.pinned(bound)

    def device_bytes(self, bound: BoundAdapter) -> int:
        """Memory that the adapter takes while it is loaded, at most; on a CPU what it takes beside `bound.nbytes`."""
        own = 0 if self._model.device.type == "cpu" else sum(tensor.nbytes for tensor in bound.tensors())
        routed = routed_updates(bound).items()
        return own + sum(path_bytes(update, self._modules[name], self._model.dtype) for name, update in routed)

    def stage(self, adapter: str | Path | Checkpoint | BoundAdapter) -> Staged:
        """Brings an adapter to the device, all that can be done while the model runs; `load` does the rest.

        Any thread may call it. Raises a subclass of AdapterError, or DeviceFull; nothing is changed then.
        """
        bound = adapter if isinstance(adapter, BoundAdapter) else self.bind(adapter)
        try:
            return self._stager.stage(bound, self._modules)
        except torch.OutOfMemoryError as error:
            raise DeviceFull(
                f"the device's memory does not hold adapter {bound.digest[:12]}: drop others first"
            ) from error

    def extra_bytes(self, bound: BoundAdapter) -> int:
        """Memory that folding an adapter takes where the base is quantised: copies of the weights it changes."""
        return 0 if bound.fold_refusal else self._base.weights.extra_bytes(bound)

    def _completed(self, staged: Staged) -> tuple[BoundAdapter, dict[str, AdapterPath]]:
        """The adapter with the forms beside the weights that depend on these. Raises torch.OutOfMemoryError."""
        staged.wait()
        bound = staged.bound
        bound = self.with_routes(bound, {module: self.route(bound, module) for module in unrouted(bound)})
        paths = {
            name: staged.paths[name] if name in staged.paths else self._path(update, name)
            for name, update in routed_updates(bound).items()
        }
        return bound, paths

    def _path(self, update: Update, module_name: str) -> AdapterPath:
        return path_of(update, self._modules[module_name], self._base.pristine_of(module_name), self._model.dtype)
