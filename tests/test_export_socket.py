"""ExportMerged through a real socket: others decode meanwhile, what it writes answers alike, paths stay inside."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafold.client import ServerError, translated
from lorafold.v1 import weights_pb2 as pb
from lorafold_adapters.shards import ShardWriter
from tests.conftest import DEMO, RunningServer, demo_config, serving

ADDRESS = {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0"}
Export = Callable[..., list[pb.ExportMergedResponse]]


@contextmanager
def exporting(folder: Path) -> Iterator[RunningServer]:
    folder.mkdir(exist_ok=True)
    with serving(demo_config(server={**ADDRESS, "export_folder": str(folder)})) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports") / "allowed"


@pytest.fixture(scope="module")
def own(folder: Path) -> Iterator[RunningServer]:
    with exporting(folder) as running:
        yield running


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Exports stop at their second tensor until this is set."""
    going, write = threading.Event(), ShardWriter.write
    written: list[str] = []

    def waiting(self: ShardWriter, name: str, tensor: Tensor) -> None:
        if len(written) == 1:
            assert going.wait(60)
        written.append(name)
        write(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", waiting)
    yield going
    going.set()


def export(server: RunningServer, deployment: str, path: str, **fields: Any) -> list[pb.ExportMergedResponse]:
    request = pb.ExportMergedRequest(deployment=deployment, path=path, **fields)
    with translated():
        return list(server.client.stubs.weights.ExportMerged(request))


def greedy(checkpoint: Path, prompt: str, tokens: int) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    encoded: Any = AutoTokenizer.from_pretrained(checkpoint)(prompt, return_tensors="pt")
    produced = model.generate(**encoded, max_new_tokens=tokens, do_sample=False)
    return [int(token) for token in produced[0, encoded["input_ids"].shape[1] :]]


def test_what_was_exported_answers_as_it_is_served_merged(own: RunningServer, folder: Path) -> None:
    *progress, last = export(own, "upper", "models/upper", max_shard_bytes=500_000)
    done = [message.progress.bytes_done for message in progress]
    assert done == sorted(done)
    assert done[-1] == progress[-1].progress.bytes_total == last.exported.bytes
    assert Path(last.exported.path) == folder / "models" / "upper"
    assert len(last.exported.files) > 2
    served = own.client.generate("Hello world", deployment="upper", max_tokens=11)
    assert (served.text, served.mode) == ("HELLO WORLD", "merged")
    assert served.finished.answered_by.adapter_digest == last.exported.adapter_digest
    assert greedy(folder / "models" / "upper", "Hello world", 11) == list(served.token_ids)[:11]
    assert greedy(DEMO / "base", "Hello world", 11) != list(served.token_ids)[:11]


def test_requests_of_another_deployment_decode_meanwhile(own: RunningServer, held: threading.Event) -> None:
    assert own.client.generate("Hello", deployment="rot13").mode == "unmerged"
    engine = own.app.parts.engine
    generation = engine.call(lambda: engine.weights.state.generation).result(10)
    call = own.client.stubs.weights.ExportMerged(pb.ExportMergedRequest(deployment="shift", path="meanwhile"))
    assert next(call).progress.tensors_done == 1
    assert own.client.generate("Hello", deployment="rot13", timeout=30).text == "Uryyb"
    held.set()
    assert list(call)[-1].HasField("exported")
    assert engine.call(lambda: engine.weights.state.generation).result(10) == generation


def test_the_export_of_one_is_exact_while_another_is_folded(own: RunningServer, folder: Path) -> None:
    own.client.stubs.weights.MergeAdapter(pb.MergeAdapterRequest(deployment="vowels"))
    try:
        export(own, "upper", "beside")
    finally:
        own.client.stubs.weights.UnmergeAdapter(pb.UnmergeAdapterRequest())
    export(own, "upper", "alone")
    assert (folder / "beside" / "model.safetensors").read_bytes() == (folder / "alone/model.safetensors").read_bytes()


def test_a_cancelled_export_leaves_nothing(own: RunningServer, folder: Path, held: threading.Event) -> None:
    call = own.client.stubs.weights.ExportMerged(pb.ExportMergedRequest(deployment="upper", path="gone/it"))
    next(call)
    assert len(list((folder / "gone").iterdir())) == 1
    call.cancel()
    held.set()
    wait_until(lambda: not list((folder / "gone").iterdir()))
    assert own.client.generate("Hello", deployment="upper").text == "HELLO"


def test_a_failure_is_a_status_and_leaves_nothing(
    own: RunningServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "finish", fail)
    with pytest.raises(ServerError, match="No space left on device") as caught:
        export(own, "upper", "failed/it")
    assert (caught.value.code, caught.value.reason) == ("INTERNAL", "EXPORT_FAILED")
    assert list((folder / "failed").iterdir()) == []


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("deployment", "path", "code", "reason", "words"),
    [
        ("upper", "", "INVALID_ARGUMENT", "INVALID_FIELD", "export folder"),
        ("upper", ".", "INVALID_ARGUMENT", "INVALID_FIELD", "export folder"),
        ("upper", "../out", "INVALID_ARGUMENT", "INVALID_FIELD", "export folder"),
        ("upper", "a/../../out", "INVALID_ARGUMENT", "INVALID_FIELD", "export folder"),
        ("upper", "/etc/out", "INVALID_ARGUMENT", "INVALID_FIELD", "export folder"),
        ("upper", "link/out", "INVALID_ARGUMENT", "INVALID_FIELD", "export folder"),
        ("upper", "a\0b", "INVALID_ARGUMENT", "INVALID_FIELD", "no path"),
        ("upper", "x" * 300, "INTERNAL", "EXPORT_FAILED", "too long"),
        ("upper", "taken", "ALREADY_EXISTS", "EXPORT_EXISTS", "choose another"),
        ("upper", "taken/file", "ALREADY_EXISTS", "EXPORT_EXISTS", "choose another"),
        ("nobody", "out", "NOT_FOUND", "DEPLOYMENT_NOT_FOUND", "list them"),
        ("base", "out", "INVALID_ARGUMENT", "INVALID_FIELD", "already"),
        ("", "out", "INVALID_ARGUMENT", "INVALID_FIELD", "already"),
    ],
)
def test_a_bad_request_is_refused_and_writes_nothing(
    deployment: str, path: str, code: str, reason: str, words: str, own: RunningServer, folder: Path
) -> None:
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "file").write_text("mine")
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to(folder.parent)
    before = sorted(folder.rglob("*")), sorted(folder.parent.iterdir())
    with pytest.raises(ServerError) as caught:
        export(own, deployment, path)
    assert (caught.value.code, caught.value.reason) == (code, reason)
    assert words in str(caught.value)
    assert (sorted(folder.rglob("*")), sorted(folder.parent.iterdir())) == before


def test_without_an_export_folder_nothing_is_written(server: RunningServer, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="set export_folder under") as caught:
        export(server, "upper", str(tmp_path / "out"))
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "EXPORT_FOLDER_UNSET")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_stops_leaves_no_half_export(tmp_path: Path, held: threading.Event) -> None:
    with exporting(tmp_path / "allowed") as own:
        call = own.client.stubs.weights.ExportMerged(pb.ExportMergedRequest(deployment="upper", path="it"))
        next(call)
        own.stop(grace=0)
        held.set()
        with pytest.raises(grpc.RpcError):
            list(call)
        wait_until(lambda: not list((tmp_path / "allowed").iterdir()))
