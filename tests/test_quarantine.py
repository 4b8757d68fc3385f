"""A base that cannot be given back, or is not what was loaded: nothing runs on it, and it is loaded again."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorafold.errors import BaseReloading, EngineStopped
from lorafold.requests import Failed, Finished
from lorafold.v1 import weights_pb2 as pb
from lorafold_adapters import AdapterManager
from lorafold_adapters.copies import Copies
from lorafold_adapters.errors import BaseCorrupt
from lorafold_adapters.policy import PolicyKind
from tests.conftest import demo_config, serving
from tests.engines import Bench, Collected
from tests.models import KINDS, assert_same_weights, logits_of, prompts, tiny_llama, weights_of
from tests.test_parity import generated

MakeAdapter = Callable[..., Path]
PROMPT = [5, 6, 7]
health_stub: Any = health_pb2_grpc.HealthStub
CORRUPT = "model.layers.1.self_attn.v_proj.weight"


def damage_the_copies(manager: AdapterManager) -> None:
    """One bit of what the base would be given back from."""
    undo = manager._weights._undo
    assert isinstance(undo, Copies)
    undo._kept[CORRUPT].view(torch.int32)[3, 5] ^= 1


def test_a_dirty_manager_refuses_everything_until_it_is_clean(
    adapter_on_llama: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    before = weights_of(model)
    manager = AdapterManager(model)
    manager.load("it", adapter_on_llama(**KINDS["plain"]))
    manager.merge_adapter("it")
    monkeypatch.setattr(manager._weights._undo, "restore", lambda _: (_ for _ in ()).throw(MemoryError("injected")))
    with pytest.raises(BaseCorrupt, match="injected"):
        manager.unmerge_adapter()
    assert manager.fold_state.dirty
    for call in (
        lambda: manager.merge_adapter("it"),
        lambda: manager.routed(["it"]).__enter__(),
        manager.verify_base,
    ):
        with pytest.raises(BaseCorrupt, match="neither"):
            call()
    monkeypatch.undo()
    manager.unmerge_adapter()
    assert not manager.fold_state.dirty
    assert_same_weights(model, before)


def test_a_damaged_copy_is_found_after_the_unfold_and_the_base_is_loaded_again(adapter_on_llama: MakeAdapter) -> None:
    model = tiny_llama()
    before = weights_of(model)
    manager = AdapterManager(model)
    manager.load("it", adapter_on_llama(**KINDS["plain"]))
    manager.merge_adapter("it")
    damage_the_copies(manager)
    with pytest.raises(BaseCorrupt, match="v_proj"):
        manager.unmerge_adapter()
    with pytest.raises(BaseCorrupt, match="not what was loaded"):
        manager.reload(tiny_llama(seed=5))  # Not this base.
    assert manager.fold_state.dirty
    manager.reload(tiny_llama())
    assert_same_weights(model, before)
    manager.merge_adapter("it")
    manager.unmerge_adapter()
    assert_same_weights(model, before)


def test_the_engine_fails_what_ran_and_answers_what_waited(adapter_on_llama: MakeAdapter) -> None:
    loads: list[int] = []

    def load_base() -> torch.nn.Module:
        loads.append(1)
        return tiny_llama()

    with Bench(tiny_llama(), slots=2) as bench:
        expected = bench.submit("expected", PROMPT, 30)
        assert isinstance(expected.last, Finished)
    with Bench(tiny_llama(), slots=2, length=20_000, load_base=load_base, turn=1e9) as bench:
        digest = bench.load(adapter_on_llama(**KINDS["plain"]))
        bench.merge(digest).result(30)
        merged = [
            bench.submit(name, PROMPT, 15_000, adapter=digest, policy=PolicyKind.MERGED) for name in ("one", "two")
        ]
        waiting = bench.submit("waiting", PROMPT, 30)
        bench.engine.call(lambda: damage_the_copies(bench.manager)).result(30)
        with pytest.raises(BaseCorrupt):
            bench.unmerge().result(30)
        for answer in merged:
            assert isinstance(answer.last, Failed)
            assert isinstance(answer.last.error, BaseReloading)
        assert isinstance(waiting.last, Finished)
        assert waiting.tokens == expected.tokens
        assert bench.recorder.health == [False, True]
        assert len(loads) == 1
        state = bench.engine.call(lambda: bench.engine.weights.state).result(30)
        assert (state.reloads, state.folded) == (1, None)
        again = bench.submit("again", PROMPT, adapter=digest, policy=PolicyKind.MERGED)
        assert isinstance(again.last, Finished)


def test_a_base_that_was_given_back_at_the_second_attempt_is_not_loaded_again(
    adapter_on_llama: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_base() -> torch.nn.Module:
        raise AssertionError("not needed")

    with Bench(tiny_llama(), load_base=load_base) as bench:
        digest = bench.load(adapter_on_llama(**KINDS["plain"]))
        bench.merge(digest).result(30)
        undo = bench.manager._weights._undo
        real, calls = undo.restore, [0]

        def restore(name: str) -> None:
            calls[0] += 1
            if calls[0] == 2:
                raise MemoryError("injected")
            real(name)

        monkeypatch.setattr(undo, "restore", restore)
        with pytest.raises(BaseCorrupt, match="injected"):
            bench.unmerge().result(30)
        assert isinstance(bench.submit("later", PROMPT).last, Finished)
        assert bench.recorder.health == [False, True]
        assert bench.engine.call(bench.engine.weights.verify).result(30).mismatched == ()


def test_a_base_that_is_damaged_while_an_adapter_is_dropped_is_loaded_again(adapter_on_llama: MakeAdapter) -> None:
    with Bench(tiny_llama()) as bench:
        digest = bench.load(adapter_on_llama(**KINDS["plain"]))
        merged = bench.submit("merged", PROMPT, adapter=digest, policy=PolicyKind.MERGED)
        assert isinstance(merged.last, Finished)
        assert bench.manager.fold_state.folded == digest
        bench.engine.call(lambda: damage_the_copies(bench.manager)).result(30)
        bench.engine.call(lambda: bench.residents.release(digest, "")).result(30)
        assert isinstance(bench.submit("later", PROMPT).last, Finished)
        assert bench.recorder.health == [False, True]
        assert bench.engine.call(lambda: bench.manager.adapters).result(30) == {}


def test_nothing_is_folded_into_a_base_that_was_found_damaged(adapter_on_llama: MakeAdapter) -> None:
    with Bench(tiny_llama()) as bench:
        digest = bench.load(adapter_on_llama(**KINDS["plain"]))
        weight = bench.model.get_parameter(CORRUPT)
        gate = threading.Event()
        bench.engine.call(lambda: gate.wait(30))
        bench.engine.call(lambda: weight.view(torch.int32)[3, 5].bitwise_xor_(1))
        found = bench.engine.call(bench.engine.weights.verify)
        merged = bench.merge(digest)
        gate.set()
        assert found.result(30).mismatched == (CORRUPT,)
        state = merged.result(30).change.state
        assert (state.folded, state.reloads) == (digest, 1)  # Into the base that was loaded again.
        assert bench.engine.call(bench.engine.weights.verify).result(30).mismatched == ()


def test_what_was_computed_from_a_damaged_base_is_computed_again(adapter_on_llama: MakeAdapter) -> None:
    model, dora, ids = tiny_llama(), adapter_on_llama(**KINDS["dora"]), prompts(1, 9)
    manager = AdapterManager(model)
    manager.load("it", dora)
    with manager.routed(["it"]):
        expected = logits_of(model, ids)
    report = manager.fidelity("it")
    manager.detach()
    manager = AdapterManager(model)
    weight = model.get_parameter(CORRUPT)
    with torch.no_grad():
        weight[3] *= 100
    manager.load("it", dora)
    manager.fidelity("it")
    manager.reload(tiny_llama())
    with manager.routed(["it"]):
        assert torch.equal(logits_of(model, ids), expected)
    assert manager.fidelity("it") == report


def test_a_base_that_stays_damaged_ends_the_engine(adapter_on_llama: MakeAdapter) -> None:
    with Bench(tiny_llama(), load_base=lambda: tiny_llama(seed=5)) as bench:
        digest = bench.load(adapter_on_llama(**KINDS["plain"]))
        bench.merge(digest).result(30)
        running = bench.submit("running", PROMPT, 100_000, adapter=digest, policy=PolicyKind.MERGED)
        bench.engine.call(lambda: damage_the_copies(bench.manager)).result(30)
        with pytest.raises(BaseCorrupt):
            bench.unmerge().result(30)
        assert isinstance(running.last, Failed)
        with pytest.raises(EngineStopped):
            bench.engine.call(lambda: 1).result(30)
    assert isinstance(bench.recorder.death[0], BaseCorrupt)
    assert bench.recorder.health == [False]


def test_clients_see_the_quarantine_and_the_right_answer_after_it() -> None:
    Status = health_pb2.HealthCheckResponse
    with serving(demo_config()) as server, grpc.insecure_channel(server.address) as channel:
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == Status.SERVING
        expected = server.client.generate("hello", deployment="upper", max_tokens=8).text
        weight = server.app.parts.base.model.get_parameter("model.layers.0.input_layernorm.weight")
        engine = server.app.parts.engine
        engine.call(lambda: weight.view(torch.int16).flatten()[7].bitwise_xor_(1)).result(30)
        found = server.client.stubs.weights.VerifyBase(pb.VerifyBaseRequest())
        assert list(found.mismatched) == ["model.layers.0.input_layernorm.weight"]
        assert next(watch).status == Status.NOT_SERVING
        assert next(watch).status == Status.SERVING
        assert server.client.generate("hello", deployment="upper", max_tokens=8).text == expected
        state = server.client.stubs.weights.GetFoldState(pb.GetFoldStateRequest()).fold_state
        assert state.reloads == 1
        assert server.client.stubs.weights.VerifyBase(pb.VerifyBaseRequest()).restored
        watch.cancel()


def test_a_prefix_that_a_damaged_base_computed_is_not_used_after_the_reload() -> None:
    """One row found its prefix in the cache, and another one's prompt is still being read when the base is reloaded."""
    long, prefix = prompts(1, 200, seed=3)[0].tolist(), prompts(1, 64, seed=5)[0].tolist()
    expected = generated(tiny_llama(), [*prefix, 9, 8, 7], 12)
    with Bench(tiny_llama(), prefill=16) as bench:

        def damage() -> None:
            with torch.no_grad():
                for parameter in bench.model.model.layers.parameters():
                    parameter.mul_(-1.5).add_(0.3)

        bench.engine.call(damage).result(30)
        assert isinstance(bench.submit("warm", prefix, 2).last, Finished)
        running, hit = Collected(), Collected()
        found: list[int] = []

        def verify_once_it_is_found() -> None:
            rows = [row for row in bench.scheduler.running if row.request.id == "hit"]
            found.extend(row.cached for row in rows if not row.read)
            if not found and not hit.done.is_set():
                bench.engine.call(verify_once_it_is_found)
            else:
                assert bench.engine.weights.verify().mismatched

        def arrive() -> None:
            bench.engine.submit(bench.request("long", long, 4), running)
            bench.engine.submit(bench.request("hit", [*prefix, 9, 8, 7], 12, deployment="e"), hit)
            bench.engine.call(verify_once_it_is_found)

        bench.engine.call(arrive).result(30)
        assert isinstance(running.last, Failed)
        assert isinstance(hit.last, Finished)
        assert found == [64]  # It had begun on what the damaged base computed.
        assert hit.tokens == expected
