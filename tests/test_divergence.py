"""KL divergence of folded against two-path distributions: exact bases have none, coarse ones show what they lose."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorafold_adapters import AdapterManager
from lorafold_adapters.errors import AdapterUnsupported
from lorafold_adapters.fidelity import divergence, kl_divergence
from tests.kinds import WORKING
from tests.models import ALL_LINEAR, assert_same_weights, logits_of, prompts, save_adapter, tiny_llama, weights_of

Make = Callable[..., Path]


def manager_of(adapter: Path, dtype: torch.dtype) -> AdapterManager:
    manager = AdapterManager(tiny_llama(dtype=dtype), max_delta_error=math.inf)
    manager.load("it", adapter)
    return manager


def test_it_is_the_textbook_formula() -> None:
    meant, got = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).chunk(2)
    wanted = torch.nn.functional.kl_div(got.log_softmax(-1), meant.log_softmax(-1), log_target=True, reduction="none")
    assert divergence(meant, got) == pytest.approx(float(wanted.sum(-1).mean()), rel=1e-5)
    assert divergence(meant, meant) == 0
    assert divergence(meant, got) != pytest.approx(divergence(got, meant), rel=1e-3)


def test_an_fp32_base_has_none_to_speak_of(adapter_on_llama: Make) -> None:
    manager = manager_of(adapter_on_llama(target_modules=ALL_LINEAR), torch.float32)
    assert 0 <= kl_divergence(manager, "it", prompts(2, 12)) < 1e-9


def test_a_tiny_delta_on_a_bf16_base_is_lost_and_shows(tmp_path: Path) -> None:
    """The oracle of how much there is to lose is the same adapter on the same weights in fp32."""
    adapter = save_adapter(tiny_llama(), tmp_path, target_modules=ALL_LINEAR, lora_alpha=1)
    coarse, fine = manager_of(adapter, torch.bfloat16), manager_of(adapter, torch.float32)
    ids = prompts(2, 12)
    lost = kl_divergence(coarse, "it", ids)
    assert lost > 1e4 * abs(kl_divergence(fine, "it", ids))
    base = logits_of(fine.model, ids)
    fine.merge_adapter("it")
    assert lost < divergence(logits_of(fine.model, ids), base)


def test_it_leaves_folded_what_was_folded(adapter_on_llama: Make) -> None:
    manager = manager_of(adapter_on_llama(target_modules=["q_proj"]), torch.float32)
    base = weights_of(manager.model)
    kl_divergence(manager, "it", prompts(1, 4))
    assert_same_weights(manager.model, base)
    manager.load("other", adapter_on_llama(seed=5, target_modules=["v_proj"]))
    manager.merge_adapter("other")
    folded = weights_of(manager.model)
    kl_divergence(manager, "it", prompts(1, 4))
    assert manager.fold_state.folded == "other"
    assert_same_weights(manager.model, folded)


def test_an_adapter_with_one_form_only_has_no_divergence(tmp_path: Path) -> None:
    manager = manager_of(WORKING["LoHa"].save(tmp_path), torch.float32)
    with pytest.raises(AdapterUnsupported, match="cannot be routed"):
        kl_divergence(manager, "it", prompts(1, 4))
