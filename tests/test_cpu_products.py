"""Products with large factors on a CPU. The oracle is the same product in fp64."""

import pytest
import torch
from torch import Tensor, nn

from lorafold_adapters import cpu_products
from lorafold_adapters.cpu_products import LARGE, add_expanded, has_means, is_large, shrunk
from lorafold_adapters.paths import LowRankPath
from lorafold_adapters.router import Router
from tests.models import apart
from tests.test_two_path import Products
from tests.tolerances import EFFECT, LOGITS

WIDE, RANK = 1024, 256
"""Just large."""


def factor(rows: int = WIDE, columns: int = RANK) -> Tensor:
    return torch.randn(rows, columns)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 8, 40, 200])
@pytest.mark.parametrize("features", [WIDE, WIDE + 2])
@torch.inference_mode()
def test_the_product_with_a_is_what_it_is_in_fp64(tokens: int, features: int) -> None:
    torch.manual_seed(0)
    inputs_TI, a_IR = torch.randn(tokens, features), factor(features)
    expected = inputs_TI.double() @ a_IR.double()
    assert shrunk(inputs_TI, a_IR).shape == expected.shape
    if tokens == 0:
        return
    assert apart(shrunk(inputs_TI, a_IR), expected) < LOGITS[torch.float32]
    assert apart(shrunk(inputs_TI, a_IR * 1.02), expected) > EFFECT  # Negative control.


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 8, 40, 200])
@torch.inference_mode()
def test_the_product_with_b_is_added_in_place_and_takes_a_piece_of_a_row(tokens: int) -> None:
    torch.manual_seed(0)
    products_TR, b_RO, outputs_TO = (
        torch.randn(tokens, 3 * RANK)[:, RANK : 2 * RANK],
        factor(RANK, WIDE),
        torch.randn(tokens, WIDE),
    )
    expected = outputs_TO.double() + products_TR.double() @ b_RO.double()
    before = outputs_TO.clone()
    add_expanded(outputs_TO, products_TR, b_RO)
    if tokens == 0:
        return
    assert apart(outputs_TO, expected) < LOGITS[torch.float32]
    assert apart(before, expected) > EFFECT  # Negative control.


def test_only_large_factors_in_fp32_on_a_cpu_are_multiplied_so() -> None:
    assert is_large(factor()) == has_means()
    assert not is_large(factor(WIDE - 1))
    assert not is_large(factor().half())
    assert not is_large(factor().to("meta"))
    assert factor().nbytes == LARGE


def test_without_onednn_no_factor_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs_TI: Tensor, factor_IO: Tensor) -> Tensor:
        raise RuntimeError("not on this processor")

    monkeypatch.setattr(cpu_products, "product", broken)
    has_means.cache_clear()
    try:
        assert not is_large(factor())
    finally:
        has_means.cache_clear()


def test_gradients_flow_through_large_factors() -> None:
    torch.manual_seed(0)
    inputs_TI, a_IR, b_RO = torch.randn(4, WIDE, requires_grad=True), factor(), factor(RANK, WIDE)
    outputs_TO = torch.zeros(4, WIDE)
    add_expanded(outputs_TO, shrunk(inputs_TI, a_IR), b_RO)
    [gradient_TI] = torch.autograd.grad(outputs_TO.sum(), inputs_TI)
    assert apart(gradient_TI, (a_IR @ b_RO.sum(1)).expand(4, -1)) < LOGITS[torch.float32]


@pytest.mark.parametrize(("tokens", "compiling"), [(200, False), (4, True)])
@torch.inference_mode()
def test_many_tokens_and_compilers_get_a_plain_product(
    monkeypatch: pytest.MonkeyPatch, tokens: int, compiling: bool
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    products = Products()
    with products:
        shrunk(torch.randn(tokens, WIDE), factor())
        add_expanded(torch.zeros(tokens, WIDE), torch.randn(tokens, RANK), factor(RANK, WIDE))
    assert products.counts["mkldnn._linear_pointwise.default"] == 0


@pytest.mark.skipif(not has_means(), reason="no oneDNN here")
@pytest.mark.parametrize("others", [0, 2])
@pytest.mark.parametrize(("tokens", "rank", "batched", "by_onednn"), [(1, RANK, 1, 0), (4, RANK, 0, 2), (4, 16, 0, 0)])
@torch.inference_mode()
def test_a_layer_with_an_adapter_computes_what_its_path_does(
    tokens: int, rank: int, batched: int, by_onednn: int, others: int
) -> None:
    """Alone, and beside rows of the base."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDE, WIDE).requires_grad_(False)
    path = LowRankPath(
        a_IR=factor(WIDE, rank),
        scaled_b_RO=factor(rank, WIDE) / WIDE,
        gain_O=torch.rand(WIDE),
        shift_O=torch.rand(WIDE),
    )
    router = Router(layer, None, stack_bytes=0)
    router.add("it", {layer: path})
    inputs_N1I, products = torch.randn(tokens + others, 1, WIDE), Products()
    with router.routed([*["it"] * tokens, *[None] * others], None), products:
        got_NO = layer(inputs_N1I)[:, 0]
    base_NO = layer(inputs_N1I)[:, 0]
    assert apart(got_NO[:tokens], path(inputs_N1I[:tokens, 0], base_NO[:tokens])) < LOGITS[torch.float32]
    assert torch.equal(got_NO[tokens:], base_NO[tokens:])
    assert apart(got_NO[:tokens], base_NO[:tokens]) > EFFECT  # Negative control.
    assert products.counts["aten.bmm.default"] == batched
    assert products.counts["mkldnn._linear_pointwise.default"] == by_onednn
