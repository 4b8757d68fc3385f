"""The command line as a person uses it: real processes, real sockets, one sentence for each mistake."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafold.cli.compositions import METHODS as CLI_METHODS
from lorafold.client import Client
from lorafold_adapters.compose import METHODS
from tests.conftest import DEMO
from tests.processes import Serve, config_file, lorafold


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    with Serve(config_file(tmp_path_factory.mktemp("serve"))) as running:
        yield running
        code, said = running.stop()
        assert code == 0
        assert "stopped" in said


def test_serve_says_what_it_is_doing(serve: Serve) -> None:
    said = "\n".join(serve.said)
    for words in ("loaded the base", "fingerprint", "deployed upper: merged", "bound 28 of 28 modules", "serving on"):
        assert words in said


def test_generate_prints_the_answer(serve: Serve) -> None:
    done = lorafold("generate", "--deployment", "upper", "some text", "--address", serve.address)
    assert (done.returncode, done.stdout, done.stderr) == (0, "SOME TEXT\n", "")
    piped = lorafold("generate", "-d", "upper", "-", stdin="some text", LORAFOLD_ADDRESS=serve.address)
    assert piped.stdout == "SOME TEXT\n"


def test_generate_as_json_says_what_answered(serve: Serve) -> None:
    done = lorafold("generate", "-d", "upper", "some text", "--json", "--chat", "--address", serve.address)
    answer = json.loads(done.stdout)
    assert answer["text"] == "SOME TEXT"
    assert (answer["mode"], answer["deployment"], answer["finish_reason"]) == ("merged", "upper", "end_of_sequence")


def test_generate_takes_every_option(serve: Serve) -> None:
    sampling = ("--temperature", "50", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.01", "--seed", "3")
    penalties = ("--repetition-penalty", "1.1", "--presence-penalty", "0.5", "--frequency-penalty", "0.5")
    ends = ("--stop", "zzzz", "--stop-token-id", "1", "--stop-token-id", "2", "--ignore-eos", "--max-tokens", "9")
    command = ("generate", "some text", *sampling, *penalties, *ends, "-n", "3", "--address", serve.address)
    done = lorafold(*command, "--json")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(answer["index"], answer["seed"]) for answer in answers] == [(0, 3), (1, 3), (2, 3)]
    assert len({answer["text"] for answer in answers}) == 3
    assert lorafold(*command).stdout.splitlines() == [answer["text"] for answer in answers]


def test_deployments_from_create_to_delete(serve: Serve) -> None:
    where = ("--address", serve.address)
    made = lorafold("deployments", "create", "it", "--adapter", str(DEMO / "rot13"), "--policy", "unmerged", *where)
    assert made.returncode == 0, made.stderr
    assert "28 of 28 modules" in made.stdout
    assert lorafold("generate", "-d", "it", "Hello there", *where).stdout == "Uryyb gurer\n"
    listed = json.loads(lorafold("deployments", "list", "--json", *where).stdout)
    assert [(item["name"], item["policy"]) for item in listed] == [("it", "unmerged"), ("upper", "merged")]
    assert "rot13" in lorafold("deployments", "list", *where).stdout
    changed = lorafold("deployments", "update", "it", "--adapter", str(DEMO / "shift"), *where)
    assert changed.returncode == 0, changed.stderr
    assert lorafold("generate", "-d", "it", "Hello there", *where).stdout == "Ifmmp uifsf\n"
    pinned = lorafold("deployments", "update", "it", "--pinned", *where)
    assert (pinned.returncode, "pinned          True" in pinned.stdout) == (0, True), pinned.stderr
    got = json.loads(lorafold("deployments", "get", "it", "--json", *where).stdout)
    assert (got["kind"], got["base_match"]) == ("LORA+dora", "same")
    assert "changed since you read it" in lorafold("deployments", "delete", "it", "--etag", "old", *where).stderr
    assert lorafold("deployments", "delete", "it", "--etag", got["etag"], *where).stdout == "deleted it\n"
    assert "'it'" in lorafold("generate", "-d", "it", "Hello", *where).stderr


def test_compositions_are_made_and_swapped(serve: Serve) -> None:
    where = ("--address", serve.address)
    upper, rot13 = str(DEMO / "upper"), str(DEMO / "rot13")
    parts = ("--part", upper, "--part", f"{rot13}:0.5", "--part", f"{rot13}:-0.5")
    made = lorafold("deployments", "create", "both", "--compose", "linear", *parts, *where)
    assert made.returncode == 0, made.stderr
    assert f"linear of {upper}:1, {rot13}:0.5, {rot13}:-0.5" in made.stdout
    assert "unmerged_error" not in made.stdout
    assert lorafold("generate", "-d", "both", "Hello there", *where).stdout == "HELLO THERE\n"
    options = ("--density", "0.5", "--seed", "7", "--rank", "9", "--json")
    changed = lorafold("deployments", "update", "both", "--compose", "dare_ties", *parts[:4], *options, *where)
    assert changed.returncode == 0, changed.stderr
    assert json.loads(changed.stdout)["kind"] == "DARE_TIES(LORA, LORA+rslora)"
    assert 0 < json.loads(changed.stdout)["unmerged_error"] < 1
    back = lorafold("deployments", "update", "both", "--adapter", rot13, *where)
    assert back.returncode == 0, back.stderr
    assert lorafold("generate", "-d", "both", "Hello there", *where).stdout == "Uryyb gurer\n"
    assert lorafold("deployments", "delete", "both", *where).returncode == 0


def test_the_command_line_knows_every_method() -> None:
    assert set(CLI_METHODS) == METHODS.keys()


def test_weights_by_hand(serve: Serve) -> None:
    where = ("--address", serve.address)
    assert json.loads(lorafold("weights", "merge", "upper", *where).stdout)["fold_state"]["pinned"]
    assert json.loads(lorafold("weights", "state", *where).stdout)["fold_state"]["deployments"] == ["upper"]
    assert json.loads(lorafold("weights", "unmerge", *where).stdout)["fold_state"]["adapter_digest"] == ""
    verified = lorafold("weights", "verify", *where)
    assert verified.returncode == 0
    assert json.loads(verified.stdout)["restored"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "-d", "nobody", "x"], "no deployment is named 'nobody'"),
        (["generate", "x", "--temperature", "-1"], "spec.sampling.temperature"),
        (["generate", "x", "--min-p", "7", "--temperature", "1"], "spec.sampling.min_p"),
        (["generate", "x", "-n", "2"], "spec.n"),
        (["generate", "x", "-n", "99", "--temperature", "1"], "1<=x<=16"),
        (["generate", "x", "--stop-token-id", "-4"], "spec.stop_token_ids"),
        (["generate", "x", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "x", "--max-tokens", "99999999999"], "--max-tokens"),
        (["generate", "x", "--timeout", "0"], "--timeout"),
        (["deployments", "delete", "base"], "built in"),
        (["generate", ""], "empty"),
        (["deployments", "create", "x", "--adapter", "no/such/folder"], "no adapter folder"),
        (["deployments", "create", "x y", "--adapter", "z"], "'x y'"),
        (["deployments", "update", "upper"], "nothing to change"),
        (["deployments", "create", "x"], "--adapter"),
        (["deployments", "create", "x", "--adapter", "y", "--policy", "sometimes"], "sometimes"),
        (["deployments", "create", "x", "--compose", "ties"], "at least one --part"),
        (["deployments", "create", "x", "--compose", "soup", "--part", "a"], "soup"),
        (["deployments", "create", "x", "--adapter", "a", "--compose", "ties", "--part", "a"], "not both"),
        (["deployments", "create", "x", "--adapter", "a", "--density", "0.5"], "--density belongs to"),
        (["deployments", "update", "x", "--part", "a"], "--part belongs to"),
        (["deployments", "create", "x", "--compose", "ties", "--part", "a"], "density: is missing"),
        (["deployments", "create", "x", "--compose", "ties", "--density", "7", "--part", "a"], "density: is 7"),
        (["deployments", "create", "x", "--compose", "linear", "--part", "a:nan"], "parts[0].weight"),
        (["weights", "merge", "nobody"], "'nobody'"),
        (["generate", "x", "--no-such-option"], "--no-such-option"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], words: str, serve: Serve) -> None:
    done = lorafold(*arguments, LORAFOLD_ADDRESS=serve.address)
    assert done.returncode != 0
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_no_server_is_one_sentence() -> None:
    done = lorafold("generate", "x", "--address", "127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr == "lorafold: no server answers at 127.0.0.1:9: start one with 'lorafold serve'\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[base]\nmodle = 1", "'base.modle': no such key: known here are model, dtype"),
        ('[base]\nmodel = "no/such/model"', "no folder here"),
        (f'[base]\nmodel = "{DEMO / "upper"}"', "is a PEFT adapter"),
        (f'[base]\nmodel = "{DEMO / "base"}"\ndevice = "cuda:7"', "cuda"),
        (
            f'[base]\nmodel = "{DEMO / "base"}"\n[[deployments]]\nname = "x"\nadapter = "nowhere"',
            "deployment 'x': there is no adapter folder",
        ),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "lorafold.toml"
    file.write_text(text)
    done = lorafold(
        "serve", str(file), "--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_taken_port_is_one_sentence(serve: Serve, tmp_path: Path) -> None:
    done = lorafold("serve", str(config_file(tmp_path)), "--address", serve.address)
    assert done.returncode == 1
    assert f"cannot listen on {serve.address} (server.address)" in done.stderr
    assert "loaded the base" not in done.stdout
    assert "Traceback" not in done.stderr


def test_help_fits_on_one_screen() -> None:
    for arguments in (["--help"], ["serve", "--help"], ["generate", "--help"], ["deployments", "--help"]):
        done = lorafold(*arguments)
        assert done.returncode == 0
        assert 5 < len(done.stdout.splitlines()) <= 40


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    done = lorafold("completion", shell)
    assert done.returncode == 0
    assert "_LORAFOLD_COMPLETE" in done.stdout
    completed = lorafold(_LORAFOLD_COMPLETE="bash_complete", COMP_WORDS="lorafold dep", COMP_CWORD="1")
    assert completed.stdout.strip() == "plain,deployments"


def test_sigterm_lets_requests_in_flight_finish(tmp_path: Path) -> None:
    with Serve(config_file(tmp_path)) as running, Client(running.address) as client:
        expected = client.generate("abcdefghijklmnop", deployment="upper").text
        stream = iter(client.stream("abcdefghijklmnop", deployment="upper"))
        first = next(stream)
        running.process.send_signal(signal.SIGTERM)
        assert first + "".join(stream) == expected == "ABCDEFGHIJKLMNOP"
        assert running.wait()[0] == 0


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with Serve(config_file(tmp_path)) as running, Client(running.address) as client:
        stream = iter(client.stream("abcdef", temperature=100.0, seed=1, max_tokens=400, stop=["\0"]))
        next(stream)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.stdout is not None
        while not running.process.stdout.readline().startswith("stopping"):
            pass
        running.process.send_signal(signal.SIGTERM)
        assert running.wait()[0] == 0


@pytest.mark.parametrize("command", ["update", "rollback", "delete"])
def test_an_empty_etag_is_not_taken_for_none(command: str) -> None:
    done = lorafold("deployments", command, "it", "--etag", "")
    assert done.returncode == 2
    assert "is empty: leave the option out, or give it a value" in done.stderr


def test_an_empty_adapter_is_no_folder() -> None:
    done = lorafold("deployments", "create", "it", "--adapter", "")
    assert done.returncode == 2
    assert "--adapter is empty: name a PEFT folder" in done.stderr
