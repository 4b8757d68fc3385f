"""The shape of the project itself: who imports whom, and whether generated code is fresh."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STUBS = ROOT / "server" / "lorafold" / "v1"

# Package to the top-level packages it must never import.
FORBIDDEN = {
    "plugin/lorafold_adapters": {"lorafold", "grpc", "google", "prometheus_client", "tests", "bench"},
    "server/lorafold": {"tests", "bench"},
}


def imports_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def breaches(package: str, forbidden: set[str]) -> list[str]:
    files = (ROOT / package).rglob("*.py")
    return [f"{file.name}: {name}" for file in files for name in imports_of(file) if name.split(".")[0] in forbidden]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    assert breaches(package, FORBIDDEN[package]) == []


def test_the_import_test_would_find_a_breach() -> None:
    assert breaches("server/lorafold", {"lorafold_adapters"}) != []


@pytest.mark.parametrize("module", ["lorafold", "lorafold.client", "lorafold.cli"])
def test_clients_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_committed_stubs_are_what_the_protos_generate(tmp_path: Path) -> None:
    grpc_tools = pytest.importorskip("grpc_tools", reason="stubs are generated in the development environment only")
    del grpc_tools
    protos = sorted(str(file) for file in (ROOT / "protos").rglob("*.proto"))
    plugin = Path(sys.executable).parent / "protoc-gen-mypy_grpc"
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "grpc_python_out", "pyi_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos")]
    command += [f"--plugin=protoc-gen-mypy_grpc={plugin}", *outputs, f"--mypy_grpc_out=quiet:{tmp_path}", *protos]
    subprocess.run(command, check=True)
    fresh = {file.name: file.read_text() for file in (tmp_path / "lorafold" / "v1").iterdir()}
    committed = {file.name: file.read_text() for file in STUBS.iterdir() if file.is_file()}
    assert fresh.keys() == committed.keys()
    for name, text in fresh.items():
        assert text == committed[name], f"{name} is stale: run 'make protos'"


def test_nothing_speaks_of_one_persons_machine() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0"):
        if name.endswith((".py", ".md", ".toml", ".txt", ".yaml", "Makefile")) and Path(ROOT / name).exists():
            text = (ROOT / name).read_text()
            assert "/home" + "/" not in text, name
            assert "/root" + "/" not in text, name


def test_the_script_for_a_gpu_fits_eight_minutes_and_names_what_exists() -> None:
    script = (ROOT / "bench" / "gpu.sh").read_text()
    assert subprocess.run(["bash", "-n", ROOT / "bench" / "gpu.sh"], check=False).returncode == 0
    limits = [int(seconds) for seconds in re.findall(r"^part (\d+) ", script, re.MULTILINE)]
    assert len(limits) == int(re.findall(r"of (\d+) parts failed", script)[0])
    assert 0 < sum(limits) < 480
    named = re.findall(r"-m bench\.(\w+)", script)
    assert len(named) > 3
    assert all((ROOT / "bench" / f"{name}.py").exists() for name in named)
    tests = re.findall(r"tests/\w+\.py", script)
    assert len(tests) > 3
    assert all((ROOT / name).exists() for name in tests)
