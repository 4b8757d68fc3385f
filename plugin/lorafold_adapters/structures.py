"""Where each tensor of a checkpoint belongs, resolved by PEFT once for every form that adapters have.

Adapters trained with one configuration on one base differ in nothing but values. What PEFT makes of the first is kept
without its values, and the tensors of the next are put in their places: no layer of PEFT is built for it.
"""

import hashlib
import json
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafold_adapters.checkpoint import Checkpoint
from lorafold_adapters.collecting import collect
from lorafold_adapters.skeleton import resolve
from lorafold_adapters.updates import ThroughPeft, Update

FORMS = 32
"""Forms that are remembered; the one that was used least recently goes first."""
ABOUT_THE_TRAINING = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")
"""Options that PEFT does not read, or overwrites, when it puts an adapter on a model that is there."""
SETS = ("target_modules", "exclude_modules")
"""Options of which PEFT makes sets."""
_one_at_a_time = threading.Lock()
"""Held while PEFT builds its layers, for all models: see `skeleton.py`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """What adapters of one form do to the base, without the values."""

    updates: Mapping[str, Update]
    """By module; an empty tensor is in the place of each of the checkpoint's."""
    names: Mapping[int, str]
    """The name in the checkpoint, by the `id` of the empty tensor."""

    @classmethod
    def of(cls, updates: Mapping[str, Update], tensors: Mapping[str, Tensor]) -> "Structure | None":
        """None if a tensor is not, as it is, one of the checkpoint's, and in layers of PEFT, which hold values."""
        if any(isinstance(update, ThroughPeft) for update in updates.values()):
            return None
        by_place = {place_of(tensor): name for name, tensor in tensors.items()}
        own = [tensor for update in updates.values() for tensor in update.tensors()]
        if len(by_place) < len(tensors) or any(place_of(tensor) not in by_place for tensor in own):
            return None
        empty = {name: torch.empty(0) for name in tensors}

        def without_values(tensor: Tensor) -> Tensor:
            name = by_place.get(place_of(tensor))
            return tensor if name is None else empty[name]  # Token ids come from the options, and stay.

        return cls(
            updates={module: update.mapped(without_values) for module, update in updates.items()},
            names={id(tensor): name for name, tensor in empty.items()},
        )

    def filled(self, tensors: Mapping[str, Tensor]) -> dict[str, Update]:
        """The updates of an adapter of this form."""

        def value(tensor: Tensor) -> Tensor:
            name = self.names.get(id(tensor))
            return tensor if name is None else tensors[name]

        return {module: update.mapped(value) for module, update in self.updates.items()}


class Structures:
    """The structures that adapters on one model had lately. Any thread may use it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._known: OrderedDict[str, Structure] = OrderedDict()
        self._lock = threading.Lock()

    def updates_of(self, checkpoint: Checkpoint) -> dict[str, Update]:
        """The update of each module that PEFT puts the adapter on.

        Raises AdapterCorrupt if the adapter contradicts itself, BaseMismatch if it does not fit, AdapterUnsupported.
        """
        form = form_of(checkpoint)
        known = self._find(form)
        if known is None:
            with _one_at_a_time:
                known = self._find(form)
                if known is None:
                    return self._resolved(checkpoint, form)
        return known.filled(checkpoint.tensors)

    def _find(self, form: str) -> Structure | None:
        with self._lock:
            known = self._known.get(form)
            if known is not None:
                self._known.move_to_end(form)
            return known

    def _resolved(self, checkpoint: Checkpoint, form: str) -> dict[str, Update]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            updates = collect(resolve(checkpoint, self._model), checkpoint)
        structure = Structure.of(updates, checkpoint.tensors)
        if structure is not None:
            with self._lock:
                self._known[form] = structure
                while len(self._known) > FORMS:
                    self._known.popitem(last=False)
        return updates


def form_of(checkpoint: Checkpoint) -> str:
    """SHA-256, hexadecimal, of everything that decides the structure: all but the values of the tensors.

    Files have tensors and target modules in any order; patterns keep theirs, as the first that matches a module counts.
    """
    options = {key: value for key, value in checkpoint.options.items() if key not in ABOUT_THE_TRAINING}
    for key in SETS:
        if isinstance(options.get(key), list):
            options[key] = sorted(options[key], key=str)
    tensors = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in sorted(checkpoint.tensors.items())]
    return hashlib.sha256(json.dumps([sorted(options.items()), tensors]).encode()).hexdigest()


def place_of(tensor: Tensor) -> object:
    """Where a tensor's values are and how they are read."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
