"""Which modes an adapter's updates have on a base: why they cannot be folded, and why they cannot run row by row.

Reads the base's names, shapes and classes, never its values.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorafold_adapters.quantised import other_kind
from lorafold_adapters.updates import Replaced, ThroughPeft, Update

EXPERT = re.compile(r"\.experts\.\d+\.")


def runs_row_by_row(name: str, update: Update, module: nn.Module, model: PreTrainedModel) -> bool:
    """False for a module that may see something else than a row of activations for each token.

    Single experts see only the tokens that are sent to them; the norms of heads and the routers of experts, which may
    be replaced whole, see other shapes. Where a replaced vector is as wide as the model, it sees whole rows.
    """
    if EXPERT.search(name):
        return False
    if not isinstance(update, Replaced) or isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        return True
    width = model.config.get_text_config().hidden_size
    return all(tensor.shape == (width,) for tensor in update.parameters.values())


def route_refusal(methods: list[str], unroutable: list[str]) -> str | None:
    """Why the adapter cannot run beside the weights, or None."""
    if methods:
        return f"{methods[0]} has no low-rank form that could run beside the weights"
    if unroutable:
        return f"it changes '{unroutable[0]}', which does not see a whole row for every token"
    return None


def quantised_refusal(updates: Mapping[str, Update], modules: Mapping[str, nn.Module]) -> str | None:
    """Why weights that are quantised otherwise than by bitsandbytes cannot be folded into; None if there are none."""
    kinds = {name: kind for name in updates if (kind := other_kind(modules[name])) is not None}
    for name, kind in kinds.items():
        return f"'{name}' is quantised as {kind}; only the NF4, FP4 and int8 of bitsandbytes can be folded into"
    return None


def fold_refusal(updates: Mapping[str, Update], parameters: Mapping[str, Tensor]) -> str | None:
    """Why the updates cannot be written into the base's weights, or None."""
    owners: dict[tuple[int, torch.Size], list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault((parameter.data_ptr(), parameter.shape), []).append(name)
    changed = {f"{name}.{key}": update for name, update in updates.items() for key in changed_keys(update)}
    for key, update in changed.items():
        if key not in parameters:
            return f"the adapter adds a bias to '{key.removesuffix('.bias')}', which has none (lora_bias)"
        for other in owners[parameters[key].data_ptr(), parameters[key].shape]:
            if other not in changed or not same(changed[other], update):
                return f"'{key}' shares its memory with '{other}' (tied weights), which the adapter leaves as it is"
    return None


def changed_keys(update: Update) -> tuple[str, ...]:
    """The module's own names of the parameters that the update changes."""
    if isinstance(update, ThroughPeft):
        return update.names
    return tuple(update.changes(lambda _: torch.empty(0)))


def same(one: Update, other: Update) -> bool:
    """True if both put the same tensors into the same kind of change."""
    pointers = [[tensor.data_ptr() for tensor in update.tensors()] for update in (one, other)]
    scales = [(getattr(update, "scaling", 1.0), getattr(update, "stored_as_IO", False)) for update in (one, other)]
    return type(one) is type(other) and pointers[0] == pointers[1] and scales[0] == scales[1]
