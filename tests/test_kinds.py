"""Every row of docs/adapters.md: it works in the modes the row says, equal to PEFT, or is refused with its sentence."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lorafold_adapters import AdapterManager, read_checkpoint
from lorafold_adapters.errors import AdapterUnsupported
from tests.kinds import REFUSED, WORKING
from tests.models import (
    ALL_LINEAR,
    apart,
    assert_same_weights,
    logits_of,
    prompts,
    save_adapter,
    tiny_llama,
    weights_of,
)
from tests.tolerances import EFFECT, LOGITS

TABLE = Path(__file__).parents[1] / "docs" / "adapters.md"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WORKING)
def test_it_equals_peft_in_each_mode_it_has(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind = WORKING[name]
    folder, ids = kind.save(tmp_path), prompts(2, 9)
    oracle = PeftModel.from_pretrained(kind.base(dtype=dtype), str(folder), autocast_adapter_dtype=False).eval()
    expected = logits_of(oracle, ids)
    model = kind.base(dtype=dtype)
    plain, before = logits_of(model, ids), weights_of(model)
    assert apart(plain, expected) > EFFECT  # Negative control: the adapter does something.

    manager = AdapterManager(model)
    bound = manager.load("it", folder)
    assert bound.bound == bound.targeted > 0
    assert (bound.fold_refusal is None, bound.route_refusal is None) == (kind.folded, kind.routed)
    if kind.routed:
        with manager.routed(["it", "it"]):
            assert apart(logits_of(model, ids), expected) < LOGITS[dtype]
    else:
        with pytest.raises(AdapterUnsupported, match="no low-rank form"):
            manager.routed(["it", "it"]).__enter__()
    if kind.folded:
        manager.merge_adapter("it")
        assert apart(logits_of(model, ids), expected) < LOGITS[dtype]
        assert manager.unmerge_adapter()
    else:
        with pytest.raises(AdapterUnsupported, match=kind.fold_refusal):
            manager.merge_adapter("it")
    assert torch.equal(logits_of(model, ids), plain)
    assert_same_weights(model, before)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_its_sentence(name: str, tmp_path: Path) -> None:
    save_adapter(tiny_llama(), tmp_path, target_modules=["q_proj"])
    read_checkpoint(tmp_path)  # Negative control: without the option it is served.
    options, sentence = REFUSED[name]
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    with pytest.raises(AdapterUnsupported, match=sentence):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_adapter_is_plain_lora(init: Any, tmp_path: Path) -> None:
    """PEFT trains these against a rewritten base and can save them as updates of the original one."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=ALL_LINEAR, init_lora_weights=init)
    adapted = get_peft_model(tiny_llama(), config)
    adapted.save_pretrained(str(tmp_path / "unconverted"))
    config.init_lora_weights = True
    adapted.save_pretrained(str(tmp_path / "start"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.15 * torch.randn_like(parameter))
    expected = logits_of(adapted.eval(), prompts(1, 9))
    adapted.save_pretrained(str(tmp_path / "done"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = tiny_llama()
    assert apart(logits_of(model, prompts(1, 9)), expected) > EFFECT
    manager = AdapterManager(model)
    manager.load("it", tmp_path / "done")
    manager.merge_adapter("it")
    assert apart(logits_of(model, prompts(1, 9)), expected) < 10 * LOGITS[torch.float32]  # Two subtractions more.
    with pytest.raises(AdapterUnsupported, match="convert"):
        manager.load("it", tmp_path / "unconverted")


@pytest.mark.parametrize("dropped", [("use_dora", "use_rslora", "lora_bias", "peft_version"), ("rank_pattern", "bias")])
def test_a_folder_of_an_older_peft_lacks_options_that_came_later(dropped: tuple[str, ...], tmp_path: Path) -> None:
    save_adapter(tiny_llama(), tmp_path, target_modules=["q_proj"])
    expected = AdapterManager(tiny_llama()).bind(tmp_path)
    file = tmp_path / "adapter_config.json"
    options = {key: value for key, value in json.loads(file.read_text()).items() if key not in dropped}
    file.write_text(json.dumps({**options, "merge_weights": True, "enable_lora": None}))
    bound = AdapterManager(tiny_llama()).bind(tmp_path)
    for name, update in expected.updates.items():
        assert all(map(torch.equal, bound.updates[name].tensors(), update.tensors()))


def test_the_table_has_these_rows_and_no_others() -> None:
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \|", TABLE.read_text(), re.MULTILINE)
    table = {kind: (merged, unmerged) for kind, merged, unmerged in rows if kind not in ("kind", "---")}
    assert table.keys() == WORKING.keys() | REFUSED.keys()
    for name, kind in WORKING.items():
        assert [mode == "yes" for mode in table[name]] == [kind.folded, kind.routed], name
    for name in REFUSED:
        assert table[name] == ("refused", "refused")
