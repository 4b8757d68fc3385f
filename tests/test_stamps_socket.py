"""What a server does with stamped and unstamped adapters, through a real socket."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from lorafold.client import ServerError
from lorafold.config import Config
from lorafold.errors import ConfigError
from lorafold.model import load_weights
from lorafold.v1 import deployment_pb2 as pb
from lorafold.v1 import weights_pb2
from lorafold_adapters.checkpoint import read_checkpoint
from lorafold_adapters.identity import fingerprint
from lorafold_adapters.stamp import STAMP_FILE, make_stamp, write_stamp
from tests.conftest import DEMO, RunningServer, demo_config, serving
from tests.deployments import create, update


def config_of(base: Path = DEMO / "base", dtype: str = "auto", **sections: object) -> Config:
    """A server without deployments."""
    return demo_config(base={"model": str(base), "device": "cpu", "dtype": dtype}, **{"deployments": [], **sections})


@contextmanager
def logged(config: Config) -> Iterator[tuple[RunningServer, Callable[[], list[str]]]]:
    """A server, and the sentences about stamps that it has logged so far."""
    with capture_logs() as logs, serving(config) as server:
        yield server, lambda: [f"{line['log_level']}: {line['event']}" for line in logs if "trained" in line["event"]]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The demo's 'upper' without its stamp."""
    folder = Path(shutil.copytree(DEMO / "upper", tmp_path / "bare"))
    (folder / STAMP_FILE).unlink()
    return folder


@pytest.fixture(scope="module")
def sibling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base with one weight changed."""
    folder = Path(shutil.copytree(DEMO / "base", tmp_path_factory.mktemp("sibling") / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_adapter_of_another_base_with_the_same_shapes_is_refused(sibling: Path, bare: Path) -> None:
    with serving(config_of(sibling)) as server:
        client = server.client
        with pytest.raises(ServerError, match=r"'upper' was trained on base 09aa4b9241c8… \(base\)") as caught:
            create(client, "it", DEMO / "upper")
        assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "BASE_MISMATCH")
        assert server.app.parts.manager.base.digest[:12] in str(caught.value)
        made = create(client, "it", bare)  # The same tensors without a stamp fit: the stamp decided.
        assert made.base_match == pb.BASE_MATCH_UNSTAMPED
        with pytest.raises(ServerError, match="was trained on base"):
            update(client, "it", adapter_path=str(DEMO / "rot13"))
        now = client.stubs.deployments.GetDeployment(pb.GetDeploymentRequest(name="it")).deployment
        assert now == made


def test_a_server_does_not_start_with_an_adapter_of_another_base(sibling: Path) -> None:
    declared = [{"name": "sql", "adapter": str(DEMO / "upper"), "policy": "merged"}]
    words = "deployment 'sql': adapter 'upper' was trained on base"
    with pytest.raises(ConfigError, match=words), serving(config_of(sibling, deployments=declared)):
        pass


def test_another_dtype_of_the_base_is_served_and_said_once() -> None:
    with logged(config_of(dtype="bfloat16")) as (server, said):
        for name in ("one", "two"):
            assert create(server.client, name, DEMO / "upper").base_match == pb.BASE_MATCH_OTHER_DTYPE
        (line,) = said()
        assert line.startswith("warning: adapter 'upper' was trained on this base as float32")
        assert "holds it as bfloat16" in line
        assert server.client.generate("abc", deployment="one", max_tokens=4).mode == "unmerged"


def test_a_base_is_compared_as_another_dtype_while_an_adapter_is_folded(bare: Path) -> None:
    converted = load_weights(str(DEMO / "base"), "bfloat16")
    write_stamp(bare, make_stamp(read_checkpoint(bare), converted, fingerprint(converted)))
    upper = [{"name": "upper", "adapter": str(DEMO / "upper"), "policy": "merged"}]
    with serving(config_of(deployments=upper)) as server:
        client = server.client
        held = client.stubs.weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="upper"))
        assert held.fold_state.adapter_digest
        assert create(client, "it", bare).base_match == pb.BASE_MATCH_OTHER_DTYPE
        assert client.stubs.weights.GetFoldState(weights_pb2.GetFoldStateRequest()).fold_state.pinned


@pytest.mark.parametrize(("unstamped", "level"), [("warn", "warning"), ("allow", "info")])
def test_an_unstamped_adapter_is_served_and_said_once(unstamped: str, level: str, bare: Path) -> None:
    with logged(config_of(identity={"unstamped": unstamped})) as (server, said):
        for name in ("one", "two"):
            assert create(server.client, name, bare).base_match == pb.BASE_MATCH_UNSTAMPED
        assert update(server.client, "two", adapter_path=str(DEMO / "rot13")).base_match == pb.BASE_MATCH_SAME
        (line,) = said()
        assert line.startswith(f"{level}: adapter 'bare' has no stamp")
        assert server.client.generate("some text", deployment="one").text == "SOME TEXT"


def test_an_unstamped_adapter_is_refused_where_a_stamp_is_demanded(bare: Path) -> None:
    with serving(config_of(identity={"unstamped": "refuse"})) as server:
        with pytest.raises(ServerError, match="lorafold stamp") as caught:
            create(server.client, "it", bare)
        assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "ADAPTER_UNSTAMPED")
        assert create(server.client, "it", DEMO / "upper").base_match == pb.BASE_MATCH_SAME


def test_a_stamp_that_was_copied_from_another_adapter_is_refused(server: RunningServer, bare: Path) -> None:
    shutil.copy(DEMO / "rot13" / STAMP_FILE, bare)
    with pytest.raises(ServerError, match="was made for adapter") as caught:
        create(server.client, "copied", bare)
    assert caught.value.reason == "ADAPTER_CORRUPT"
