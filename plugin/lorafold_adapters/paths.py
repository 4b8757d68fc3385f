"""The two-path form of each kind of update: what one adapter adds to the outputs of one module.

Shapes in the names: T tokens of one span, R rank, I in-features, O out-features, V vocabulary, K new rows.
"""

import copy
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from lorafold_adapters.composed import Composed
from lorafold_adapters.quantised import like_activations
from lorafold_adapters.updates import LowRank, NewRows, Pristine, Replaced, Update


class AdapterPath(Protocol):
    """What one adapter does at one module."""

    def __call__(self, inputs: Tensor, outputs_TO: Tensor) -> Tensor:
        """The adapted outputs of one span, given its inputs and what the base makes of them."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankPath:
    """`g * (W x + s B(A x)) + c`; g and c are left out where the adapter is neither DoRA nor adds a bias.

    The layouts are those that products of few rows read fastest: on a CPU A is contiguous as [I, R], on a GPU as
    [R, I]; B is contiguous as [R, O] on both.
    """

    a_IR: Tensor
    scaled_b_RO: Tensor
    gain_O: Tensor | None
    shift_O: Tensor | None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a_IR.shape[1]

    def __call__(self, inputs: Tensor, outputs_TO: Tensor) -> Tensor:
        """The adapted outputs [T, O] of inputs [T, I] whose outputs under the base are given."""
        adapted_TO = torch.addmm(outputs_TO, inputs @ self.a_IR, self.scaled_b_RO)
        return finished(adapted_TO, self.gain_O, self.shift_O)


def finished(adapted: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """`gain * adapted + shift`, of what there is of them."""
    if gain is not None:
        adapted = adapted * gain
    return adapted if shift is None else adapted + shift


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingPath:
    """`g * (E[x] + s A[x] B)`, scaled as the module scales its own output."""

    a_VR: Tensor
    scaled_b_RO: Tensor
    gain_O: Tensor | None

    def __call__(self, inputs: Tensor, outputs_TO: Tensor) -> Tensor:
        """The adapted embeddings [T, O] of token ids [T]."""
        return finished(torch.addmm(outputs_TO, self.a_VR[inputs], self.scaled_b_RO), self.gain_O, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplacedPath:
    """The module of modules_to_save itself, in place of the base's."""

    module: nn.Module

    def __call__(self, inputs: Tensor, outputs_TO: Tensor) -> Tensor:
        """The replaced module's outputs; the base's are dropped."""
        return cast(Tensor, self.module(inputs))


@dataclass(frozen=True, kw_only=True, slots=True)
class NewTokensPath:
    """Embeddings of the trained tokens."""

    row_V: Tensor
    """For each token its row in `values_KO`, or -1."""
    values_KO: Tensor

    def __call__(self, inputs: Tensor, outputs_TO: Tensor) -> Tensor:
        """The adapted embeddings [T, O] of token ids [T]."""
        row_T = self.row_V[inputs]
        return torch.where(row_T.unsqueeze(1) >= 0, self.values_KO[row_T.clamp(min=0)], outputs_TO)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewLogitsPath:
    """Logits of the trained tokens, where the head is tied to the embedding."""

    index_K: Tensor
    values_KI: Tensor

    def __call__(self, inputs: Tensor, outputs_TO: Tensor) -> Tensor:
        """The adapted logits [T, V] of inputs [T, I]."""
        return outputs_TO.index_copy(1, self.index_K, inputs @ self.values_KI.T)


@dataclass(frozen=True, kw_only=True, slots=True)
class SummedPath:
    """Several adapters at once: the module is linear in its parameters, so what each adds to its outputs adds up."""

    parts: tuple[tuple[float, AdapterPath], ...]
    """Weights and paths."""

    def __call__(self, inputs: Tensor, outputs_TO: Tensor) -> Tensor:
        """The adapted outputs of one span."""
        summed_TO = outputs_TO.float()
        for weight, path in self.parts:
            summed_TO = summed_TO.add(path(inputs, outputs_TO).float() - outputs_TO.float(), alpha=weight)
        return summed_TO.to(outputs_TO)


def path_of(update: Update, module: nn.Module, pristine: Pristine, activations: torch.dtype) -> AdapterPath:
    """The two-path form of an update, on the module's device and in its dtype, or that of `activations` if quantised.

    `pristine` gives the module's parameters as they are in the base, whatever is folded now.
    """
    if isinstance(update, LowRank):
        return low_rank_path(update, module, pristine, like_activations(module, activations))
    if isinstance(update, NewRows):
        return new_rows_path(update, module)
    if isinstance(update, Composed):
        return SummedPath(
            parts=tuple((part.weight, path_of(part.update, module, pristine, activations)) for part in update.parts)
        )
    assert isinstance(update, Replaced)
    return ReplacedPath(module=replica(module, update))


def low_rank_path(update: LowRank, module: nn.Module, pristine: Pristine, weight: Tensor) -> AdapterPath:
    """Scales B once, in fp32, so that a forward pass does not have to; `weight` says in which dtype and where."""
    gain_O = None if update.magnitude_O is None else update.product.gain(pristine("weight")).float()
    scaled_b_RO = (update.b_OR.float() * update.scaling).T
    if isinstance(module, nn.Embedding):
        b_RO = (scaled_b_RO * embed_scale(module)).to(weight).contiguous()
        a_VR = update.a_RI.T.contiguous().to(weight)
        return EmbeddingPath(a_VR=a_VR, scaled_b_RO=b_RO, gain_O=None if gain_O is None else gain_O.to(weight))
    shift_O = shift_of(update, module, pristine, gain_O)
    return LowRankPath(
        a_IR=laid_out(update.a_RI.to(weight)),
        scaled_b_RO=scaled_b_RO.to(weight).contiguous(),
        gain_O=None if gain_O is None else gain_O.to(weight),
        shift_O=None if shift_O is None else shift_O.to(weight),
    )


def shift_of(update: LowRank, module: nn.Module, pristine: Pristine, gain_O: Tensor | None) -> Tensor | None:
    """What is added last, in fp32: the gain leaves the base's bias alone, and an added bias is not gained."""
    shift_O = None if update.bias_O is None else update.bias_O.float() * update.scaling
    if update.new_bias_O is not None:
        shift_O = update.new_bias_O.float() - pristine("bias").float()
    if gain_O is not None and getattr(module, "bias", None) is not None:
        kept_O = pristine("bias").float() * (1 - gain_O)
        shift_O = kept_O if shift_O is None else kept_O + shift_O
    return shift_O


def laid_out(a_RI: Tensor) -> Tensor:
    """The tensor as [I, R], in the layout that its device reads fastest."""
    return a_RI.contiguous().T if a_RI.is_cuda else a_RI.T.contiguous()


def new_rows_path(update: NewRows, module: nn.Module) -> AdapterPath:
    """An embedding looks new rows up; a head multiplies by them."""
    weight = like_weight(module)
    if not isinstance(module, nn.Embedding):
        return NewLogitsPath(index_K=update.index_K.to(weight.device), values_KI=update.values_KM.to(weight))
    row_V = torch.full((weight.shape[0],), -1, dtype=torch.int64, device=weight.device)
    row_V[update.index_K.to(weight.device)] = torch.arange(len(update.index_K), device=weight.device)
    values_KO = (update.values_KM.float() * embed_scale(module)).to(weight)
    return NewTokensPath(row_V=row_V, values_KO=values_KO)


def like_weight(module: nn.Module) -> Tensor:
    """The module's weight, for its shape, dtype and device."""
    return cast(Tensor, module.weight)


def embed_scale(module: nn.Module) -> float:
    """What an embedding multiplies its rows by (Gemma)."""
    scale = torch.as_tensor(getattr(module, "embed_scale", 1.0))
    return float(scale.to(like_weight(module).dtype))


def replica(module: nn.Module, update: Replaced) -> nn.Module:
    """A copy of `module` that has the adapter's parameters and shares everything else."""
    own = copy.copy(module)
    for attribute in [name for name in own.__dict__ if name.startswith("_lorafold") or name == "forward"]:
        del own.__dict__[attribute]
    own._parameters = dict(module._parameters)
    for name, values in update.parameters.items():
        like = cast(Tensor, module._parameters[name])
        own._parameters[name] = nn.Parameter(values.to(like), requires_grad=False)
    return own
