"""What is refused before it reaches a model, each with a sentence that names the file or option and the remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafold_adapters import AdapterManager, read_checkpoint
from lorafold_adapters.errors import AdapterCorrupt, AdapterError, AdapterNotFound, AdapterUnsupported, BaseMismatch
from tests.models import KINDS, save_adapter, tiny_llama

MakeAdapter = Callable[..., Path]


@pytest.fixture
def adapter(adapter_on_llama: MakeAdapter, tmp_path: Path) -> Path:
    """A good adapter of its own for each test to spoil."""
    return Path(shutil.copytree(adapter_on_llama(**KINDS["all-linear"]), tmp_path / "adapter"))


def set_options(adapter: Path, **options: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def test_a_good_adapter_is_read(adapter: Path) -> None:
    checkpoint = read_checkpoint(adapter)
    assert checkpoint.kind == "LORA"
    assert len(checkpoint.digest) == 64
    assert len(checkpoint.tensors) == 28


def test_the_digest_is_of_options_and_tensors(adapter: Path) -> None:
    digests = {read_checkpoint(adapter).digest, read_checkpoint(adapter).digest}
    assert len(digests) == 1
    set_options(adapter, lora_alpha=9)
    digests.add(read_checkpoint(adapter).digest)
    change_tensors(adapter, lambda tensors: next(iter(tensors.values())).view(-1)[0].add_(1e-6))
    digests.add(read_checkpoint(adapter).digest)
    assert len(digests) == 3


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="no adapter folder"):
        read_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file(adapter: Path, file: str) -> None:
    (adapter / file).unlink()
    with pytest.raises(AdapterNotFound, match=file):
        read_checkpoint(adapter)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_truncated_tensors(adapter: Path, share: float) -> None:
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(AdapterCorrupt, match="truncated or damaged"):
        read_checkpoint(adapter)


@pytest.mark.parametrize("content", ["{", "[]", '"text"', "\xff\xfe", "[" * 100_000])
def test_a_broken_configuration(adapter: Path, content: str) -> None:
    (adapter / "adapter_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(AdapterCorrupt, match=r"adapter_config\.json"):
        read_checkpoint(adapter)


def test_a_pickle_is_not_opened(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(AdapterUnsupported, match="safe_serialization"):
        read_checkpoint(adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(adapter: Path, value: float) -> None:
    change_tensors(adapter, lambda tensors: next(iter(tensors.values())).view(-1)[3:4].fill_(value))
    with pytest.raises(AdapterCorrupt, match="NaN or infinite"):
        read_checkpoint(adapter)


def test_integer_tensors(adapter: Path) -> None:
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        name = next(iter(tensors))
        tensors[name] = tensors[name].to(torch.int8)

    change_tensors(adapter, quantise)
    with pytest.raises(AdapterCorrupt, match="int8"):
        read_checkpoint(adapter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "VERA"}, "VERA"),
        ({"peft_type": None}, "None"),
        ({"warp_drive": True}, "warp_drive"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "QA-LoRA"),
    ],
)
def test_options_that_are_not_served(adapter: Path, options: dict[str, Any], message: str) -> None:
    set_options(adapter, **options)
    with pytest.raises(AdapterUnsupported, match=message):
        read_checkpoint(adapter)


def test_an_unknown_option_that_is_off_does_no_harm(adapter: Path) -> None:
    set_options(adapter, warp_drive=False, warp_factor=None)
    read_checkpoint(adapter)


def drop_a_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if "lora_B" in name)]


def add_a_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)


def change_a_rank(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "q_proj" in name]:
        tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [(drop_a_tensor, "which its files lack"), (add_a_tensor, r"layers\.7"), (change_a_rank, "rank 2 where")],
)
def test_tensors_that_contradict_the_configuration(
    adapter: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    change_tensors(adapter, change)
    with pytest.raises(AdapterError, match=message):
        AdapterManager(tiny_llama()).load("it", adapter)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": "("},
        {"rank_pattern": 3},
        {"rank_pattern": {"(": 3}},
        {"r": "four"},
        {"r": 0},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 1e300},
        {"use_rslora": "yes"},
        {"task_type": "X"},
        {"bias": "zzz"},
        {"layers_pattern": "layers"},
        {"megatron_config": {"a": 1}},
    ],
)
def test_a_configuration_that_peft_cannot_resolve(adapter: Path, options: dict[str, Any]) -> None:
    set_options(adapter, **options)
    with pytest.raises(AdapterError):
        AdapterManager(tiny_llama()).load("it", adapter)


def test_the_bases_own_head_in_an_adapter_is_compared_with_the_base(tmp_path: Path) -> None:
    adapter = save_adapter(tiny_llama(), tmp_path, embeddings=True, target_modules=["q_proj", "lm_head"])
    manager = AdapterManager(tiny_llama())
    assert manager.load("it", adapter).bound == 3
    manager.merge_adapter("it")
    manager.load("again", adapter)  # Compared with the base, not with what is folded.
    with pytest.raises(BaseMismatch, match=r"copy of its base's 'lm_head\.weight'"):
        AdapterManager(tiny_llama(seed=5)).load("it", adapter)
