"""The arithmetic of `bench.throughput`, untimed: what a decode step is, what memory must give, what is missed."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from bench.low_rank import write_low_rank
from bench.models import shaped, shell
from bench.roofline import bytes_per_step
from bench.targets import missed
from bench.work import Run, drawn, share_equal
from lorafold_adapters import AdapterManager
from tests.tolerances import EFFECT, LOGITS


def run(*times: tuple[float, ...]) -> Run:
    return Run(tokens=tuple((7,) * len(row) for row in times), times=times, start=0.0)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_reading_a_prompt_is_no_part_of_a_decode_step() -> None:
    assert run((5.0, 6.0, 7.0, 8.0)).step_seconds == 1.0


def test_rows_that_are_told_of_a_step_one_after_the_other_pace_as_one() -> None:
    rows = [tuple(step + 0.1 * row for step in range(1, 7)) for row in range(8)]
    assert run(*rows).step_seconds == pytest.approx(1.0)


def test_the_time_before_the_last_row_began_and_after_the_first_ended_does_not_count() -> None:
    early, late = (1.0, 4.0, 5.0, 6.0), (4.0, 5.0, 6.0, 6.1)
    assert run(early, late).step_seconds == 1.0


def test_rows_that_never_decode_together_have_no_step() -> None:
    with pytest.raises(ValueError, match="longer answers"):
        _ = run((1.0, 2.0), (3.0, 4.0)).step_seconds


def test_work_is_the_same_every_time_and_its_rows_are_not() -> None:
    work = drawn(4, 16, 8, vocabulary=1000)
    assert work == drawn(4, 16, 8, vocabulary=1000)
    assert len(set(work.prompts)) == 4


def test_a_row_with_one_other_token_is_not_equal() -> None:
    times = ((1.0, 2.0), (1.0, 2.0))
    one = Run(tokens=((1, 2), (3, 4)), times=times, start=0.0)
    other = Run(tokens=((1, 2), (3, 5)), times=times, start=0.0)
    assert share_equal(one, one) == 1.0
    assert share_equal(one, other) == 0.5


def test_a_step_reads_every_weight_but_the_embedding_table() -> None:
    model = shaped("tiny", torch.device("meta"), torch.bfloat16)
    table = model.model.embed_tokens.weight
    assert bytes_per_step(model, 3) == 2 * (model.num_parameters() - table.numel() + 3 * 256)


def test_a_shell_has_its_own_modules_over_the_same_tensors() -> None:
    model = shaped("tiny", torch.device("cpu"), torch.float32)
    other = shell(model)
    assert other.model.layers[0] is not model.model.layers[0]
    assert all(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_adapters_to_measure_with_mean_the_same_to_peft(tmp_path: Path) -> None:
    model = shaped("tiny", torch.device("cpu"), torch.float32)
    ids = torch.arange(16)[None]
    base = model(ids).logits
    folder = write_low_rank(model, tmp_path / "adapter", seed=1, rank=16)
    expected = PeftModel.from_pretrained(shell(model), str(folder))(ids).logits
    manager = AdapterManager(model)
    manager.load("adapter", folder)
    manager.merge_adapter("adapter")
    assert largest_difference(model(ids).logits, expected) <= LOGITS[torch.float32]
    assert largest_difference(base, expected) >= EFFECT


def test_only_what_is_below_its_target_is_missed() -> None:
    found = {"over_generate": {"1": 1.0, "8": 1.09}, "merged_over_base": 1.02, "roofline_share": None}
    lines = list(missed(found, "cpu"))
    assert [line.split(" is ")[0] for line in lines] == ["over_generate at batch 8", "merged_over_base"]
