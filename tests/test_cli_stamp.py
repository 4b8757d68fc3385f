"""`lorafold stamp` as a person uses it: real processes, one sentence for each mistake."""

import json
import shutil
from pathlib import Path

import pytest

from lorafold_adapters.stamp import STAMP_FILE, read_stamp
from tests.conftest import DEMO
from tests.models import tiny_llama
from tests.processes import lorafold

BASE = str(DEMO / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The demo's 'upper' without its stamp."""
    folder = Path(shutil.copytree(DEMO / "upper", tmp_path / "adapter"))
    (folder / STAMP_FILE).unlink()
    return folder


def test_stamp_writes_the_base_and_says_so_in_two_lines(adapter: Path) -> None:
    done = lorafold("stamp", str(adapter), "--base", BASE)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2
    assert "28 modules" in done.stdout
    assert (adapter / STAMP_FILE).read_bytes() == (DEMO / "upper" / STAMP_FILE).read_bytes()
    again = lorafold("stamp", str(adapter), "--base", BASE, "--json")
    stamp = read_stamp(adapter)
    assert stamp is not None
    assert json.loads(again.stdout) == {
        "file": str(adapter / STAMP_FILE),
        "adapter_digest": stamp.adapter,
        "base_digest": stamp.base,
        "dtype": "float32",
        "bound_modules": 28,
    }


def test_a_stamp_for_another_base_is_replaced_only_by_force(adapter: Path) -> None:
    file = adapter / STAMP_FILE
    right = (DEMO / "upper" / STAMP_FILE).read_text()
    base = json.loads(right)["base"]
    wrong = right.replace(base, "3f2a" * 16)
    file.write_text(wrong)
    done = lorafold("stamp", str(adapter), "--base", BASE)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"has a stamp for base 3f2a3f2a3f2a… and this is {base[:12]}…: give --force" in done.stderr
    assert file.read_text() == wrong
    assert lorafold("stamp", str(adapter), "--base", BASE, "--force").returncode == 0
    assert file.read_text() == right


def test_an_adapter_that_does_not_fit_is_not_stamped(adapter: Path, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "other")
    done = lorafold("stamp", str(adapter), "--base", str(tmp_path / "other"))
    assert done.returncode == 1
    assert "this base" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (adapter / STAMP_FILE).exists()


@pytest.mark.parametrize(
    ("adapter_name", "base", "words"),
    [
        ("nowhere", BASE, "no adapter folder"),
        ("adapter", str(DEMO / "upper"), "is a PEFT adapter"),
        ("adapter", "no/such/model", "no folder here"),
        ("adapter", "nobody/nowhere", "cannot load the base model"),
    ],
)
def test_a_mistake_is_one_sentence(adapter_name: str, base: str, words: str, adapter: Path) -> None:
    done = lorafold("stamp", str(adapter.parent / adapter_name), "--base", base, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_stamp_is_replaced_only_by_force(adapter: Path) -> None:
    (adapter / STAMP_FILE).write_text("{")
    done = lorafold("stamp", str(adapter), "--base", BASE)
    assert done.returncode == 1
    assert "--force" in done.stderr
    assert lorafold("stamp", str(adapter), "--base", BASE, "--force").returncode == 0
    assert read_stamp(adapter) is not None
