"""Which tensors of a checkpoint found their place in the base; what is left is a copy of the base's, or an error."""

import re
from collections.abc import Callable, Iterable, Mapping

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import Tensor

from lorafold_adapters.checkpoint import Checkpoint
from lorafold_adapters.errors import BaseMismatch
from lorafold_adapters.skeleton import REMEDY
from lorafold_adapters.updates import Update

IsBase = Callable[[str, Tensor], bool]
"""True if a tensor holds what the base has under this name."""


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
