"""Under which names, and in which pieces, transformers saves the tensors of a model.

What it loads is not always what a checkpoint holds: experts come one by one and are stacked in the model, names differ.
It can turn that round for a whole model; this file finds out which tensors can be turned round without the others.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from lorafold_adapters.errors import ExportUnsupported

LAYER = re.compile(r"^.*?\.\d+\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Tensors of a model that are turned into tensors of a checkpoint together."""

    names: tuple[str, ...]
    """In the model."""
    saved: Mapping[str, Tensor]
    """In the checkpoint: dtypes and shapes, without values."""


def plan_names(model: PreTrainedModel, live: Mapping[str, Tensor]) -> list[Group]:
    """The tensors `live` of `model` in groups as small as can be: one by one, or else layer by layer.

    Of tensors that share memory, the one that transformers keeps. Raises ExportUnsupported if neither gives what
    transformers makes of the whole model, or the model is quantised.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ExportUnsupported("the base is quantised, and a merged checkpoint is not: export on the unquantised base")
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in kept(model, live).items()}
    whole = shapes(saved_as(model, meta))
    for names in ([(name,) for name in meta], by_layer(meta)):
        try:
            groups = [Group(names=part, saved=saved_as(model, {name: meta[name] for name in part})) for part in names]
        except (RuntimeError, ValueError, KeyError, IndexError):
            continue  # A conversion that misses a part of its input.
        if shapes({name: like for group in groups for name, like in group.saved.items()}) == whole:
            return groups
    raise ExportUnsupported(
        f"transformers saves a {type(model).__name__} only as a whole: fold the adapter and call save_pretrained"
    )


def kept(model: PreTrainedModel, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a checkpoint of the model has, by their names in the model. Raises ExportUnsupported."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    try:
        return remove_tied_weights_from_state_dict(
            {name: tensor for name, tensor in live.items() if name not in ignored}, model
        )
    except RuntimeError as error:
        raise ExportUnsupported(
            f"tensors of this base share memory in a way that no checkpoint has: {error}"
        ) from error


def saved_as(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What transformers saves in place of these tensors of the model, by name."""
    return dict(revert_weight_conversion(model, dict(tensors)))


def by_layer(names: Mapping[str, object]) -> list[tuple[str, ...]]:
    """The names of each layer together; those outside layers one by one."""
    layers: dict[str, list[str]] = {}
    for name in names:
        found = LAYER.match(name)
        layers.setdefault(found.group() if found else name, []).append(name)
    return [tuple(layer) for layer in layers.values()]


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """For comparison."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
