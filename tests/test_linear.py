"""The means by which linear layers are computed. The oracle is torch's own."""

import copy

import pytest
import torch
from torch import nn

from lorafold.engine import linear
from lorafold.engine.linear import MEANS, MeasuredLinear, choose_linear, fastest, usable
from lorafold_adapters import AdapterManager
from tests.models import apart, on, prompts, tiny_llama
from tests.tolerances import EFFECT, LOGITS


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_every_means_computes_what_torch_does(name: str, tokens: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=bias).requires_grad_(False)
    inputs = torch.randn(1, tokens, 96)
    expected = layer(inputs)
    assert apart(MEANS[name](inputs, layer.weight, layer.bias), expected) < LOGITS[torch.float32]
    layer.weight.mul_(1.01)  # In place, as folds do: nothing may have kept the old values.
    changed = MEANS[name](inputs, layer.weight, layer.bias)
    assert apart(changed, layer(inputs)) < LOGITS[torch.float32]
    assert apart(changed, expected) > EFFECT / 2


def test_a_model_computes_the_same_by_whatever_means(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompts(2, 9)
    expected = tiny_llama()(input_ids=ids).logits
    model = tiny_llama()
    monkeypatch.setattr(linear, "fastest", lambda layers, size: "onednn")
    assert set(choose_linear(model).values()) == {"onednn"}
    assert isinstance(model.lm_head, MeasuredLinear)
    assert apart(model(input_ids=ids).logits, expected) < LOGITS[torch.float32]
    assert AdapterManager(model).base.digest == AdapterManager(tiny_llama()).base.digest


def test_a_means_that_computes_something_else_or_fails_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise RuntimeError("not on this processor")

    work = [(torch.randn(2, 8), nn.Linear(8, 4).requires_grad_(False))]
    wrong = {"wrong": lambda inputs, weight, bias: inputs @ weight.T + 1, "broken": broken}
    monkeypatch.setattr(linear, "MEANS", {**MEANS, **wrong})
    assert set(usable(work)) == set(MEANS)
    assert fastest([work[0][1]], 2) in MEANS


def test_other_dtypes_are_left_alone() -> None:
    model = on("cpu", copy.deepcopy(tiny_llama())).bfloat16()
    assert choose_linear(model) == {}
    assert type(model.lm_head) is nn.Linear
