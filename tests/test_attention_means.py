"""Every means of attention, and decode steps on static inputs. The oracles are `generate()` and the eager runner."""

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lorafold.engine.attention_choice import choose_means
from lorafold.engine.attention_means import DECODE, PLAIN, PREFILL, Means
from lorafold.engine.graphs import DecodeGraphs, StaticBatch, sizes
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.runner import Piece, Runner
from lorafold.engine.step import Part
from lorafold.model import use_our_attention
from lorafold.requests import Finished
from lorafold_adapters import AdapterManager
from tests.engines import PAGE, Bench
from tests.models import DEVICES, apart, on, prompts, tiny_llama
from tests.test_parity import family, generated
from tests.tolerances import LOGITS

LENGTHS = [1, 17, 40]
NAMES = [("torch", "torch"), ("triton", "triton")]


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Triton's kernels run on a CPU too."""
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        yield
        return
    from lorafold.engine import paged_kernels, prefill_kernels
    from tests.interpreter import interpreted

    with interpreted(paged_kernels, prefill_kernels):
        yield


def skip_without_triton(*names: str) -> None:
    if "triton" in names and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2"])
@pytest.mark.parametrize(("decode", "prefill"), NAMES)
def test_greedy_equals_generate_by_every_means(name: str, decode: str, prefill: str, device: str) -> None:
    skip_without_triton(decode, prefill)
    asked = [prompts(1, length, seed=length)[0].tolist() for length in LENGTHS]
    means = Means(decode=DECODE[decode], prefill=PREFILL[prefill], tables=True)
    with Bench(family(name, device), slots=3, prefill=24, means=means) as bench:
        answers = [bench.submit(str(index), prompt, 4) for index, prompt in enumerate(asked)]
        for answer in answers:
            assert isinstance(answer.last, Finished), answer.last
    expected = [generated(family(name, device), prompt, 4) for prompt in asked]
    assert [answer.tokens for answer in answers] == expected
    assert len({tuple(tokens) for tokens in expected}) > 2  # Negative control: prompts matter.


class Laid:
    """A model with sequences in its cache."""

    def __init__(self, device: str) -> None:
        self.model: Any = on(device, tiny_llama())
        use_our_attention(self.model)
        self.cache = PagedCache(pages=20, size=PAGE)
        self.runner = Runner(self.model, AdapterManager(self.model), self.cache, PLAIN)
        self.pages = [[3, 1, 2], [9, 7, 8], [4, 5, 6]]
        self.lengths = [17, 33, 16]
        self.runner.run(
            [
                Piece(
                    tokens=prompts(1, length, seed=length)[0].tolist(), pages=pages, past=0, adapter=None, samples=True
                )
                for pages, length in zip(self.pages, self.lengths, strict=True)
            ]
        )

    def pieces(self) -> list[Piece]:
        return [
            Piece(tokens=[5 + row], pages=pages, past=length, adapter=None, samples=True)
            for row, (pages, length) in enumerate(zip(self.pages, self.lengths, strict=True))
        ]

    def graphs(self, **keywords: Any) -> DecodeGraphs:
        return DecodeGraphs(self.model, self.cache, PLAIN, max_batch=4, context=64, **keywords)

    def replay(self, graphs: DecodeGraphs, pieces: list[Piece]) -> torch.Tensor:
        with torch.inference_mode():
            return graphs.run(
                [piece.tokens[0] for piece in pieces], [piece.part for piece in pieces], "base", nullcontext
            )


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_on_static_inputs_equals_the_eager_one_for_every_size(device: str) -> None:
    laid = Laid(device)
    graphs = laid.graphs(**({} if device == "cuda" else {"record": lambda work: work}))
    for count in (3, 1, 2, 3):
        pieces = laid.pieces()[:count]
        expected = laid.runner.run(pieces)
        result = laid.replay(graphs, pieces)
        assert result.shape == expected.shape
        assert apart(result, expected) < LOGITS[torch.float32]
    moved = [Piece(tokens=[9], pages=laid.pages[0], past=17, adapter=None, samples=True)]
    assert apart(laid.replay(graphs, moved), expected[:1]) > 1e-2  # Negative control: inputs matter.


def test_a_step_is_recorded_once_for_each_size_and_family() -> None:
    laid, recorded = Laid("cpu"), []

    def record(work: Any) -> Any:
        recorded.append(work)
        return work

    graphs = laid.graphs(record=record)
    for count in (1, 1, 3, 3):
        laid.replay(graphs, laid.pieces()[:count])
    assert len(recorded) == 2
    graphs.forget("base")
    laid.replay(graphs, laid.pieces()[:1])
    assert len(recorded) == 3


def test_padding_writes_to_the_scratch_page_only() -> None:
    batch = StaticBatch(4, 3, torch.device("cpu"))
    batch.fill([7], [Part(tokens=1, past=20, pages=[5, 6, 9], decodes=True)], PAGE)
    step = batch.step(PagedCache(pages=10, size=PAGE))
    assert batch.ids_1B.tolist() == [[7, 0, 0, 0]]
    assert step.place_T.tolist() == [6 * PAGE + 4, 0, 0, 0]
    assert step.tables is not None
    assert step.tables.length_B.tolist() == [21, 0, 0, 0]
    assert step.tables.pages_BN.tolist() == [[5, 6, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_every_batch_finds_a_size() -> None:
    assert sizes(1) == [1]
    assert sizes(8) == [1, 2, 4, 8]
    assert sizes(20) == [1, 2, 4, 8, 16, 20]
    assert sizes(64)[-3:] == [48, 56, 64]


@pytest.mark.parametrize("device", DEVICES)
def test_a_means_that_fails_or_is_wrong_is_left_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafold.engine import attention_choice

    def wrong(query: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(query)

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    laid = Laid(device)
    monkeypatch.setattr(attention_choice, "DECODE", {"torch": DECODE["torch"], "wrong": wrong, "broken": broken})
    monkeypatch.setattr(attention_choice, "PREFILL", {"torch": PREFILL["torch"], "broken": broken})
    means = choose_means(laid.model, laid.cache)
    assert means.decode is DECODE["torch"]
    assert means.prefill is PREFILL["torch"]
