"""What an adapter takes on the device beside its own tensors: its forms beside the weights, from shapes alone.

Slots in the tables of kernels are there from the start, and stacks have a limit of their own. Shapes in the names: I
in-features, O out-features, V vocabulary.
"""

import torch
from torch import nn

from lorafold_adapters.composed import Composed
from lorafold_adapters.quantised import like_activations
from lorafold_adapters.updates import LowRank, NewRows, Update


def path_bytes(update: Update, module: nn.Module, activations: torch.dtype) -> int:
    """Bytes of an update's two-path form: exact for low-rank products, or else at most."""
    if isinstance(update, Composed):
        return sum(path_bytes(part.update, module, activations) for part in update.parts)
    if isinstance(update, LowRank):
        return low_rank_bytes(update, module, activations)
    size = like_activations(module, activations).itemsize
    if isinstance(update, NewRows):
        numbers = 8 * (module.num_embeddings if isinstance(module, nn.Embedding) else len(update.index_K))
        return numbers + update.values_KM.numel() * size
    return sum(tensor.numel() for tensor in update.tensors()) * size


def low_rank_bytes(update: LowRank, module: nn.Module, activations: torch.dtype) -> int:
    """A, B, and a gain and a shift where there are such."""
    outputs = update.b_OR.shape[0]
    gain = update.magnitude_O is not None
    biased = update.bias_O is not None or update.new_bias_O is not None
    shift = biased or (gain and getattr(module, "bias", None) is not None)
    numbers = update.a_RI.numel() + update.b_OR.numel() + outputs * (gain + shift)
    return numbers * like_activations(module, activations).itemsize
