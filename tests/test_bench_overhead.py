"""`bench.overhead`: what it times computes what it says, its limit is counted right, its report is true."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.decode_steps import Step
from bench.gauge import compared
from bench.grid import QUICK, TARGETS, Cell, Grid, Group, parsed, planned
from bench.overhead import changed_shapes, measure, needed, skeleton
from bench.overhead_bed import Bed, same
from bench.overhead_report import TIMED, Rates, estimate, found, headline, known, missed
from bench.roofline import Extra, extra

GROUP = Group(dtype="float32", targets="all", rank=4)
CELL = Cell(group=GROUP, batch=4, adapters=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    made = Bed("tiny", CPU, torch.float32, Grid(batches=(4,)), tmp_path_factory.mktemp("bed"))
    made.put_on(GROUP, 2)
    return made


def test_every_variant_computes_what_its_peer_does(bed: Bed) -> None:
    same(bed.steps(CELL))


def test_variants_that_do_not_compute_the_same_are_refused(bed: Bed) -> None:
    steps = bed.steps(CELL)
    with pytest.raises(RuntimeError, match="did not compute the same"):
        same({**steps, "unmerged": steps["merged"]})


def test_adapters_that_change_nothing_are_refused(bed: Bed) -> None:
    steps = bed.steps(CELL)
    with pytest.raises(RuntimeError, match="nothing was compared"):
        same({**steps, "unmerged": steps["merged"], "peft_unmerged": steps["peft_merged"]})
    with pytest.raises(RuntimeError, match="nothing was compared"):
        same({**{name: steps[name] for name in ("base", "transformers")}, **without_effect(steps)})


def without_effect(steps: dict[str, Step]) -> dict[str, Step]:
    """Steps of which the folded ones are the base's."""
    folded = {"merged": steps["base"], "peft_merged": steps["transformers"]}
    return folded | {name: steps[name] for name in ("unmerged", "peft_unmerged")}


def test_every_pair_is_complete_and_the_base_is_left_as_it_was(bed: Bed) -> None:
    (seconds,) = measure([bed.steps(CELL)], CPU, 0.0)
    assert set(seconds) == set(TIMED)
    assert len(seconds["merged"]) == len(seconds["unmerged"]) > 0
    assert len(seconds["peft_merged"]) == len(seconds["peft_unmerged"]) > 0
    assert all(taken > 0 for each in seconds.values() for taken in each)
    bed.ours.manager.unmerge_adapter()
    assert bed.ours.manager.verify_base() == []


@pytest.mark.parametrize("targets", TARGETS)
def test_the_limit_counts_the_bytes_of_a_checkpoint(tmp_path: Path, targets: str) -> None:
    bed = Bed("tiny", CPU, torch.float32, Grid(batches=(1,)), tmp_path)
    folder = bed.put_on(Group(dtype="float32", targets=targets, rank=4), 1)[0]
    stored = sum(tensor.nbytes for tensor in load_file(folder / "adapter_model.safetensors").values())
    more = extra(changed_shapes(skeleton("tiny"), targets), 4, rows=3, adapters=2, itemsize=4)
    assert more.nbytes == 2 * stored
    assert more.flops == 2 * 3 * stored // 4


def test_the_limit_is_the_slower_of_memory_and_arithmetic() -> None:
    more = Extra(nbytes=100, flops=1000)
    assert more.seconds(bandwidth=10, rate=1000) == 10
    assert more.seconds(bandwidth=1000, rate=10) == 100


def test_cells_are_named_by_rows_rank_adapters_and_what_is_unusual() -> None:
    unusual = Group(dtype="bfloat16", targets="qv", rank=64)
    assert Cell(group=Group(dtype="float32", targets="all", rank=16), batch=1, adapters=1).key == "b1_r16"
    assert Cell(group=unusual, batch=8, adapters=8).key == "b8_r64_a8_qv_bf16"


def test_no_batch_has_more_adapters_than_rows() -> None:
    cells = [cell for group in Grid().groups() for cell in Grid().cells(group)]
    assert all(cell.adapters <= cell.batch for cell in cells)
    assert len({cell.key for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "x"], "'x' is no list of numbers"),
        (["--adapters", "0"], "'0' is no list of numbers"),
        (["--targets", "qv,foo"], "there is no 'foo': use all,qv"),
        (["--batches", "1,4", "--adapters", "8"], "no batch has as many rows"),
        (["--shape", "vast"], "invalid choice: 'vast'"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    monkeypatch.setattr("sys.argv", ["overhead.py", *options])
    with pytest.raises(SystemExit):
        parsed(None)
    assert said in capsys.readouterr().err


def test_what_is_not_said_is_as_in_a_whole_or_a_quick_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["overhead.py", "--ranks", "4,64", "--targets", "qv"])
    assert planned(parsed(None)) == Grid(ranks=(4, 64), targets=("qv",))
    monkeypatch.setattr("sys.argv", ["overhead.py", "--quick"])
    assert planned(parsed(None)) == QUICK


def timings(unmerged: float, peft: float, noise: float = 0.0, count: int = 32) -> dict[str, list[float]]:
    """Steps of one second, folded, and what takes so much longer."""
    waves = [1 + noise * math.sin(2.4 * number) for number in range(count)]
    return {name: list(waves) for name in TIMED} | {"unmerged": [unmerged] * count, "peft_unmerged": [peft] * count}


def test_a_report_says_what_was_timed_and_is_json() -> None:
    rates = Rates(bandwidth=1e9, products=1e9)
    result = found(CELL, timings(1.1, 1.3), Extra(nbytes=10**7, flops=10**7), rates)
    said = json.loads(json.dumps(headline([result], {CELL.key: timings(1.1, 1.3)}), allow_nan=False))
    assert said["unmerged_over_merged"] == {"b4_r4_a2": 1.1}
    assert said["peft_unmerged_over_merged"] == {"b4_r4_a2": 1.3}
    assert said["ci95"] == {"b4_r4_a2": [1.1, 1.1]}
    assert said["merged_over_base"] == 1.0
    assert said["limit"] == {"b4_r4_a2": 1.01}
    assert said["peft_added_over_ours"] == {"b4_r4_a2": 3.0}
    assert said["missed"] == []


def test_what_is_lost_in_the_noise_is_not_compared() -> None:
    rates = Rates(bandwidth=1e9, products=1e9)
    assert found(CELL, timings(0.99, 1.3), Extra(nbytes=1, flops=1), rates)["peft_added_over_ours"] is None


def test_an_aim_that_is_missed_is_told() -> None:
    rates = Rates(bandwidth=1e9, products=1e9)
    slower = found(CELL, timings(1.4, 1.3), Extra(nbytes=1, flops=1), rates)
    assert list(missed(slower)) == ["b4_r4_a2: unmerged costs 1.4 times merged, PEFT's 1.3"]
    vague = found(CELL, timings(1.1, 1.3, noise=0.5), Extra(nbytes=1, flops=1), rates)
    assert len(list(missed(vague))) == 2


def test_measuring_goes_on_until_the_ratios_are_known() -> None:
    key = "unmerged_over_merged"
    assert known(key, timings(1.1, 1.3))
    assert not known(key, timings(1.1, 1.3, noise=0.5))
    assert not known(key, timings(1.1, 1.3, count=8))


def test_few_values_have_no_interval() -> None:
    assert estimate([1.0, 2.0, 3.0]) == {"median": 2.0}


def test_the_gauge_agrees_if_typical_intervals_meet() -> None:
    bench = [(ratio, ratio - 0.01, ratio + 0.01) for ratio in (1.08, 1.1, 1.09, 1.12)]
    near = [(ratio + 0.015, low + 0.015, high + 0.015) for ratio, low, high in bench]
    far = [(ratio + 0.04, low + 0.04, high + 0.04) for ratio, low, high in bench]
    assert compared((8, 1), list(zip(bench, near, strict=True)))["agree"]
    assert not compared((8, 1), list(zip(bench, far, strict=True)))["agree"]
    assert not compared((8, 1), list(zip(far, bench, strict=True)))["agree"]
    far[3] = (1.0, 0.0, math.inf)  # One that says nothing does not change that.
    assert not compared((8, 1), list(zip(bench, far, strict=True)))["agree"]


def test_what_is_needed_grows_with_rank_rows_and_adapters() -> None:
    one = needed("tiny", CELL)
    assert needed("tiny", Cell(group=GROUP, batch=8, adapters=2)).flops == 2 * one.flops
    assert needed("tiny", Cell(group=GROUP, batch=4, adapters=4)).nbytes == 2 * one.nbytes
