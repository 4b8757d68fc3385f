"""Decode steps as graphs and compiled, with and without low-rank paths. The oracle is the eager runner."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from lorafold.engine import linear
from lorafold.engine.attention_means import PLAIN
from lorafold.engine.families import GraphedDecode, graphs_work
from lorafold.engine.graphs import DecodeGraphs
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.runner import Piece, Runner
from lorafold.model import use_our_attention
from lorafold_adapters import AdapterManager
from tests.engines import PAGE
from tests.models import DEVICES, KINDS, apart, on, prompts, tiny_llama
from tests.tolerances import EFFECT, LOGITS

MakeAdapter = Callable[..., Path]
PAGES = [[3, 1, 2], [9, 7, 8], [4, 5, 6]]
LENGTHS = [17, 33, 16]


class Laid:
    """A model with three sequences in its cache and adapters beside its weights."""

    def __init__(self, device: str, folders: list[Path], **options: Any) -> None:
        self.model: Any = on(device, tiny_llama())
        use_our_attention(self.model)
        self.manager = AdapterManager(self.model, **options)
        for index, folder in enumerate(folders):
            self.manager.load(str(index), folder)
        self.cache = PagedCache(pages=20, size=PAGE)
        self.runner = Runner(self.model, self.manager, self.cache, PLAIN)
        asked = [prompts(1, length, seed=length)[0].tolist() for length in LENGTHS]
        self.runner.run(
            [
                Piece(tokens=prompt, pages=pages, past=0, adapter=None, samples=True)
                for prompt, pages in zip(asked, PAGES, strict=True)
            ]
        )
        record = {} if device == "cuda" else {"record": lambda work: work}
        graphs = DecodeGraphs(self.model, self.cache, PLAIN, max_batch=4, context=64, **record)
        self.graphed = GraphedDecode(graphs, self.manager)

    def pieces(self, adapters: list[str | None]) -> list[Piece]:
        return [
            Piece(tokens=[5 + row], pages=PAGES[row], past=LENGTHS[row], adapter=adapter, samples=True)
            for row, adapter in enumerate(adapters)
        ]

    def replayed(self, adapters: list[str | None]) -> torch.Tensor | None:
        pieces = self.pieces(adapters)
        with torch.inference_mode():
            return self.graphed.run([piece.tokens[0] for piece in pieces], [piece.part for piece in pieces], adapters)


@pytest.mark.parametrize("device", DEVICES)
def test_graphs_of_both_families_equal_the_eager_step(device: str, adapter_on_llama: MakeAdapter) -> None:
    laid = Laid(device, [adapter_on_llama(seed=seed, **KINDS[kind]) for seed, kind in enumerate(("plain", "dora"))])
    laid.graphed.warm_up()
    mixes: list[list[str | None]] = [["0", "1", None], ["0"], ["1", "1", "0"], [None, None], [None, "0", None]]
    assert laid.replayed(mixes[0]) is None  # The first step with low-rank paths shows what they share.
    bare = laid.runner.run(laid.pieces([None, None, None]))
    for mix in mixes:
        expected = laid.runner.run(laid.pieces(mix))
        logits = laid.replayed(mix)
        assert logits is not None
        assert apart(logits, expected) < LOGITS[torch.float32]
        if any(mix):
            assert apart(expected, bare[: len(mix)]) > EFFECT  # Negative control: the adapters do something.


def test_adapters_that_come_and_go_are_found_by_the_next_step(adapter_on_llama: MakeAdapter) -> None:
    laid = Laid("cpu", [adapter_on_llama(seed=1, **KINDS["plain"])])
    laid.replayed(["0"])
    for name, kind in (("1", "plain"), ("2", "all-linear"), ("3", "dora")):
        laid.manager.load(name, adapter_on_llama(seed=int(name) + 5, **KINDS[kind]))
        mix: list[str | None] = [name, "0", None]
        logits = laid.replayed(mix)
        assert logits is not None
        assert apart(logits, laid.runner.run(laid.pieces(mix))) < LOGITS[torch.float32]
    laid.manager.drop("1")
    logits = laid.replayed(["0", "2"])
    assert logits is not None
    assert apart(logits, laid.runner.run(laid.pieces(["0", "2"]))) < LOGITS[torch.float32]


def test_what_no_graph_can_serve_runs_eagerly(adapter_on_llama: MakeAdapter) -> None:
    folders = [adapter_on_llama(seed=seed, **KINDS[kind]) for seed, kind in enumerate(("plain", "saved-head"))]
    laid = Laid("cpu", folders)
    laid.replayed(["0"])
    assert laid.replayed(["1", "0"]) is None
    assert laid.replayed(["0", None]) is not None
    assert laid.replayed([None, None]) is not None


def test_a_two_path_step_that_cannot_be_recorded_runs_eagerly_from_then_on(adapter_on_llama: MakeAdapter) -> None:
    tried: list[str] = []

    def record(work: Any) -> Any:
        tried.append("")
        raise RuntimeError("operation not permitted when stream is capturing")

    laid = Laid("cpu", [adapter_on_llama(seed=1, **KINDS["plain"])])
    graphs = DecodeGraphs(laid.model, laid.cache, PLAIN, max_batch=4, context=64, record=record)
    laid.graphed = GraphedDecode(graphs, laid.manager)
    assert [laid.replayed(["0"]) for _ in range(4)] == [None] * 4
    assert len(tried) == 1


def test_adapters_beyond_the_slots_run_eagerly_and_cost_the_others_nothing(adapter_on_llama: MakeAdapter) -> None:
    laid = Laid("cpu", [adapter_on_llama(seed=seed, **KINDS["plain"]) for seed in range(3)], device_slots=2)
    laid.replayed(["0"])
    first = laid.graphed._routing_for(["0"])
    for _ in range(3):
        assert laid.replayed(["2"]) is None
        assert laid.replayed(["0", "1"]) is not None
    assert laid.graphed._routing_for(["0"]) is first


def test_graphs_are_for_gpus_whose_weights_stay_where_they_are() -> None:
    assert graphs_work(torch.device("cuda"), False)
    assert not graphs_work(torch.device("cuda"), True)
    assert not graphs_work(torch.device("cpu"), False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("linear_by", ["torch", "onednn", "split"])
def test_a_compiled_step_equals_the_eager_one(
    adapter_on_llama: MakeAdapter, linear_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    model: Any = tiny_llama()
    use_our_attention(model)
    monkeypatch.setattr(linear, "fastest", lambda layers, size: linear_by)
    assert set(linear.choose_linear(model).values()) == {linear_by}
    manager = AdapterManager(model)
    manager.load("0", adapter_on_llama(seed=1, **KINDS["all-linear"]))
    runner = Runner(model, manager, PagedCache(pages=20, size=PAGE))
    asked = prompts(1, 17)[0].tolist()
    runner.run([Piece(tokens=asked, pages=PAGES[0], past=0, adapter=None, samples=True)])
    step = [Piece(tokens=[5], pages=PAGES[0], past=17, adapter=None, samples=True)]
    expected = runner.run(step)
    manager.merge_adapter("0")
    folded = runner.run(step)
    runner.compile()
    several = [Piece(tokens=[5 + row], pages=PAGES[row], past=17, adapter=None, samples=True) for row in range(2)]
    assert apart(runner.run(several)[:1], folded) < LOGITS[torch.float32]
    assert apart(runner.run(step), folded) < LOGITS[torch.float32]
    manager.unmerge_adapter()
    assert apart(runner.run(step), expected) < LOGITS[torch.float32]
    assert apart(folded, expected) > EFFECT  # Negative control: the compiled step reads the weights of now.


def test_what_cannot_be_compiled_runs_as_it_is_and_a_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llama()
    use_our_attention(model)
    runner = Runner(model, AdapterManager(model), PagedCache(pages=20, size=PAGE))
    asked = Piece(tokens=prompts(1, 17)[0].tolist(), pages=PAGES[0], past=0, adapter=None, samples=True)
    expected = runner.run([asked])

    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: no_compiler)
    with structlog.testing.capture_logs() as logs:
        runner.compile()
    assert [(entry["log_level"], entry["error"]) for entry in logs] == [("warning", "no working C++ compiler found")]
    assert torch.equal(runner.run([asked]), expected)
    assert runner.run([Piece(tokens=[5], pages=PAGES[0], past=17, adapter=None, samples=True)]).isfinite().all()
