"""`lorafold export` and `lorafold inspect` as commands: what they write, print and refuse."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lorafold.cli import cli
from lorafold_adapters import AdapterManager
from lorafold_adapters.compose import Composition
from lorafold_adapters.stamp import STAMP_FILE
from tests.conftest import DEMO, RunningServer
from tests.kinds import WORKING
from tests.models import assert_same_weights, save_adapter, tiny_llama, weights_of
from tests.processes import lorafold
from tests.test_export_socket import folder, own  # noqa: F401  The server that may export.

BASE = str(DEMO / "base")
UPPER = str(DEMO / "upper")
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def progress_bars() -> Iterator[None]:
    """The commands switch transformers' own off."""
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A tiny base, with no tokenizer."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def facts_of(*arguments: str) -> dict[str, Any]:
    done = run("inspect", *arguments, "--json")
    facts: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == bool(facts["refusals"])
    return facts


def test_export_writes_the_folded_base_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("export", "--base", BASE, "--adapter", UPPER, "--out", str(out), "--shard-size", "0.5MB")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith(f"wrote {out}: 39 tensors, ")
    assert done.stdout.splitlines()[0].endswith(" files")
    model = AutoModelForCausalLM.from_pretrained(BASE)
    manager = AdapterManager(model)
    manager.load("upper", UPPER)
    manager.merge_adapter("upper")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(out), weights_of(model))
    assert (out / "tokenizer.json").read_bytes() == (DEMO / "base" / "tokenizer.json").read_bytes()
    said = json.loads((out / "lorafold.json").read_text())
    assert (said["base"]["name"], said["adapters"][0]["name"]) == ("base", "upper")


def test_export_in_another_dtype_as_json(tmp_path: Path) -> None:
    arguments = ("--base", BASE, "--adapter", UPPER, "--out", str(tmp_path / "out"), "--dtype", "bfloat16")
    done = json.loads(run("export", *arguments, "--json").stdout)
    assert done["files"] == ["model.safetensors"]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(model.dtype) == "torch.bfloat16"
    assert done["bytes"] == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_a_composition_is_exported_with_its_parts_and_options(tmp_path: Path) -> None:
    parts = ["--part", f"{DEMO / 'upper'}:0.75", "--part", str(DEMO / "rot13")]
    options = ["--compose", "ties", *parts, "--density", "0.5", "--out", str(tmp_path / "out")]
    done = run("export", "--base", BASE, *options)
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "out" / "lorafold.json").read_text())
    assert (facts["method"], facts["options"]) == ("ties", {"density": 0.5})
    assert [(part["name"], part["weight"]) for part in facts["adapters"]] == [("upper", 0.75), ("rot13", 1.0)]
    model = AutoModelForCausalLM.from_pretrained(BASE)
    before = weights_of(model)
    manager = AdapterManager(model)
    bound = manager.compose(
        [(manager.bind(DEMO / "upper"), 0.75), (manager.bind(DEMO / "rot13"), 1.0)],
        Composition(method="ties", density=0.5),
    )
    assert facts["adapter_digest"] == bound.digest
    manager.load("both", bound)
    manager.merge_adapter("both")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_weights(exported, weights_of(model))
    with pytest.raises(AssertionError):
        assert_same_weights(exported, before)  # Negative control.


def test_a_base_without_a_tokenizer_is_exported_with_a_word(base: str, adapter_on_llama: Make, tmp_path: Path) -> None:
    adapter = adapter_on_llama(target_modules=["q_proj"])
    done = run("export", "--base", base, "--adapter", str(adapter), "--out", str(tmp_path / "out"))
    assert done.exit_code == 0
    assert "no tokenizer" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_server_exports_its_deployment(own: RunningServer, folder: Path) -> None:  # noqa: F811
    done = run("export", "--deployment", "upper", "--out", "by-cli", "--address", own.address)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"wrote {folder / 'by-cli'}: 39 tensors")
    again = run("export", "--deployment", "upper", "--out", "by-cli", "--address", own.address)
    assert again.exit_code == 1
    assert "choose another folder" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--base", BASE], 2, "give either --base with --adapter or --compose, or --deployment"),
        (["--deployment", "upper", "--base", BASE], 2, "give either"),
        (["--base", BASE, "--adapter", UPPER, "--shard-size", "tiny"], 2, "is no size"),
        (["--base", BASE, "--adapter", "nowhere"], 1, "no adapter folder"),
        (["--base", "no/such/model", "--adapter", UPPER], 1, "no folder here"),
        (["--base", BASE, "--compose", "linear", "--part", f"{UPPER}:abc"], 2, "'abc' is no weight"),
    ],
)
def test_a_mistake_in_export_is_one_sentence(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = run("export", *arguments, "--out", str(tmp_path / "out"))
    assert (done.exit_code, done.stdout) == (code, "")
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_is_refused_before_the_base_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = run("export", "--base", "no/such/model", "--adapter", UPPER, "--out", str(tmp_path))
    assert done.exit_code == 1
    assert "not empty" in done.stderr


def test_inspect_says_what_the_folder_alone_says(adapter_on_llama: Make) -> None:
    pattern = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 32}}
    folder_ = adapter_on_llama(target_modules=["q_proj", "v_proj"], use_rslora=True, **pattern)
    facts = facts_of(str(folder_))
    assert (facts["kind"], facts["targets"], facts["tensors"]) == ("LORA+rslora+patterns", ["q_proj", "v_proj"], 8)
    assert facts["ranks"] == {"1": 2, "4": 2}
    scales = {row["pattern"]: (row["rank"], row["alpha"], row["scale"]) for row in facts["scales"]}
    assert scales == {"": (4, 8, 4), "q_proj": (1, 8, 8), "v_proj": (4, 32, 16)}
    assert facts["stamp"] is None
    assert "base" not in facts


def test_inspect_on_a_base_says_what_a_server_would_do(base: str, adapter_on_llama: Make) -> None:
    facts = facts_of(str(adapter_on_llama(target_modules=["q_proj", "v_proj"])), "--base", base)
    assert facts["bound"] == {"bound": 4, "targeted": 4}
    assert (facts["match"], facts["modes"]) == ("unstamped", {"merged": "yes", "unmerged": "yes"})
    assert facts["modules"] == [{"rank": 4, "scale": 2.0, "modules": 4}]
    assert facts["fidelity"]["delta_error"] < 1e-5
    flops = 2 * 2 * 4 * ((64 + 64) + (64 + 32))
    assert facts["two_path"] == {"flops_per_token": flops, "bytes_per_token": 2 * flops}
    assert facts["base_cost"]["flops_per_token"] > flops


def test_what_each_mode_refuses_is_said(base: str, tmp_path: Path) -> None:
    loha = WORKING["LoHa"].save(tmp_path / "loha")
    facts = facts_of(str(loha), "--base", base)
    assert facts["modes"]["merged"] == "yes"
    assert "no low-rank form" in facts["modes"]["unmerged"]
    assert (facts["two_path"], facts["refusals"]) == (None, [])
    biased = WORKING["`lora_bias`, where it has none"].save(tmp_path / "biased")
    facts = facts_of(str(biased), "--base", base)
    assert "adds a bias" in facts["modes"]["merged"]
    assert (facts["modes"]["unmerged"], facts["fidelity"], facts["refusals"]) == ("yes", None, [])


def test_a_delta_that_bf16_loses_is_refused_merged_and_measured(base: str, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_llama(), tmp_path / "adapter", target_modules=["q_proj"], lora_alpha=1e-4)
    coarse = facts_of(str(adapter), "--base", base, "--dtype", "bfloat16")
    assert "too coarse" in coarse["modes"]["merged"]
    assert coarse["modes"]["unmerged"] == "yes"
    assert coarse["fidelity"]["delta_error"] > 0.5
    assert facts_of(str(adapter), "--base", base)["modes"]["merged"] == "yes"


def test_prompts_are_measured() -> None:
    exact = facts_of(UPPER, "--base", BASE, "--prompt", "Hello", "--prompt", "some text")["kl"]
    coarse = facts_of(UPPER, "--base", BASE, "--prompt", "Hello", "--prompt", "some text", "--dtype", "bfloat16")["kl"]
    assert exact["positions"] == coarse["positions"] > 12
    assert abs(exact["nats"]) < 1e-6 < coarse["nats"]


def test_modules_lists_every_parameter() -> None:
    assert len(facts_of(UPPER, "--base", BASE, "--modules")["parameters"]) == 28
    assert len(facts_of(UPPER, "--base", BASE)["parameters"]) == 5


def test_the_table_for_people_has_a_line_for_everything() -> None:
    done = run("inspect", UPPER, "--base", BASE, "--prompt", "Hello")
    assert done.exit_code == 0
    begins = [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert begins == [
        *["adapter", "kind", "rank", "scale", "targets", "tensors", "digest", "stamp"],
        *["base", "match", "bound", "merged", "unmerged", "fidelity", "two-path", "base", "KL"],
    ]
    assert "bound      28 of 28 modules" in done.stdout


def test_a_refused_adapter_still_says_what_can_be_known(tmp_path: Path, base: str) -> None:
    adapter = Path(shutil.copytree(DEMO / "upper", tmp_path / "adapter"))
    other = facts_of(str(adapter), "--base", base)
    assert (other["match"], other["ranks"]) == ("other base", {"8": 28})
    assert any("retrain it" in sentence for sentence in other["refusals"])
    stamp = (adapter / STAMP_FILE).read_text()
    (adapter / STAMP_FILE).write_text(stamp.replace(facts_of(UPPER)["digest"], "3f2a" * 16))
    for arguments in ([], ["--base", base]):
        (sentence,) = facts_of(str(adapter), *arguments)["refusals"]
        assert "was made for adapter 3f2a3f2a3f2a" in sentence
    options = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**options, "init_lora_weights": "pissa"}))
    (adapter / STAMP_FILE).unlink()
    pissa = facts_of(str(adapter))
    assert (pissa["tensors"], len(pissa["refusals"])) == (56, 1)
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    damaged = facts_of(str(adapter), "--base", base)
    assert (damaged["tensors"], damaged["digest"], len(damaged["refusals"])) == (0, None, 2)
    assert damaged["scales"][0]["scale"] == 2


def test_a_refusal_is_on_stderr_and_is_the_exit_status(tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(DEMO / "upper", tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").unlink()
    done = lorafold("inspect", str(adapter))
    assert done.returncode == 1
    assert "rank 8" in done.stdout
    assert done.stderr.count("\n") == 1
    assert "adapter_model.safetensors" in done.stderr
    nowhere = lorafold("inspect", str(tmp_path / "nowhere"))
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert "no adapter folder" in nowhere.stderr
