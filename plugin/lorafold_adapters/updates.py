"""What an adapter does to one module of the base, as plain data: its tensors and the parameters they change.

Knows nothing of files, of PEFT or of where modules lie; `binding.py` makes these, `fold.py` writes them into weights,
and `two_path.py` runs them beside the weights.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from torch import Tensor, nn

from lorafold_adapters.delta import AddProduct, AddValues, Change, Computed, SetRows, SetValues

Pristine = Callable[[str], Tensor]
"""Gives a parameter of the module, by its own name, as it is in the base; not to be written to."""
OnTensor = Callable[[Tensor], Tensor]


class Update(Protocol):
    """What an adapter does to one module."""

    def changes(self, pristine: Pristine) -> dict[str, Change]:
        """The change of each parameter of the module, by its own name."""
        ...

    def tensors(self) -> list[Tensor]:
        """Every tensor that came from the adapter's files."""
        ...

    def mapped(self, function: OnTensor) -> "Update":
        """The same with what `function` makes of each tensor."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """`W + scaling * B A` on a linear layer or an embedding, its tensors in the dtype of the file."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float
    bias_O: Tensor | None = None
    """lora_bias: scaled like B A and added to the layer's own bias."""
    magnitude_O: Tensor | None = None
    """DoRA: the row norms of the updated weight."""
    new_bias_O: Tensor | None = None
    """bias="all" and "lora_only": in place of the layer's own bias."""
    stored_as_IO: bool = False
    """True where the base stores the weight transposed: Conv1D, and embeddings, whose in-features are tokens."""

    @property
    def product(self) -> AddProduct:
        """The change of the weight, as it is stored."""
        left, right = (self.a_RI.T, self.b_OR.T) if self.stored_as_IO else (self.b_OR, self.a_RI)
        return AddProduct(
            left_NR=left,
            right_RM=right,
            scaling=self.scaling,
            magnitude=self.magnitude_O,
            outputs_are_rows=not self.stored_as_IO,
        )

    def changes(self, pristine: Pristine) -> dict[str, Change]:
        """See `Update`."""
        changes: dict[str, Change] = {"weight": self.product}
        if self.new_bias_O is not None:
            changes["bias"] = SetValues(values=self.new_bias_O)
        elif self.bias_O is not None:
            changes["bias"] = AddValues(values=self.bias_O, scaling=self.scaling)
        return changes

    def tensors(self) -> list[Tensor]:
        """See `Update`."""
        optional = (self.bias_O, self.magnitude_O, self.new_bias_O)
        return [self.a_RI, self.b_OR, *(tensor for tensor in optional if tensor is not None)]

    def mapped(self, function: OnTensor) -> "LowRank":
        """See `Update`."""
        made = {
            name: function(tensor)
            for name in ("a_RI", "b_OR", "bias_O", "magnitude_O", "new_bias_O")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **cast(Any, made))


@dataclass(frozen=True, kw_only=True, slots=True)
class Replaced:
    """modules_to_save, and biases that were trained: new values for some parameters of one module."""

    parameters: Mapping[str, Tensor]

    def changes(self, pristine: Pristine) -> dict[str, Change]:
        """See `Update`."""
        return {name: SetValues(values=tensor) for name, tensor in self.parameters.items()}

    def tensors(self) -> list[Tensor]:
        """See `Update`."""
        return list(self.parameters.values())

    def mapped(self, function: OnTensor) -> "Replaced":
        """See `Update`."""
        return Replaced(parameters={name: function(tensor) for name, tensor in self.parameters.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRows:
    """trainable_token_indices: new rows for some tokens, of an embedding or of a head tied to it."""

    index_K: Tensor
    values_KM: Tensor

    def changes(self, pristine: Pristine) -> dict[str, Change]:
        """See `Update`."""
        return {"weight": SetRows(index_K=self.index_K, values_KM=self.values_KM)}

    def tensors(self) -> list[Tensor]:
        """See `Update`."""
        return [self.values_KM]

    def mapped(self, function: OnTensor) -> "NewRows":
        """See `Update`."""
        return NewRows(index_K=function(self.index_K), values_KM=function(self.values_KM))


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughPeft:
    """A method that only PEFT can fold: its layer, whose base weights are missing until they are lent to it."""

    layer: Any
    """PEFT's tuner layer, on a skeleton."""
    names: tuple[str, ...]
    """The parameters of the base layer that it may change."""
    method: str
    """PEFT's name for it."""
    adapter: str
    """The name the adapter has in the layer."""

    def changes(self, pristine: Pristine) -> dict[str, Change]:
        """See `Update`."""
        return {name: Computed(function=self._folded(name, pristine)) for name in self.names}

    def tensors(self) -> list[Tensor]:
        """See `Update`."""
        own = {tensor.data_ptr() for tensor in self.layer.get_base_layer().parameters()}
        state = self.layer.state_dict().values()
        return [tensor.detach() for tensor in state if not tensor.is_meta and tensor.data_ptr() not in own]

    def mapped(self, function: OnTensor) -> "ThroughPeft":
        """See `Update`; the layer stays as it is, and follows the base weights that it is lent."""
        return self

    def _folded(self, name: str, pristine: Pristine) -> Callable[[Tensor], Tensor]:
        def function(base: Tensor) -> Tensor:
            lent = {other: base if other == name else pristine(other).to(base) for other in self.names}
            return merged_by_peft(self.layer, lent, self.adapter)[name]

        return function


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """What runs beside the weights in place of an update that has no exact form there."""

    update: Update
    squares: float
    """Sum of the squares of the delta that was approximated; 0 where nothing was."""
    lost_squares: float
    """Of what the approximation leaves of it."""

    @property
    def error(self) -> float:
        """Norm of what is lost over the norm of the delta."""
        return math.sqrt(self.lost_squares / self.squares) if self.squares > 0 else 0.0


def merged_by_peft(layer: Any, lent: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """What PEFT's `merge` makes of the base layer's parameters; works on copies of them."""
    wrappers = [copy.deepcopy(layer)]
    while hasattr(wrappers[-1], "base_layer"):
        wrappers.append(wrappers[-1].base_layer)
    base: nn.Module = wrappers.pop()
    for name, tensor in lent.items():
        base._parameters[name] = nn.Parameter(tensor.clone(), requires_grad=False)
    device, dtype = next(iter(lent.values())).device, next(iter(lent.values())).dtype
    nn.Module.to(wrappers[0], device=device, dtype=dtype)
    for wrapper in wrappers:
        wrapper.merge(safe_merge=False, adapter_names=[adapter])
    return {name: cast(Tensor, base._parameters[name]).detach() for name in lent}
