"""Binds a checkpoint to a base: for each module of the base, what the adapter does to it.

`structures.py` says where each tensor belongs; this file refuses whatever did not find its place. Reads the live
model's shapes only.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafold_adapters.checkpoint import Checkpoint
from lorafold_adapters.errors import AdapterCorrupt, AdapterUnsupported
from lorafold_adapters.leftovers import IsBase, base_name, placed_tensors, refuse_leftovers, targeted_modules
from lorafold_adapters.modes import fold_refusal, quantised_refusal, route_refusal, runs_row_by_row
from lorafold_adapters.quantised import is_served_unmerged, other_kind
from lorafold_adapters.structures import Structures
from lorafold_adapters.updates import LowRank, Replaced, Route, ThroughPeft, Update


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundAdapter:
    """An adapter with every tensor at its place in the base."""

    digest: str
    """SHA-256, hexadecimal, of everything that decides what the adapter does: its identity."""
    kind: str
    """For people, e.g. `LORA+dora`."""
    updates: Mapping[str, Update]
    """By the name of the module in the base."""
    targeted: int
    """How many modules the adapter's files have tensors for."""
    bound: int
    """How many of those have a place in the base; all of them, or else binding fails."""
    fold_refusal: str | None
    """Why the adapter cannot be folded into this base; None if it can."""
    route_refusal: str | None
    """Why the adapter cannot run beside the weights; None if it can."""

    routes: Mapping[str, Route] = field(default_factory=dict)
    """By module: what runs beside the weights where that is not the update itself."""

    @property
    def route_error(self) -> float | None:
        """How far the approximated deltas beside the weights are off, all together; None if none is approximated."""
        squares = sum(route.squares for route in self.routes.values())
        lost = sum(route.lost_squares for route in self.routes.values())
        return math.sqrt(lost / squares) if squares > 0 else None

    @property
    def nbytes(self) -> int:
        """Memory that its tensors take where they are now; what shares memory counts once."""
        everything = [*self.tensors(), *(tensor for update in self.updates.values() for tensor in update.tensors())]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in everything}.values())

    def tensors(self) -> list[Tensor]:
        """Every tensor of it that moves from device to device, once; layers of PEFT keep theirs where they are."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.mapped(note)
        return found

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "BoundAdapter":
        """The same with what `function` makes of its tensors; what shares memory goes on doing so."""
        done: dict[object, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if key not in done:
                done[key] = function(tensor)
            return done[key]

        routes = {name: replace(route, update=route.update.mapped(once)) for name, route in self.routes.items()}
        return replace(
            self, updates={name: update.mapped(once) for name, update in self.updates.items()}, routes=routes
        )

    def to(self, device: torch.device) -> "BoundAdapter":
        """The same with its tensors on `device`."""
        return self.mapped(lambda tensor: tensor.to(device))


def bind(checkpoint: Checkpoint, model: PreTrainedModel, is_base: IsBase, structures: Structures) -> BoundAdapter:
    """Finds the module of `model` for every tensor of `checkpoint`; reads only the model's shapes.

    Any thread may call it. Raises BaseMismatch if names or shapes do not fit the base, AdapterCorrupt if the adapter
    contradicts its own configuration, AdapterUnsupported if it changes a kind of module that is not served.
    """
    updates = structures.updates_of(checkpoint)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    updates = with_biases(updates, checkpoint, parameters)
    modules = dict(model.named_modules())
    for name, update in updates.items():
        refuse_unserved_module(name, update, modules[name])
    refuse_leftovers(checkpoint, updates, parameters, is_base)
    unroutable = [name for name, update in updates.items() if not runs_row_by_row(name, update, modules[name], model)]
    methods = sorted({update.method for update in updates.values() if isinstance(update, ThroughPeft)})
    return BoundAdapter(
        digest=checkpoint.digest,
        kind=checkpoint.kind,
        updates=updates,
        targeted=len(targeted_modules(checkpoint, checkpoint.tensors)),
        bound=len(targeted_modules(checkpoint, placed_tensors(checkpoint, updates))),
        fold_refusal=quantised_refusal(updates, modules) or fold_refusal(updates, parameters),
        route_refusal=route_refusal(methods, unroutable),
    )


def with_biases(
    updates: Mapping[str, Update], checkpoint: Checkpoint, parameters: Mapping[str, Tensor]
) -> dict[str, Update]:
    """The updates, with the base's own biases that bias="all" or "lora_only" trained. Raises AdapterUnsupported."""
    result = dict(updates)
    bias = checkpoint.options.get("bias", "none")
    if bias == "none":
        return result
    saved = {base_name(name) for name in checkpoint.tensors}
    meant = {f"{name}.bias" for name in updates} if bias != "all" else parameters.keys()
    if missing := sorted(name for name in meant if name.endswith(".bias") and name in parameters and name not in saved):
        raise AdapterCorrupt(f"bias is '{bias}', and the adapter's files lack '{missing[0]}': copy it again")
    placed = {tensor.data_ptr() for update in updates.values() for tensor in update.tensors()}
    for tensor_name, tensor in checkpoint.tensors.items():
        name = base_name(tensor_name)
        if not name.endswith(".bias") or name not in parameters or tensor.data_ptr() in placed:
            continue
        module = name.removesuffix(".bias")
        update = result.get(module)
        if update is None:
            result[module] = Replaced(parameters={"bias": tensor})
        elif isinstance(update, LowRank):
            added = 0.0 if update.bias_O is None else update.bias_O.float() * update.scaling
            result[module] = replace(update, new_bias_O=tensor + added, bias_O=None)
        else:
            raise AdapterUnsupported(f"the adapter trains '{name}' beside another change of it: set bias to 'none'")
    return result


def refuse_unserved_module(name: str, update: Update, module: nn.Module) -> None:
    """Raises AdapterUnsupported for modules other than the ones both paths can serve."""
    if (kind := other_kind(module)) is not None:
        refuse_other_quantisation(name, update, module, kind)
    elif isinstance(update, LowRank) and not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        raise AdapterUnsupported(
            f"the adapter changes '{name}', a {type(module).__name__}, with LoRA: "
            "only linear layers and embeddings are served"
        )
    if isinstance(update, Replaced) and any(True for _ in module.children()):
        raise AdapterUnsupported(f"the adapter replaces '{name}', which has modules of its own: save those one by one")


def refuse_other_quantisation(name: str, update: Update, module: nn.Module, kind: str) -> None:
    """Raises AdapterUnsupported for what cannot run beside a weight whose values are unknown here."""
    if not is_served_unmerged(module):
        raise AdapterUnsupported(
            f"the adapter changes '{name}', which is quantised as {kind}: PEFT has no layer for it"
        )
    if not isinstance(update, LowRank) or update.magnitude_O is not None:
        what = "with DoRA" if isinstance(update, LowRank) else "by other means than LoRA"
        raise AdapterUnsupported(
            f"the adapter changes '{name}' {what}, which needs the weight, and that is quantised as {kind}: "
            "serve it on a bitsandbytes or 16-bit base"
        )
