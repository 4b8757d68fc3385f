"""Binds a checkpoint to a base: for each module of the base, what the adapter does to it.

PEFT resolves names, patterns and scales on a skeleton of the model that holds no weights (`meta` device); the live
model never becomes a PeftModel and is not touched. Binding is serialised: while PEFT builds its layers it patches
`nn.Module.register_parameter` for the whole process (peft#3605).
"""

import copy
import math
import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafold_adapters.checkpoint import Checkpoint
from lorafold_adapters.errors import AdapterCorrupt, AdapterError, AdapterUnsupported, BaseMismatch

ADAPTER = "default"
MAX_SCALING = 1e6
"""Beyond any scale that is trained with, and far below where fp32 overflows."""
SHAPES = re.compile(
    r"size mismatch for (\S+): .*?torch\.Size\(\[([\d, ]*)\]\).*?torch\.Size\(\[([\d, ]*)\]\)", re.DOTALL
)
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """`W + scaling * B A` on one linear layer, its tensors on the CPU in the file's dtype."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float
    bias_O: Tensor | None = None
    """lora_bias: scaled like B A and added to the layer's own bias."""
    magnitude_O: Tensor | None = None
    """DoRA: the row norms of the updated weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replaced:
    """modules_to_save: new values for every parameter of one module."""

    parameters: Mapping[str, Tensor]


Update = LowRank | Replaced


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundAdapter:
    """A checkpoint with every tensor at its place in the base."""

    checkpoint: Checkpoint
    updates: Mapping[str, Update]
    """By the name of the module in the base."""
    targeted: int
    """How many modules the adapter's files have tensors for; equals `len(updates)`."""
    fold_refusal: str | None
    """Why the adapter cannot be folded into this base; None if it can."""

    @property
    def digest(self) -> str:
        """The adapter's content digest."""
        return self.checkpoint.digest


def bind(checkpoint: Checkpoint, model: PreTrainedModel) -> BoundAdapter:
    """Finds the module of `model` for every tensor of `checkpoint`; reads only the model's shapes.

    Raises BaseMismatch if names or shapes do not fit the base, AdapterCorrupt if the adapter contradicts its own
    configuration, AdapterUnsupported if it changes a kind of module that is not served.
    """
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skeleton = resolve(checkpoint, model)
        updates = collect(skeleton)
    modules = dict(model.named_modules())
    for name, update in updates.items():
        refuse_unserved_module(name, update, modules[name])
    refuse_leftovers(checkpoint, updates, {name for name, _ in model.named_parameters(remove_duplicate=False)})
    return BoundAdapter(
        checkpoint=checkpoint,
        updates=updates,
        targeted=len({module_of(name) for name in checkpoint.tensors}),
        fold_refusal=fold_refusal(updates, model),
    )


def resolve(checkpoint: Checkpoint, model: PreTrainedModel) -> nn.Module:
    """The base as a PeftModel without base weights that holds the checkpoint's own tensors."""
    try:
        config = LoraConfig.from_peft_type(**{**checkpoint.options, "inference_mode": True})
    except Exception as error:  # PEFT checks options here and there, and raises what it likes.
        raise AdapterCorrupt(f"PEFT cannot use adapter_config.json: {first_sentence(error)}: correct it") from error
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    try:
        peft_model = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    except Exception as error:
        if "not found in the base model" in str(error) or "No modules were targeted" in str(error):
            raise BaseMismatch(f"the adapter does not fit this base: {first_sentence(error)}: {REMEDY}") from error
        raise AdapterCorrupt(f"PEFT cannot apply adapter_config.json: {first_sentence(error)}: correct it") from error
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            # PEFT would move the tensors to the skeleton's device, where they would lose their values.
            module.__dict__["_move_adapter_to_device_of_base_layer"] = lambda *_, **__: None
    try:
        set_peft_model_state_dict(peft_model, dict(checkpoint.tensors), low_cpu_mem_usage=True)
    except RuntimeError as error:
        raise shape_error(str(error)) from error
    return cast(nn.Module, peft_model.get_base_model())


REMEDY = "serve it on the base it was trained on"


def first_sentence(error: Exception) -> str:
    """The start of a library's message, without its advice."""
    return str(error).split(". ")[0].rstrip(".")


def shape_error(message: str) -> AdapterError:
    """Tells a tensor that contradicts the adapter's own rank from one that was made for another base."""
    found = SHAPES.search(message)
    if found is None:
        return BaseMismatch(f"the adapter does not fit this base ({message}): {REMEDY}")
    name = found[1].removeprefix("base_model.model.").replace(f".{ADAPTER}", "")
    has, needs = ([int(size) for size in shape.split(",") if size.strip()] for shape in (found[2], found[3]))
    rank_axis = 0 if ".lora_A" in name else 1 if ".lora_B" in name else None
    if rank_axis is not None and len(has) == len(needs) == 2 and has[rank_axis] != needs[rank_axis]:
        return AdapterCorrupt(
            f"tensor '{name}' has rank {has[rank_axis]} where adapter_config.json says {needs[rank_axis]}: "
            "the folder mixes two training runs; copy the adapter again"
        )
    return BaseMismatch(f"tensor '{name}' has shape {has}, this base needs {needs}: {REMEDY}")


def collect(skeleton: nn.Module) -> dict[str, Update]:
    """The update of each module that PEFT put an adapter on."""
    updates: dict[str, Update] = {}
    for name, module in skeleton.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.scaling:
            updates[name] = collect_low_rank(name, module)
        elif isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save[ADAPTER].named_parameters()
            updates[name] = Replaced(parameters={key: loaded(f"{name}.{key}", value) for key, value in saved})
    return updates


def collect_low_rank(name: str, module: Any) -> LowRank:
    """Raises AdapterUnsupported for layers without A and B factors of a linear map."""
    if ADAPTER not in module.lora_A:
        raise AdapterUnsupported(
            f"the adapter changes '{name}', an embedding, with LoRA: only linear layers are served"
        )
    if not math.isfinite(module.scaling[ADAPTER]) or abs(module.scaling[ADAPTER]) > MAX_SCALING:
        raise AdapterCorrupt(f"the adapter scales '{name}' by {module.scaling[ADAPTER]}: correct lora_alpha and r")
    bias_O = module.lora_B[ADAPTER].bias
    magnitude = module.lora_magnitude_vector[ADAPTER].weight if ADAPTER in module.lora_magnitude_vector else None
    return LowRank(
        a_RI=loaded(f"{name}.lora_A", module.lora_A[ADAPTER].weight),
        b_OR=loaded(f"{name}.lora_B", module.lora_B[ADAPTER].weight),
        scaling=module.scaling[ADAPTER],
        bias_O=None if bias_O is None else loaded(f"{name}.lora_B.bias", bias_O),
        magnitude_O=None if magnitude is None else loaded(f"{name}.lora_magnitude_vector", magnitude),
    )


def loaded(name: str, tensor: Tensor) -> Tensor:
    """The tensor, detached; raises AdapterCorrupt if the checkpoint had no values for it."""
    if tensor.is_meta:
        raise AdapterCorrupt(f"the adapter's configuration asks for '{name}', which its files lack: copy it again")
    return tensor.detach()


def refuse_unserved_module(name: str, update: Update, module: nn.Module) -> None:
    """Raises AdapterUnsupported for modules other than the ones both paths can serve."""
    if isinstance(update, LowRank) and not isinstance(module, nn.Linear):
        raise AdapterUnsupported(
            f"the adapter changes '{name}', a {type(module).__name__}, with LoRA: only nn.Linear layers are served"
        )
    if isinstance(update, Replaced) and any(True for _ in module.children()):
        raise AdapterUnsupported(f"the adapter replaces '{name}', which has modules of its own: save those one by one")


def refuse_leftovers(checkpoint: Checkpoint, updates: Mapping[str, Update], parameters: set[str]) -> None:
    """Raises BaseMismatch if a tensor of the checkpoint found no place in the base, or none did.

    Raises AdapterUnsupported if it is one of the base's own `parameters`: PEFT saves embeddings that it thinks
    were resized.
    """
    placed = {tensor.data_ptr() for update in updates.values() for tensor in tensors_of(update)}
    leftovers = [name for name, tensor in checkpoint.tensors.items() if tensor.data_ptr() not in placed]
    own = [name for name in leftovers if base_name(name) in parameters]
    if own:
        raise AdapterUnsupported(
            f"the adapter carries a copy of the base's own '{base_name(own[0])}': save it again with "
            "save_embedding_layers=False, or with the embedding in modules_to_save if it was trained"
        )
    if leftovers or not updates:
        raise BaseMismatch(
            f"{len(leftovers)} of the adapter's {len(checkpoint.tensors)} tensors have no place in this base, "
            f"'{(leftovers or ['all'])[0]}' for one: {REMEDY}"
        )


def tensors_of(update: Update) -> list[Tensor]:
    """Every tensor of one update."""
    if isinstance(update, Replaced):
        return list(update.parameters.values())
    optional = [tensor for tensor in (update.bias_O, update.magnitude_O) if tensor is not None]
    return [update.a_RI, update.b_OR, *optional]


def base_name(tensor_name: str) -> str:
    """The base's name of a tensor that PEFT saved out of the base itself."""
    return tensor_name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def module_of(tensor_name: str) -> str:
    """The module's name in `base_model.model.<module>.lora_A.weight` or `base_model.model.<module>.weight`."""
    return re.sub(r"\.(lora_\w+(\.weight|\.bias)?|weight|bias)$", "", tensor_name.removeprefix("base_model.model."))


def fold_refusal(updates: Mapping[str, Update], model: PreTrainedModel) -> str | None:
    """Why the updates cannot be written into the base's weights, or None."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault(parameter.data_ptr(), []).append(name)
    for name, update in updates.items():
        keys = update.parameters if isinstance(update, Replaced) else {"weight": None}
        for key in (f"{name}.{key}" for key in keys):
            if len(sharing := owners[parameters[key].data_ptr()]) > 1:
                return f"'{key}' shares its memory with '{next(n for n in sharing if n != key)}' (tied weights)"
        if isinstance(update, LowRank) and update.bias_O is not None and f"{name}.bias" not in parameters:
            return f"the adapter adds a bias to '{name}', which has none (lora_bias)"
    return None
