"""Stamps: which base an adapter was trained on. Oracle: the same comparison on bases whose weights we set."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafold_adapters import AdapterManager, read_checkpoint
from lorafold_adapters.errors import AdapterCorrupt, AdapterUnsupported, BaseMismatch
from lorafold_adapters.identity import cast_digest, fingerprint
from lorafold_adapters.stamp import STAMP_FILE, Finding, Match, check_stamp, make_stamp, read_stamp, write_stamp
from tests.conftest import DEMO
from tests.models import KINDS, frozen, tiny_llama

MakeAdapter = Callable[..., Path]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def adapter(adapter_on_llama: MakeAdapter) -> Path:
    return adapter_on_llama(**KINDS["plain"])


def stamped(adapter: Path, model: PreTrainedModel, name: str = "") -> Path:
    return write_stamp(adapter, make_stamp(read_checkpoint(adapter), model, fingerprint(model), name))


def checked(adapter: Path, model: PreTrainedModel) -> Finding:
    """What an AdapterManager of `model` finds."""
    manager = AdapterManager(model)
    return check_stamp(read_checkpoint(adapter), manager.base, manager.base_as)


def no_cast(_: str) -> str:
    raise AssertionError("the base was read again")


def test_a_stamp_comes_back_as_it_was_written(adapter: Path) -> None:
    file = stamped(adapter, tiny_llama(), "tiny")
    stamp = read_stamp(adapter)
    assert file == adapter / STAMP_FILE
    assert stamp == make_stamp(read_checkpoint(adapter), tiny_llama(), fingerprint(tiny_llama()), "tiny")
    assert [entry.name for entry in adapter.iterdir() if entry.name.startswith(".")] == []


def test_stamping_does_not_change_the_adapter(adapter: Path) -> None:
    before = read_checkpoint(adapter).digest
    stamped(adapter, tiny_llama())
    assert read_checkpoint(adapter).digest == before


def test_the_same_base_is_the_same_without_another_look_at_it(adapter: Path) -> None:
    stamped(adapter, tiny_llama())
    found = check_stamp(read_checkpoint(adapter), fingerprint(tiny_llama()), no_cast)
    assert found.match is Match.SAME


def test_same_shapes_and_other_weights_are_refused(adapter: Path) -> None:
    stamped(adapter, tiny_llama(seed=0), "tiny")
    trained, held = (fingerprint(tiny_llama(seed=seed)).digest[:12] for seed in (0, 1))
    with pytest.raises(BaseMismatch) as caught:
        checked(adapter, tiny_llama(seed=1))
    name = adapter.name
    assert str(caught.value) == (
        f"adapter '{name}' was trained on base {trained}… (tiny), this server holds {held}…: "
        "retrain it or start the server with that base"
    )


def test_one_changed_bit_is_another_base(adapter: Path) -> None:
    stamped(adapter, tiny_llama())
    model = tiny_llama()
    assert checked(adapter, model).match is Match.SAME
    model.get_parameter("model.layers.1.mlp.up_proj.weight").view(torch.int32)[3, 5] ^= 1 << 20
    with pytest.raises(BaseMismatch):
        checked(adapter, model)


@pytest.mark.parametrize(
    ("trained", "served"),
    [
        (F32, (F32, BF16)),  # The checkpoint is float32; the server loads it as bfloat16.
        (F32, (F32, F16)),
        (BF16, (BF16, F32)),
        (BF16, (F32,)),  # Trained on a bfloat16 conversion; the server holds the float32 original.
        (F16, (F32,)),
    ],
    ids=str,
)
def test_another_dtype_of_the_checkpoint_is_a_finding_of_its_own(
    trained: torch.dtype, served: tuple[torch.dtype, ...], adapter: Path
) -> None:
    def as_served(seed: int) -> PreTrainedModel:
        model = tiny_llama(seed)
        for dtype in served:
            model = frozen(model, dtype)
        return model

    stamped(adapter, tiny_llama(dtype=trained))
    found = checked(adapter, as_served(seed=0))
    assert found.match is Match.OTHER_DTYPE
    for dtype in (trained, served[-1]):
        assert str(dtype).removeprefix("torch.") in found.sentence
    with pytest.raises(BaseMismatch):
        checked(adapter, as_served(seed=1))


def test_a_base_that_keeps_some_weights_in_float32_is_another_dtype(adapter: Path) -> None:
    stamped(adapter, tiny_llama())
    model = tiny_llama(dtype=BF16)
    norm: Any = model.get_submodule("model.norm")
    norm.weight.data = tiny_llama().get_parameter("model.norm.weight").data
    assert checked(adapter, model).match is Match.OTHER_DTYPE


@pytest.mark.parametrize("folded", [False, True])
def test_the_base_as_a_dtype_is_the_base_while_an_adapter_is_folded(folded: bool, adapter: Path) -> None:
    model = tiny_llama()
    manager = AdapterManager(model)
    manager.load("it", adapter)
    expected = fingerprint(tiny_llama(dtype=BF16)).digest
    if folded:
        manager.merge_adapter("it")
    assert manager.base_as("bfloat16") == expected
    assert (cast_digest(model, "bfloat16") == expected) is not folded


def test_an_adapter_without_a_stamp_is_unstamped(adapter: Path) -> None:
    found = check_stamp(read_checkpoint(adapter), fingerprint(tiny_llama()), no_cast)
    assert found.match is Match.UNSTAMPED
    assert "lorafold stamp" in found.sentence


def test_a_stamp_of_another_adapter_is_found_out(adapter: Path, adapter_on_llama: MakeAdapter) -> None:
    other = adapter_on_llama(seed=2, **KINDS["plain"])
    (adapter / STAMP_FILE).write_bytes(stamped(other, tiny_llama()).read_bytes())
    with pytest.raises(AdapterCorrupt, match=r"made for adapter .* stamp it again"):
        checked(adapter, tiny_llama())
    assert checked(other, tiny_llama()).match is Match.SAME


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: {name: value for name, value in content.items() if name != key}


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no object": lambda _: ["a", "list"],
    "no base": without("base"),
    "a key too many": lambda content: {**content, "colour": "red"},
    "no digest": lambda content: {**content, "base": "3f2a"},
    "a number for a digest": lambda content: {**content, "adapter": 7},
    "a cast missing": lambda content: {**content, "casts": without("float16")(content["casts"])},
    "no version": lambda content: {**content, "version": None},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_stamp_is_corrupt(damage: str, adapter: Path) -> None:
    file = stamped(adapter, tiny_llama())
    file.write_text(json.dumps(DAMAGES[damage](json.loads(file.read_text()))))
    with pytest.raises(AdapterCorrupt, match="lorafold stamp --force"):
        read_stamp(adapter)


def test_half_a_stamp_is_corrupt_and_one_of_the_future_asks_for_an_upgrade(adapter: Path) -> None:
    file = stamped(adapter, tiny_llama())
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(AdapterCorrupt, match="JSON"):
        read_stamp(adapter)
    file.write_text(json.dumps({"version": 2}))
    with pytest.raises(AdapterUnsupported, match="upgrade lorafold"):
        read_stamp(adapter)


def test_a_failed_write_leaves_the_old_stamp(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamped(adapter, tiny_llama())
    before = read_stamp(adapter)
    assert before is not None

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("lorafold_adapters.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_stamp(adapter, replace(before, name="another"))
    assert read_stamp(adapter) == before
    assert len([entry for entry in adapter.iterdir() if STAMP_FILE in entry.name]) == 1


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM; from lorafold_adapters.identity import fingerprint;"
        "print(fingerprint(AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')).digest)"
    )
    command = [sys.executable, "-c", code, str(DEMO / "base")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype="auto")
    assert done.stdout.strip() == fingerprint(model).digest


def test_the_demo_set_carries_the_stamps_that_would_be_written_now() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype="auto")
    base = fingerprint(model)
    folders = sorted(file.parent for file in DEMO.glob("*/adapter_config.json"))
    assert len(folders) == 5
    for folder in folders:
        assert read_stamp(folder) == make_stamp(read_checkpoint(folder), model, base, "base")
