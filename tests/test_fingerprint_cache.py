"""The remembered fingerprint: read once, read again when a file changed, never an error. Counts the tensors hashed."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lorafold.config import FoldConfig, fingerprint_folder
from lorafold.parts import attach
from lorafold_adapters import AdapterManager, identity
from lorafold_adapters.fingerprint_cache import cache_entry, model_files
from lorafold_adapters.identity import fingerprint
from tests.conftest import demo_config, serving
from tests.models import tiny_llama

Start = Callable[[], AdapterManager]


class Counter:
    """Counts how many tensors were hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._real = identity.tensor_digest
        monkeypatch.setattr(identity, "tensor_digest", self._digest)

    def _digest(self, *arguments: object) -> str:
        self.count += 1
        return self._real(*arguments)  # type: ignore[arg-type]

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def start(base: Path, tmp_path: Path) -> Start:
    def begin(dtype: str = "auto") -> AdapterManager:
        before = model_files(str(base))
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        return attach(
            model, cache_entry(tmp_path / "cache", model, before, model_files(str(base))), FoldConfig(), before
        )

    return begin


def entries(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").glob("*"))


def test_the_second_start_does_not_hash_and_knows_the_same(start: Start, hashed: Counter) -> None:
    first = start()
    assert hashed.taken() == len(first.base.tensors)
    second = start()
    assert hashed.taken() == 0
    assert second.base == first.base == fingerprint(tiny_llama())


def test_a_second_server_does_not_hash(tmp_path: Path, hashed: Counter) -> None:
    config = demo_config(identity={"cache": str(tmp_path)})
    assert fingerprint_folder(config) == tmp_path
    with serving(config) as server:
        digest = server.app.parts.manager.base.digest
    assert hashed.taken() > 0
    with serving(config) as server:
        assert server.app.parts.manager.base.digest == digest
    assert hashed.taken() == 0


def test_a_file_of_the_same_size_and_another_time_is_hashed_again(start: Start, base: Path, hashed: Counter) -> None:
    before = start().base
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    size = file.stat().st_size
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    assert file.stat().st_size == size
    hashed.taken()
    assert start().base != before
    assert hashed.taken() > 0


def test_a_change_that_sets_the_old_time_again_is_hashed_again(start: Start, base: Path) -> None:
    before = start().base
    file = base / "model.safetensors"
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    with file.open("r+b") as handle:
        handle.write(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (status.st_mtime_ns, status.st_ino)
    assert start().base != before


def test_another_dtype_is_remembered_by_itself(base: Path, tmp_path: Path, hashed: Counter) -> None:
    digests = {}
    for dtype in ("float32", "bfloat16", "float32", "bfloat16"):
        files = model_files(str(base))
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        entry = cache_entry(tmp_path / "cache", model, files, files)
        digests[dtype] = attach(model, entry, FoldConfig(), files).base.digest
    assert len(set(digests.values())) == len(entries(tmp_path)) == 2
    assert hashed.taken() == 2 * len(fingerprint(tiny_llama()).tensors)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}', '{"key": "", "fingerprint": {"digest": 3}}'])
def test_a_damaged_cache_is_hashed_again_and_mended(
    content: str, start: Start, tmp_path: Path, hashed: Counter
) -> None:
    before = start().base
    (file,) = entries(tmp_path)
    file.write_text(content)
    hashed.taken()
    assert start().base == before
    assert hashed.taken() > 0
    start()
    assert hashed.taken() == 0


def test_an_edited_digest_is_not_believed(start: Start, tmp_path: Path) -> None:
    before = start().base
    (file,) = entries(tmp_path)
    content = json.loads(file.read_text())
    content["fingerprint"]["tensors"]["model.norm.weight"] = "torch.float32[64]:00"
    file.write_text(json.dumps(content))
    assert start().base == before


def test_a_cache_that_cannot_be_written_is_no_error(start: Start, tmp_path: Path, hashed: Counter) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert start().base == start().base
    assert hashed.taken() == 2 * len(fingerprint(tiny_llama()).tensors)


def test_files_that_changed_while_they_were_loaded_are_not_remembered(base: Path, tmp_path: Path) -> None:
    before = model_files(str(base))
    model = tiny_llama()
    os.utime(base / "model.safetensors", ns=(1, 1))
    attach(model, cache_entry(tmp_path / "cache", model, before, model_files(str(base))), FoldConfig(), before)
    assert entries(tmp_path) == []
    attach(
        model,
        cache_entry(tmp_path / "cache", model, model_files(str(base)), model_files(str(base))),
        FoldConfig(),
        before,
    )
    assert len(entries(tmp_path)) == 1


def test_a_model_without_safetensors_on_this_machine_is_not_remembered(base: Path) -> None:
    assert model_files(str(base))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert model_files(str(base)) == []
    assert model_files("nobody/nowhere") == []
