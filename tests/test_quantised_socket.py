"""A quantised base behind a real socket, in both modes. Oracle: PEFT's greedy decoding on the same quantised base."""

import importlib.util
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from structlog.testing import capture_logs

from lorafold.config import BaseConfig
from lorafold.errors import ConfigError, ModelUnsupported
from lorafold.model import LoadedBase, load_base
from lorafold.parts import attach
from lorafold.v1 import weights_pb2
from lorafold_adapters.fingerprint_cache import cache_entry, model_files
from tests.conftest import DEMO, demo_config, serving

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
Kind = Literal["nf4", "int8"]
TASK = "rot13"


def loaded(kind: Literal["none", "nf4", "int8"]) -> LoadedBase:
    return load_base(BaseConfig(model=str(DEMO / "base"), device="cpu", quantise=kind), str(DEMO / "base"))


@torch.no_grad()
def greedy(base: LoadedBase, adapter: Path | None, text: str, steps: int) -> str:
    model: Any = base.model
    model.set_attn_implementation("eager")
    model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter)).eval()
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        if int(ids[0, -1]) in base.vocabulary().end_of_sequence:
            ids = ids[:, :-1]
            break
    return base.decode(ids[0, start:].tolist())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_both_modes_answer_as_peft_does(kind: Kind) -> None:
    names: dict[str, str] = {"folded": "merged", "beside": "unmerged"}
    config = demo_config(
        base={"model": str(DEMO / "base"), "device": "cpu", "quantise": kind},
        deployments=[{"name": name, "adapter": str(DEMO / TASK), "policy": mode} for name, mode in names.items()],
    )
    expected = greedy(loaded(kind), DEMO / TASK, "Hello", 8)
    with capture_logs() as logs, serving(config) as own:
        assert any("was trained on this base before it was quantised" in line["event"] for line in logs)
        for name, mode in names.items():
            answer = own.client.generate("Hello", deployment=name, max_tokens=8)
            assert (answer.text, answer.mode) == (expected, mode)
        assert own.client.generate("Hello", max_tokens=8).text == greedy(loaded(kind), None, "Hello", 8) != expected
        weights = own.client.stubs.weights
        held = weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="folded")).fold_state
        assert held.provenance == "dequantised base"
        weights.UnmergeAdapter(weights_pb2.UnmergeAdapterRequest())
        assert weights.VerifyBase(weights_pb2.VerifyBaseRequest()).restored


def test_a_base_that_is_not_quantised_has_no_provenance() -> None:
    with serving(demo_config(deployments=[])) as own:
        state = own.client.stubs.weights.GetFoldState(weights_pb2.GetFoldStateRequest()).fold_state
        assert state.provenance == ""


def test_the_remembered_fingerprint_is_that_of_the_quantisation(tmp_path: Path) -> None:
    """The files are the same; what is in memory is not."""
    keys, digests = set(), set()
    kinds: tuple[Literal["none", "nf4", "int8"], ...] = ("none", "nf4", "int8", "nf4")
    for kind in kinds:
        files = model_files(str(DEMO / "base"))
        model = loaded(kind).model
        entry = cache_entry(tmp_path, model, files, files)
        keys.add(entry.key)
        manager = attach(model, entry)
        assert manager.verify_base() == []
        digests.add(manager.base.digest)
    assert len(keys) == len(digests) == 3


def test_a_quantised_checkpoint_is_loaded_as_it_is(tmp_path: Path) -> None:
    base = loaded("nf4")
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    again = load_base(BaseConfig(model=str(tmp_path), device="cpu"), str(tmp_path))
    entry = cache_entry(tmp_path / "cache", again.model, [], [])
    assert attach(again.model, entry).base.digest == attach(base.model, entry).base.digest
    with pytest.raises(ModelUnsupported, match="quantised already"):
        load_base(BaseConfig(model=str(tmp_path), device="cpu", quantise="int8"), str(tmp_path))
    with pytest.raises(ConfigError, match=r"fold\.provenance"):
        attach(again.model, entry, demo_config(fold={"provenance": "16-bit checkpoint"}))


def test_without_bitsandbytes_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelUnsupported, match="pip install bitsandbytes"):
        loaded("nf4")
