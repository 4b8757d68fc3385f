"""A server in a process of its own, as people run it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Server:
    """One that answers."""

    address: str
    metrics: str
    """URL of its page."""
    process: int

    @property
    def resident_bytes(self) -> int:
        """Host memory that the process has now (on Linux)."""
        pages = Path(f"/proc/{self.process}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def served(file: Path, tables: Mapping[str, Mapping[str, Any]]) -> Iterator[Server]:
    """`lorafold serve` on `file`, which is written from tables of plain values. Raises RuntimeError if it ends."""
    file.write_text("".join(table(name, values) for name, values in tables.items()))
    command = [sys.executable, "-m", "lorafold", "serve", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield said(process)
        finally:
            process.terminate()


def table(name: str, values: Mapping[str, Any]) -> str:
    """As TOML, which has the plain values of JSON."""
    return "\n".join([f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]) + "\n"


def said(process: "subprocess.Popen[str]") -> Server:
    """Where it serves, once it does."""
    assert process.stdout is not None
    address = ""
    for line in process.stdout:
        if line.startswith("serving on "):
            address = line.split()[2]
        if line.startswith("metrics at "):
            return Server(address=address, metrics=line.split()[2].removesuffix("/metrics"), process=process.pid)
    raise RuntimeError("the server ended; what it said is above")
