"""Measuring the unmerged path on a real server through a real socket, beside requests and without."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lorafold.client import ServerError, translated
from lorafold.engine.pages import FREE, PagePool
from lorafold.v1 import deployment_pb2
from lorafold.v1 import weights_pb2 as pb
from tests.conftest import RunningServer, demo_config, metric, serving
from tests.processes import lorafold

QUICK = {"batches": [2], "adapters": [2], "ranks": [8], "contexts": [16]}


@pytest.fixture(scope="module")
def own() -> Iterator[RunningServer]:
    with serving(demo_config()) as running:
        yield running


def measured(server: RunningServer, **request: Any) -> list[pb.MeasureOverheadResponse]:
    return list(server.client.stubs.weights.MeasureOverhead(pb.MeasureOverheadRequest(**request)))


def adapters_on_device(server: RunningServer) -> int:
    found: pb.GetFoldStateResponse = server.client.stubs.weights.GetFoldState(pb.GetFoldStateRequest())
    return found.residency.on_device


def test_every_cell_is_measured_and_remembered(own: RunningServer) -> None:
    grid = {"batches": [1, 4], "adapters": [1, 4], "ranks": [8, 32], "contexts": [16]}
    before = adapters_on_device(own)
    messages = measured(own, **grid, max_pairs=20)
    found = {(o.cell.batch, o.cell.adapters, o.cell.rank): o for m in messages if (o := m.overhead).pairs}
    assert found.keys() == {(1, 1, 8), (1, 1, 32), (4, 1, 8), (4, 1, 32), (4, 4, 8), (4, 4, 32)}
    for overhead in found.values():
        assert 0 < overhead.low <= overhead.ratio <= overhead.high < 100
        assert 16 <= overhead.pairs <= 20
        assert overhead.plain_step.nanos > 0
    progress = [m.progress for m in messages if m.HasField("progress")]
    assert {p.cells_total for p in progress} == {6}
    assert [p.cells_done for p in progress] == sorted(p.cells_done for p in progress)
    line = 'lorafold_unmerged_overhead_ratio{adapters="4",batch="4",context="16",rank="32"}'
    assert metric(own, line) == pytest.approx(found[4, 4, 32].ratio)
    listed = own.client.stubs.weights.ListOverheads(pb.ListOverheadsRequest()).overheads
    assert {(o.cell.batch, o.cell.adapters, o.cell.rank) for o in listed} == found.keys()
    assert adapters_on_device(own) == before, "what was made up is gone"


def test_low_rank_paths_are_in_one_step_and_not_in_the_other(own: RunningServer) -> None:
    """A path of rank 512 beside weights of 64 or so rows cannot be for free; where it is, nothing was routed."""
    found = measured(own, **{**QUICK, "ranks": [512], "batches": [8], "adapters": [8]}, max_pairs=20)[-1].overhead
    assert found.low > 1.2


def test_auto_decides_by_what_deployed_adapters_cost_and_by_no_others() -> None:
    with serving(demo_config()) as fresh:
        engine = fresh.app.parts.engine
        engine.call(lambda: engine.weights.costs.step(adapters=0, rows=2, seconds=1.0)).result(30)

        def cost() -> float | None:
            return engine.call(lambda: engine.weights.costs.two_path_seconds(2, 2)).result(30)

        assumed = cost()
        assert measured(fresh, **{**QUICK, "ranks": [256]}, max_pairs=16)[-1].HasField("overhead")
        assert cost() == assumed
        found = measured(fresh, **QUICK, max_pairs=16)[-1].overhead
        apart = (found.unmerged_step.ToNanoseconds() - found.plain_step.ToNanoseconds()) / 1e9
        assert cost() == pytest.approx(1.0 + max(0.0, apart))


def test_requests_beside_it_get_the_same_answers(own: RunningServer) -> None:
    names = ("upper", "rot13", "base", "vowels")
    before = {name: own.client.generate("Hello World", deployment=name).token_ids for name in names}
    assert len({tuple(ids) for ids in before.values()}) > 2
    endless = own.client.stubs.weights.MeasureOverhead(
        pb.MeasureOverheadRequest(**QUICK, max_pairs=1000, precision=1e-6)
    )
    next(endless)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            answers = {name: pool.submit(own.client.generate, "Hello World", deployment=name) for name in names}
            assert {name: answer.result(60).token_ids for name, answer in answers.items()} == before
    assert next(endless).progress.pairs > 0, "it goes on"
    endless.cancel()


def test_one_measures_at_a_time_and_hanging_up_ends_it(own: RunningServer, until: Callable[..., None]) -> None:
    before = adapters_on_device(own)
    endless = own.client.stubs.weights.MeasureOverhead(
        pb.MeasureOverheadRequest(**{**QUICK, "ranks": [48]}, max_pairs=1000, precision=1e-6)
    )
    next(endless)
    assert adapters_on_device(own) == before + 2
    with pytest.raises(ServerError, match="another measurement runs now") as refused, translated():
        measured(own, **QUICK)
    assert (refused.value.code, refused.value.reason) == ("ABORTED", "MEASUREMENT_IN_PROGRESS")
    endless.cancel()
    until(lambda: adapters_on_device(own) == before)
    assert measured(own, **QUICK, max_pairs=16)[-1].HasField("overhead")


@pytest.mark.parametrize(
    ("request_fields", "field"),
    [
        ({"batches": [9]}, "batches: 9 is not possible here: 1 to 8 are"),
        ({"batches": [0]}, "batches"),
        ({"ranks": [100_000]}, "ranks"),
        ({"contexts": [512]}, "contexts: 512 is not possible here: 1 to 511 are"),
        ({"batches": [1], "adapters": [8]}, "no batch has so many rows"),
        ({"precision": 0.0}, "precision"),
        ({"max_pairs": 0}, "max_pairs"),
        ({"max_pairs": 15}, "max_pairs"),
    ],
)
def test_what_cannot_be_measured_is_refused(own: RunningServer, request_fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ServerError, match=field) as refused, translated():
        measured(own, **request_fields)
    assert refused.value.code == "INVALID_ARGUMENT"


def test_it_works_while_an_adapter_is_folded_and_leaves_it_there(own: RunningServer) -> None:
    weights = own.client.stubs.weights
    held = weights.MergeAdapter(pb.MergeAdapterRequest(deployment="rot13")).fold_state
    answer = own.client.generate("Hello", deployment="rot13")
    assert measured(own, **QUICK, max_pairs=16)[-1].HasField("overhead")
    after = weights.GetFoldState(pb.GetFoldStateRequest()).fold_state
    assert (after.adapter_digest, after.generation) == (held.adapter_digest, held.generation)
    assert own.client.generate("Hello", deployment="rot13").token_ids == answer.token_ids
    assert weights.VerifyBase(pb.VerifyBaseRequest()).restored
    weights.ReleaseFoldState(pb.ReleaseFoldStateRequest())


def test_a_cell_that_finds_no_room_is_left_out_with_the_reason() -> None:
    small = {"max_batch": 8, "max_context": 64, "kv_memory_gib": 0.0005}
    with serving(demo_config(engine=small)) as tight:
        pages = tight.app.parts.engine._scheduler.pool.pages
        context = min(63, pages * 16 // 6)
        messages = measured(tight, batches=[1, 8], adapters=[1], ranks=[8], contexts=[context], max_pairs=16)
        assert [m.overhead.cell.batch for m in messages if m.HasField("overhead")] == [1]
        refused = [m.refusal for m in messages if m.HasField("refusal")]
        assert [each.cell.batch for each in refused] == [8]
        assert "engine.kv_memory_gib" in refused[0].reason
        assert tight.client.generate("Hello", deployment="rot13").text == "Uryyb"


def test_a_cache_full_of_old_prefixes_has_room() -> None:
    small = {"max_batch": 4, "max_context": 64, "kv_memory_gib": 0.0005}
    with serving(demo_config(engine=small)) as used:
        pool = used.app.parts.engine._scheduler.pool
        texts = iter(range(1000))
        while free_of(pool) > 4:
            used.client.generate(f"{next(texts)} is a prompt of two pages", deployment="rot13", max_tokens=16)
        messages = measured(used, batches=[4], adapters=[1], ranks=[8], contexts=[40], max_pairs=16)
        assert [m.overhead.cell.batch for m in messages if m.HasField("overhead")] == [4]


def free_of(pool: PagePool) -> int:
    """Pages that hold nothing."""
    return pool._state.count(FREE)


def test_the_command_tells_it_in_words(own: RunningServer) -> None:
    done = lorafold(
        "bench", "overhead", "--server", own.address, "--batches", "1,2", "--adapters", "1", "--max-pairs", "16"
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("1 row, 1 adapter of rank ")
    assert "unmerged over merged" in second
    assert "16 pairs" in done.stderr
    wrong = lorafold("bench", "overhead", "--server", own.address, "--batches", "1,x")
    assert wrong.returncode == 2
    assert "is no list of numbers, such as 1,8,32" in wrong.stderr


def test_advice_goes_by_what_was_measured_and_who_came() -> None:
    with serving(demo_config()) as fresh:
        advise = fresh.client.stubs.deployments.AdviseDeployment
        unknown = advise(deployment_pb2.AdviseDeploymentRequest(name="rot13"))
        assert unknown.policy == deployment_pb2.POLICY_AUTO
        assert "lorafold bench overhead" in unknown.lines[1]
        measured(fresh, batches=[1, 8], adapters=[1], max_pairs=32)
        for _ in range(12):
            fresh.client.generate("Hello World, hello", deployment="rot13")
        alone = advise(deployment_pb2.AdviseDeploymentRequest(name="rot13"))
        assert alone.alone == 1.0
        assert alone.moments > 100
        assert alone.overhead_ratio > 0.9
        free = alone.overhead_ratio < 1.02
        assert alone.policy == (deployment_pb2.POLICY_UNMERGED if free else deployment_pb2.POLICY_MERGED)
        said = lorafold("advise", "rot13", "--address", fresh.address).stdout.splitlines()
        assert len(said) == 3
        assert said[0].startswith("Serve 'rot13' ")
        with pytest.raises(ServerError) as refused, translated():
            advise(deployment_pb2.AdviseDeploymentRequest(name="nobody"))
        assert refused.value.code == "NOT_FOUND"


def test_idle_moments_are_used_if_that_is_configured(until: Callable[..., None]) -> None:
    with serving(demo_config(probe={"every_minutes": 60}, engine={"max_batch": 2, "max_context": 64})) as idle:
        rank = 'rank="8"'
        line = f'lorafold_unmerged_overhead_ratio{{adapters="1",batch="2",context="63",{rank}}}'
        until(lambda: metric(idle, line) > 0)
        assert adapters_on_device(idle) == 5, "nothing is made up for it"
        assert idle.client.generate("Hello", deployment="rot13").text == "Uryyb"
        assert measured(idle, **QUICK, max_pairs=16)[-1].HasField("overhead"), "who asks is not kept waiting"


def test_nothing_is_measured_unless_asked_for(own: RunningServer) -> None:
    with serving(demo_config()) as idle:
        idle.client.generate("Hello", deployment="rot13")
        assert not idle.client.stubs.weights.ListOverheads(pb.ListOverheadsRequest()).overheads
        assert metric(idle, "lorafold_probe_seconds_total") == 0
