"""A real Prometheus that scrapes a server: the one that is installed, or Debian's package, unpacked somewhere."""

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest


def program(folder: Path) -> str:
    """The binary. Skips the test where there is none to be had."""
    installed = shutil.which("prometheus")
    if installed is not None:
        return installed
    if shutil.which("apt-get") is None:
        pytest.skip("Prometheus is not installed, and this is no Debian")
    fetched = subprocess.run(["apt-get", "download", "prometheus"], cwd=folder, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"Prometheus is not installed, and cannot be fetched: {fetched.stderr.strip()}")
    subprocess.run(["dpkg", "-x", str(next(folder.glob("*.deb"))), "unpacked"], cwd=folder, check=True)
    return str(folder / "unpacked" / "usr" / "bin" / "prometheus")


class Prometheus:
    """Answers PromQL."""

    def __init__(self, address: str) -> None:
        self._url = f"http://{address}/api/v1"

    def ready(self) -> bool:
        try:
            return bool(self.query("up == 1"))
        except urllib.error.URLError:
            return False

    def query(self, promql: str) -> list[Any]:
        """The series, now. Raises AssertionError if it is no PromQL."""
        asked = urllib.parse.urlencode({"query": promql})
        try:
            with urllib.request.urlopen(f"{self._url}/query?{asked}") as page:
                answer = json.load(page)
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.SERVICE_UNAVAILABLE:  # It is still starting.
                raise
            raise AssertionError(f"{promql}: {error.read().decode()}") from error
        return list(answer["data"]["result"])


@contextmanager
def scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that asks `target` several times a second."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 250ms, scrape_timeout: 250ms}\n"
        f"scrape_configs: [{{job_name: lorafold, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    arguments = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with subprocess.Popen([program(folder), *arguments, "--log.level=error"], stdout=subprocess.DEVNULL) as running:
        try:
            yield Prometheus(address)
        finally:
            running.terminate()
