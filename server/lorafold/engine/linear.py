"""By which means the linear layers of a model on a CPU are computed: each is measured on the model's own weights.

For a few tokens torch hands a linear layer to a BLAS that is made for large matrices, and reads the weights far slower
than memory delivers them. Two others do better on the same tensors, unpacked and in place, so folding needs to know
nothing of it: oneDNN, which torch brings along, and the same BLAS asked for a batch of products, each with some of the
weight's rows. Only fp32: for other dtypes torch takes oneDNN by itself.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Means = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Takes inputs [..., I], weight [O, I] and bias [O]; returns [..., O]."""
SIZES = (1, 2, 4, 8, 16, 32, 128)
"""Tokens for which the means are compared; what is between takes the next larger one's."""
ROUNDS = 5
PARTS = 8
"""Products that `split` makes of one. Measured on 2 cores: 2 are too few, from 8 on it makes no difference."""
SAMPLE_BYTES = 2**28
LEAST_BYTES = 2**25
"""Weights that are measured for one token, and for many, with which reading them matters less: more than caches hold,
as when a whole model runs."""
CLEARLY = 0.95
"""Share of torch's own time that another means must stay below."""


def onednn(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """oneDNN on weights as they are."""
    outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight_OI, bias_O, "none", [], "")
    return outputs


def split(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """A batch of products, each with `O / PARTS` rows of the weight; torch's own where `O` has no such parts."""
    rows, width = weight_OI.shape
    if rows % PARTS or not weight_OI.is_contiguous():
        return F.linear(inputs, weight_OI, bias_O)
    one_sequence = inputs.dim() == 3 and inputs.shape[0] == 1
    inputs_1TI = inputs if one_sequence else inputs.reshape(1, -1, width)
    products_PTO = torch.bmm(inputs_1TI.expand(PARTS, -1, -1), weight_OI.view(PARTS, -1, width).mT)
    outputs = products_PTO.transpose(0, 1).reshape(*inputs.shape[:-1], rows)
    return outputs if bias_O is None else outputs + bias_O


MEANS: Mapping[str, Means] = {"torch": F.linear, "onednn": onednn, "split": split}


class MeasuredLinear(nn.Linear):
    """`nn.Linear`, computed by the means that is fastest for the number of tokens. Made by swapping the class."""

    lorafold_means: tuple[Means, ...]
    """For every number of tokens up to the last of `SIZES`; torch's own for more."""

    def forward(self, inputs: Tensor) -> Tensor:
        """See `nn.Linear`. A compiler gets `split`: of oneDNN it wants weights that never change."""
        if torch.compiler.is_compiling():
            return split(inputs, self.weight, self.bias)
        tokens = inputs.numel() // self.in_features
        means = self.lorafold_means[tokens] if tokens < len(self.lorafold_means) else F.linear
        return means(inputs, self.weight, self.bias)


@torch.inference_mode()
def choose_linear(model: nn.Module) -> dict[int, str]:
    """Measures, and makes the model's linear layers use what is fastest; says which, by number of tokens.

    Nothing is changed, and nothing returned, where there is no choice: on a GPU, or for other dtypes than fp32.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and on_cpu(module.weight)]
    if not layers:
        return {}
    chosen = {size: fastest(sample(layers, max(SAMPLE_BYTES // size, LEAST_BYTES)), size) for size in SIZES}
    if set(chosen.values()) != {"torch"}:
        means = tuple(MEANS[chosen[SIZES[bisect_left(SIZES, tokens)]]] for tokens in range(SIZES[-1] + 1))
        for layer in layers:
            layer.__class__ = MeasuredLinear
            cast(MeasuredLinear, layer).lorafold_means = means
    return chosen


def on_cpu(weight_OI: Tensor) -> bool:
    """True if the weight is one of those that the means are for."""
    return weight_OI.device.type == "cpu" and weight_OI.dtype == torch.float32


def sample(layers: list[nn.Linear], nbytes: int) -> list[nn.Linear]:
    """The first layers, up to so many bytes."""
    before = accumulate((layer.weight.nbytes for layer in layers), initial=0)
    return [layer for layer, passed in zip(layers, before, strict=False) if passed < nbytes]


def fastest(layers: list[nn.Linear], tokens: int) -> str:
    """The name of the means that takes least time for all of `layers`, measured in turn."""
    inputs = {layer.in_features: torch.randn(tokens, layer.in_features) for layer in layers}
    work = [(inputs[layer.in_features], layer) for layer in layers]
    found = usable(work)
    rounds = [{name: seconds(means, work) for name, means in found.items()} for _ in range(ROUNDS)]
    least = {name: min(taken[name] for taken in rounds) for name in rounds[0]}
    best = min(least, key=least.__getitem__)
    return best if least[best] < CLEARLY * least["torch"] else "torch"


def usable(work: list[tuple[Tensor, nn.Linear]]) -> dict[str, Means]:
    """The means that work here and compute what torch's own does."""
    found: dict[str, Means] = {}
    for name, means in MEANS.items():
        try:
            close = all(
                torch.allclose(means(inputs, layer.weight, layer.bias), layer(inputs), rtol=1e-3, atol=1e-3)
                for inputs, layer in work
            )
        except (RuntimeError, AttributeError):
            continue
        if close:
            found[name] = means
    return found


def seconds(means: Means, work: list[tuple[Tensor, nn.Linear]]) -> float:
    """How long all layers take."""
    start = time.perf_counter()
    for inputs, layer in work:
        means(inputs, layer.weight, layer.bias)
    return time.perf_counter() - start
