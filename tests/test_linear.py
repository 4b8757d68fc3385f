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


@pytest.mark.parametrize("name", ["onednn", "split"])
def test_a_model_computes_the_same_by_whatever_means(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ids = prompts(2, 9)
    expected = tiny_llama()(input_ids=ids).logits
    model = tiny_llama()
    monkeypatch.setattr(linear, "fastest", lambda layers, size: name)
    assert set(choose_linear(model).values()) == {name}
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


def test_each_number_of_tokens_has_its_own_means(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def noting(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        used.append(inputs.shape[-2])
        return nn.functional.linear(inputs, weight, bias)

    monkeypatch.setattr(linear, "MEANS", {**MEANS, "noting": noting})
    monkeypatch.setattr(linear, "fastest", lambda layers, size: "noting" if size in (2, 16) else "torch")
    model = tiny_llama()
    choose_linear(model)
    for tokens in (1, 2, 3, 8, 9, 16, 17, 128, 129):
        model.lm_head(torch.randn(1, tokens, model.lm_head.in_features))
    assert used == [2, 9, 16]


def test_rows_that_make_no_equal_parts_are_computed_by_torch() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 13).requires_grad_(False)
    inputs = torch.randn(3, 8)
    assert torch.equal(linear.split(inputs, layer.weight, layer.bias), layer(inputs))


def test_other_dtypes_are_left_alone() -> None:
    model = on("cpu", copy.deepcopy(tiny_llama())).bfloat16()
    assert choose_linear(model) == {}
    assert type(model.lm_head) is nn.Linear
