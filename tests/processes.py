"""lorafold in processes of its own, as people run it."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.conftest import DEMO

Run = subprocess.CompletedProcess[str]


def lorafold(*arguments: str, stdin: str = "", **environment: str) -> Run:
    return subprocess.run(
        [sys.executable, "-m", "lorafold", *arguments],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=100,
        check=False,
        env={**os.environ, **environment},
    )


def config_file(folder: Path, extra: str = "") -> Path:
    file = folder / "lorafold.toml"
    file.write_text(
        f'[base]\nmodel = "{DEMO / "base"}"\n[server]\naddress = "127.0.0.1:0"\nmetrics_address = "127.0.0.1:0"\n'
        f'[[deployments]]\nname = "upper"\nadapter = "{DEMO / "upper"}"\npolicy = "merged"\n{extra}'
    )
    return file


class Serve:
    """A `lorafold serve` process that answers; at the end of a `with` it is killed if it still runs."""

    def __init__(self, file: Path, python: Sequence[str] = ("-m", "lorafold")) -> None:
        """`python`: what Python runs, before the arguments of `lorafold`."""
        self.process = subprocess.Popen(
            [sys.executable, *python, "serve", str(file), "--log-format", "json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.said: list[str] = []
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            if line.startswith("serving on "):
                break
        self.address = self.said[-1].split()[2]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        with self.process:  # Closes its pipes.
            pass

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out
