"""How an adapter leaves the device, as the engine tells it to whoever waits: counted, and always with an end."""

import queue
from pathlib import Path

import pytest

from tests.engines import Bench
from tests.models import KINDS, save_adapter, tiny_llama

Counts = queue.SimpleQueue[int | None]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tiny_llama(), tmp_path / "adapter", 1, **KINDS["plain"])


def hold(bench: Bench, folder: Path) -> None:
    """Folds another adapter and keeps it, so that requests wait and do not end."""
    bench.merge(bench.load(save_adapter(tiny_llama(), folder, 2, **KINDS["plain"]))).result(30)


def released(bench: Bench, digest: str, folder: Path) -> Counts:
    """What is told of an adapter that no deployment points at any more."""
    counts: Counts = queue.SimpleQueue()
    bench.engine.call(lambda: bench.residents.release(digest, str(folder)))
    bench.engine.watch(digest, counts.put)
    return counts


def test_requests_are_counted_once_each_until_the_adapter_is_gone(adapter: Path, tmp_path: Path) -> None:
    with Bench(tiny_llama()) as bench:
        hold(bench, tmp_path / "held")
        digest, other = bench.load(adapter), bench.load(adapter)
        assert digest == other
        for name in ("a", "b"):
            bench.submit(name, [1, 2, 3], 40, adapter=digest, n=2)
        bench.submit("base", [1, 2, 3], 40)
        assert released(bench, digest, adapter).get(timeout=30) is None  # Another deployment has it.
        counts = released(bench, digest, adapter)
        assert counts.get(timeout=30) == 2
        bench.engine.cancel("a")
        assert counts.get(timeout=30) == 1
        assert digest in bench.engine.call(lambda: bench.manager.adapters).result(30)
        bench.engine.cancel("b")
        assert counts.get(timeout=30) is None
        assert digest not in bench.engine.call(lambda: bench.manager.adapters).result(30)


def test_whoever_waits_hears_the_end_when_the_engine_stops(adapter: Path, tmp_path: Path) -> None:
    with Bench(tiny_llama()) as bench:
        hold(bench, tmp_path / "held")
        digest = bench.load(adapter)
        bench.submit("a", [1, 2, 3], 40, adapter=digest)
        counts = released(bench, digest, adapter)
        assert counts.get(timeout=30) == 1
    assert counts.get(timeout=30) is None
    late: Counts = queue.SimpleQueue()
    bench.engine.watch(digest, late.put)
    assert late.get(timeout=30) is None


def test_an_adapter_that_nobody_knows_is_gone() -> None:
    counts: Counts = queue.SimpleQueue()
    with Bench(tiny_llama()) as bench:
        bench.engine.watch("unknown", counts.put)
        assert counts.get(timeout=30) is None
