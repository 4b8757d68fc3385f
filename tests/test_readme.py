"""What the README shows is what runs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from lorafold.client import Client
from lorafold.config import parse_config
from tests.conftest import RunningServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for found, text in fences if found == language]


def python(script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100)


def test_the_plugin_script_runs_as_it_stands() -> None:
    script = next(block for block in blocks("python") if "AdapterManager" in block)
    done = python(script)
    assert done.returncode == 0, done.stderr


def test_the_client_script_runs_as_it_stands(server: RunningServer, client: Client) -> None:
    del client
    script = next(block for block in blocks("python") if "lorafold.client" in block)
    script = script.replace("127.0.0.1:50051", server.address).replace('"sql"', '"upper"')
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert " merged " in done.stdout


def test_the_configuration_is_a_good_one() -> None:
    text = next(re.findall(r"<<'END'\n(.*?)\nEND\n", block, re.DOTALL)[0] for block in blocks("sh") if "END" in block)
    config = parse_config(tomllib.loads(text), Path("lorafold.toml"))
    assert config.deployments[0].name == "sql"


def test_the_file_tree_names_every_module_and_no_other() -> None:
    tree = next(block for block in blocks("") if "protos/lorafold/v1/" in block)
    for folder, package in (("plugin", "lorafold_adapters"), ("server", "lorafold")):
        root = ROOT / folder / package
        for file in root.rglob("*.py"):
            relative = file.relative_to(root)
            covered = file.name.startswith("__") or relative.parts[0] in ("v1", "cli", "services", "demo")
            assert covered or str(relative) in tree, relative
    for name in re.findall(r"^  (?:engine/|metrics/)?([a-z_]+\.py)", tree, re.MULTILINE):
        assert list(ROOT.glob(f"[ps]*/*/{name}")) or list(ROOT.glob(f"server/*/[em]*/{name}")), name


def test_the_make_words_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in ("demo", "test", "check", "protos", "bench"):
        assert f"\n{word}: " in makefile
