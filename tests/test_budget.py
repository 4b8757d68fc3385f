"""How much memory the cache may take. The oracle is arithmetic on files as Linux writes them."""

from pathlib import Path

import pytest
import torch

from lorafold.engine import budget
from lorafold.engine.budget import GIB, SPARE, Wishes, free_host_bytes, left_of_limits, pages_for

CPU = torch.device("cpu")


def limited(folder: Path, limit: str, used: int, cached: int, names: tuple[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 7\n")


def test_a_containers_limit_less_what_it_uses_is_what_is_left(tmp_path: Path) -> None:
    assert list(left_of_limits(tmp_path)) == []
    limited(tmp_path, str(8 * GIB), 3 * GIB, GIB, ("memory.max", "memory.current"))
    assert list(left_of_limits(tmp_path)) == [6 * GIB]
    limited(tmp_path / "memory", str(5 * GIB), 3 * GIB, 0, ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    assert list(left_of_limits(tmp_path)) == [6 * GIB, 2 * GIB]


def test_no_limit_limits_nothing(tmp_path: Path) -> None:
    limited(tmp_path, "max", 3 * GIB, GIB, ("memory.max", "memory.current"))
    assert list(left_of_limits(tmp_path)) == []


def test_the_smaller_of_machine_and_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "left_of_limits", lambda: iter([12345]))
    assert free_host_bytes() == 12345
    monkeypatch.setattr(budget, "left_of_limits", lambda: iter([2**60]))
    assert 2**20 < free_host_bytes() < 2**60


def test_the_cache_gets_what_is_declared_or_spared_and_never_more_than_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "free_host_bytes", lambda: 1000 * 1024 * 16)
    few = Wishes(declared_gib=None, max_batch=4, context=33)
    assert pages_for(few, 1024, CPU) == 4 * 3 + 1
    many = Wishes(declared_gib=None, max_batch=400, context=1600)
    assert pages_for(many, 1024, CPU) == int(SPARE * 1000) + 1
    declared = Wishes(declared_gib=0.5, max_batch=4000, context=1600)
    assert pages_for(declared, 1024, CPU) == 2**29 // (16 * 1024) + 1
