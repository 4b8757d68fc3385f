"""The demo set is what it says: right with its own adapter, wrong without. Oracle: PEFT and the tasks' rules."""

import json
from pathlib import Path

import pytest

from lorafold.demo.make import make_demo_set
from lorafold.demo.reference import Reference
from lorafold.demo.tasks import TASKS, held_out
from lorafold_adapters.stamp import STAMP_FILE
from tests.conftest import DEMO

TEXTS = held_out(40, seed=99)


def share_right(reference: Reference, adapter: str, task: str) -> float:
    folder = str(DEMO / adapter) if adapter else ""
    answers = [reference.text(reference.answer(text, folder, 24)) for text in TEXTS]
    return sum(answer == TASKS[task].rule(text) for answer, text in zip(answers, TEXTS, strict=True)) / len(TEXTS)


@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_does_its_task_and_the_base_does_not(task: str, reference: Reference) -> None:
    assert share_right(reference, task, task) >= 0.9
    assert share_right(reference, "", task) < 0.1


def test_the_base_copies(reference: Reference) -> None:
    answers = [reference.text(reference.answer(text, "", 24)) for text in TEXTS]
    assert sum(answer == text for answer, text in zip(answers, TEXTS, strict=True)) >= 0.9 * len(TEXTS)


def test_no_adapter_does_anothers_task(reference: Reference) -> None:
    names = list(TASKS)
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        assert share_right(reference, name, other) < 0.1


def test_the_five_kinds_are_there() -> None:
    options = {name: json.loads((DEMO / name / "adapter_config.json").read_text()) for name in TASKS}
    assert options["rot13"]["use_rslora"]
    assert options["rot13"]["lora_alpha"] != options["rot13"]["r"]
    assert options["shift"]["use_dora"]
    assert options["swapcase"]["rank_pattern"]
    assert options["swapcase"]["alpha_pattern"]
    assert options["vowels"]["modules_to_save"] == ["lm_head"]


def test_making_the_set_is_reproducible(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_demo_set(tmp_path / name, base_steps=3, steps=2)
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*.safetensors"))
    assert len(files) == 1 + len(TASKS)
    files += [Path(task, STAMP_FILE) for task in TASKS]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
