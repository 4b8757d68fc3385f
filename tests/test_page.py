"""The page for people at the metrics port, in a real browser, against what the server counts."""

import re
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from wsgiref.simple_server import make_server

import pytest

from lorafold.pages import Pages, Quiet, Server
from lorafold.v1 import weights_pb2
from tests.browser import chromium, screenshot
from tests.conftest import POLICIES, RunningServer, demo_config, serving
from tests.test_metrics import value


@pytest.fixture(scope="module")
def busy() -> Iterator[RunningServer]:
    """A server that has answered everybody, was measured, and holds rot13 in the weights."""
    with serving(demo_config()) as running:
        for name in (*POLICIES, "base"):
            running.client.generate("Hello World", deployment=name)
        probe = weights_pb2.MeasureOverheadRequest(batches=[1, 4], adapters=[1], max_pairs=16)
        assert list(running.client.stubs.weights.MeasureOverhead(probe))
        running.client.stubs.weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="rot13"))
        yield running


def url(server: RunningServer) -> str:
    return f"http://{server.app.metrics_address}/"


def text_of(document: str, element: str) -> str:
    """What an element without children says."""
    found = re.search(rf'id="{element}"[^>]*>([^<]*)<', document)
    assert found is not None, element
    return found[1]


def test_the_page_shows_what_the_server_counts(busy: RunningServer) -> None:
    document = chromium(url(busy))
    assert text_of(document, "weights") == "rot13"
    assert "held by hand" in document
    assert "base verified" in document
    assert text_of(document, "running") == "0"
    assert not text_of(document, "trouble")
    ratio = value(busy, "lorafold_unmerged_overhead_ratio", batch="4")
    assert "4 rows, 1 adapter, rank 8, 128 tokens before</small>" in document
    assert f"<b>{ratio:.2f}</b>" in document
    for name in POLICIES:
        assert f"<td>{name}</td>" in document
    for mode in ("base", "merged", "unmerged"):
        row = re.search(rf'<tr data-mode="{mode}">(.*?)</tr>', document)
        assert row is not None
        assert len(re.findall(r"[\d.]+ ms", row[1])) >= 2, row[1]


def test_it_says_when_nothing_was_measured() -> None:
    with serving(demo_config()) as fresh:
        document = chromium(url(fresh))
        assert "Not measured yet: run lorafold bench overhead" in document
        assert text_of(document, "weights") == "base"


def test_it_loads_nothing_from_anywhere_else(busy: RunningServer) -> None:
    with urllib.request.urlopen(url(busy)) as page:
        policy = page.headers["Content-Security-Policy"]
        text = page.read().decode()
    assert policy.startswith("default-src 'none'")
    assert "https://" not in text
    assert not re.findall(r"(?:src|href)=", text)


def test_there_are_two_pages(busy: RunningServer) -> None:
    with urllib.request.urlopen(url(busy) + "metrics") as page:
        assert page.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    with pytest.raises(urllib.error.HTTPError) as missing:
        urllib.request.urlopen(url(busy) + "metric")
    assert missing.value.code == 404
    missing.value.close()


WATCH = b"<script>setInterval(() => document.title = `${document.body.scrollWidth} in ${innerWidth}`, 500)</script>"
"""Tells a test how wide the page is, and how wide the window."""


@pytest.mark.parametrize("width", [500, 1100])
def test_nothing_sticks_out_of_the_window(busy: RunningServer, width: int) -> None:
    assert not sticks_out(busy, width)
    assert sticks_out(busy, width, b'<div style="width: 3000px">wide</div>')


def sticks_out(server: RunningServer, width: int, more: bytes = b"") -> bool:
    """Whether the page, with something `more` in it, is wider than a window of that width."""
    pages = Pages(server.app.parts.metrics.registry)
    pages._page += more + WATCH
    http = make_server("127.0.0.1", 0, pages, Server, Quiet)
    thread = Thread(target=http.serve_forever)
    thread.start()
    try:
        document = chromium(f"http://127.0.0.1:{http.server_port}/", f"--window-size={width},900")
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
    found = re.search(r"<title>(\d+) in (\d+)</title>", document)
    assert found is not None
    assert "4 rows, 1 adapter" in document, "it has been drawn"
    assert int(found[2]) <= width
    return int(found[1]) > int(found[2])


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_light_or_dark_as_the_reader_wants(busy: RunningServer, tmp_path: Path, dark: bool) -> None:
    file = tmp_path / "page.png"
    screenshot(url(busy), file, width=500, height=900, dark=dark)
    assert (max(first_pixel(file.read_bytes())) < 80) == dark


def first_pixel(png: bytes) -> tuple[int, ...]:
    """Red, green, blue: whatever a PNG's first line is filtered by, its first pixel stands there as it is."""
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    return tuple(zlib.decompress(data)[1:4])
