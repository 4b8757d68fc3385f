"""Binds a checkpoint to a base: for each module of the base, what the adapter does to it.

PEFT resolves names, patterns and scales on a skeleton (`skeleton.py`); this file collects the result and refuses
whatever did not find its place. Reads the live model's shapes only. Binding is serialised.
"""

import math
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafold_adapters.checkpoint import Checkpoint
from lorafold_adapters.errors import AdapterCorrupt, AdapterUnsupported, BaseMismatch
from lorafold_adapters.modes import fold_refusal, quantised_refusal, route_refusal, runs_row_by_row
from lorafold_adapters.quantised import is_served_unmerged, other_kind
from lorafold_adapters.skeleton import ADAPTER, REMEDY, resolve
from lorafold_adapters.updates import LowRank, NewRows, Replaced, Route, ThroughPeft, Update

MAX_SCALING = 1e6
"""Beyond any scale that is trained with, and far below where fp32 overflows."""
IsBase = Callable[[str, Tensor], bool]
"""True if a tensor holds what the base has under this name."""
_one_at_a_time = threading.Lock()


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

    def to(self, device: torch.device) -> "BoundAdapter":
        """The same with its tensors on `device`."""
        return replace(
            self,
            updates={name: update.to(device) for name, update in self.updates.items()},
            routes={name: replace(route, update=route.update.to(device)) for name, route in self.routes.items()},
        )


def bind(checkpoint: Checkpoint, model: PreTrainedModel, is_base: IsBase) -> BoundAdapter:
    """Finds the module of `model` for every tensor of `checkpoint`; reads only the model's shapes.

    Raises BaseMismatch if names or shapes do not fit the base, AdapterCorrupt if the adapter contradicts its own
    configuration, AdapterUnsupported if it changes a kind of module that is not served.
    """
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skeleton = resolve(checkpoint, model)
        updates = collect(skeleton, checkpoint)
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


def collect(skeleton: nn.Module, checkpoint: Checkpoint) -> dict[str, Update]:
    """The update of each module that PEFT put an adapter on."""
    updates: dict[str, Update] = {}
    for name, module in skeleton.named_modules():
        if name.rpartition(".")[2] == "base_layer" or ".token_adapter" in name or ".modules_to_save." in name:
            continue  # Part of a layer that was collected with what is around it.
        if isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[ADAPTER].named_parameters()
            updates[name] = Replaced(parameters={key: value.detach() for key, value in saved})
        elif isinstance(module, TrainableTokensWrapper):
            updates[name] = collect_rows(module.token_adapter)
        elif isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            if ADAPTER in module.scaling:
                updates[name] = collect_low_rank(name, module)
        elif isinstance(module, BaseTunerLayer):
            updates[name] = collect_through_peft(module, checkpoint)
    return updates


def collect_low_rank(name: str, module: Any) -> LowRank:
    """Raises AdapterCorrupt for a scale that no training gives."""
    if not math.isfinite(module.scaling[ADAPTER]) or abs(module.scaling[ADAPTER]) > MAX_SCALING:
        raise AdapterCorrupt(f"the adapter scales '{name}' by {module.scaling[ADAPTER]}: correct lora_alpha and r")
    magnitude = module.lora_magnitude_vector[ADAPTER].weight if ADAPTER in module.lora_magnitude_vector else None
    magnitude_O = None if magnitude is None else magnitude.detach()
    if ADAPTER in module.lora_embedding_A:
        return LowRank(
            a_RI=module.lora_embedding_A[ADAPTER].detach(),
            b_OR=module.lora_embedding_B[ADAPTER].detach(),
            scaling=module.scaling[ADAPTER],
            magnitude_O=magnitude_O,
            stored_as_IO=True,
        )
    bias_O = module.lora_B[ADAPTER].bias
    return LowRank(
        a_RI=module.lora_A[ADAPTER].weight.detach(),
        b_OR=module.lora_B[ADAPTER].weight.detach(),
        scaling=module.scaling[ADAPTER],
        bias_O=None if bias_O is None else bias_O.detach(),
        magnitude_O=magnitude_O,
        stored_as_IO=isinstance(module.get_base_layer(), Conv1D),
    )


def collect_rows(module: Any) -> NewRows:
    """The rows of trainable_token_indices; a tied head has the same ones as the embedding."""
    values, index = module.trainable_tokens_delta[ADAPTER].detach(), module.token_indices[ADAPTER]
    rows = module.get_base_layer().weight.shape[0]
    if not all(type(row) is int and 0 <= row < rows for row in index) or len(set(index)) < len(index):
        raise AdapterCorrupt(
            f"trainable_token_indices are {list(index)[:9]}, not distinct token ids below {rows}: correct them"
        )
    return NewRows(index_K=torch.tensor(index, dtype=torch.int64), values_KM=values)


def collect_through_peft(module: Any, checkpoint: Checkpoint) -> ThroughPeft:
    """A layer of a method that PEFT folds; or of target_parameters, where layers lie in each other."""
    base = module.get_base_layer()
    names = tuple(name for name, parameter in base._parameters.items() if parameter is not None)
    if isinstance(module, ParamWrapper):
        inside = [wrapper for wrapper in module.modules() if isinstance(wrapper, ParamWrapper)]
        names = tuple(wrapper.parameter_name for wrapper in inside)
    method = "LoRA on target_parameters" if isinstance(module, ParamWrapper) else checkpoint.method
    return ThroughPeft(layer=module, names=names, method=method, adapter=ADAPTER)


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


def refuse_leftovers(
    checkpoint: Checkpoint, updates: Mapping[str, Update], parameters: Mapping[str, Tensor], is_base: IsBase
) -> None:
    """Raises BaseMismatch if a tensor of the checkpoint found no place in the base, or none did.

    PEFT also saves the base's own embeddings where LoRA targets them or where it thinks they were resized: a copy of
    what this base has is left out, another one is BaseMismatch.
    """
    biases = checkpoint.options.get("bias", "none") != "none"
    placed = placed_tensors(checkpoint, updates)
    leftovers = [name for name in checkpoint.tensors if name not in placed]
    own = [name for name in leftovers if base_name(name) in parameters and not (biases and name.endswith(".bias"))]
    for name in own:
        if not is_base(base_name(name), checkpoint.tensors[name]):
            raise BaseMismatch(
                f"the adapter carries a copy of its base's '{base_name(name)}', which is not what this base has: "
                f"{REMEDY}, or put the module into modules_to_save if it was trained"
            )
    lost = [name for name in leftovers if base_name(name) not in parameters]
    if lost or not updates:
        total, bound = (len(targeted_modules(checkpoint, names)) for names in (checkpoint.tensors, placed))
        raise BaseMismatch(
            f"only {bound} of the adapter's {total} modules are in this base, '{(lost or ['none'])[0]}' has no place: "
            f"{REMEDY}"
        )


def placed_tensors(checkpoint: Checkpoint, updates: Mapping[str, Update]) -> set[str]:
    """Names of the checkpoint's tensors that an update holds."""
    placed = {tensor.data_ptr() for update in updates.values() for tensor in update.tensors()}
    return {name for name, tensor in checkpoint.tensors.items() if tensor.data_ptr() in placed}


def targeted_modules(checkpoint: Checkpoint, tensor_names: Iterable[str]) -> set[str]:
    """The modules of `base_model.model.<module>.lora_A.weight`, `base_model.model.<module>.weight` and the like."""
    prefix = re.escape(PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(checkpoint.method)])
    tail = re.compile(rf"\.({prefix}\w+|token_adapter|base_layer|weight|bias)(\..*)?$")
    return {tail.sub("", name.removeprefix("base_model.model.")) for name in tensor_names}


def base_name(tensor_name: str) -> str:
    """The base's name of a tensor that PEFT saved out of the base itself."""
    return tensor_name.removeprefix("base_model.model.").replace(".base_layer.", ".")
