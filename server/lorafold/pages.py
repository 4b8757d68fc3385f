"""What the metrics port serves: `/metrics` for Prometheus, and a page for people at `/`. Knows no engine.

The text format 0.0.4, whatever a scraper asks for: in OpenMetrics, prometheus-client 0.26 writes `vllm_` for `vllm:`.
"""

from collections.abc import Callable, Iterable
from importlib.resources import files
from socketserver import ThreadingMixIn
from threading import Thread
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

Start = Callable[[str, list[tuple[str, str]]], object]
HTML = "text/html; charset=utf-8"
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
"""The page loads nothing from anywhere else."""


class Server(ThreadingMixIn, WSGIServer):
    """A thread for each request, none of which keeps the process alive."""

    daemon_threads = True


class Quiet(WSGIRequestHandler):
    """Says nothing about requests."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


class Pages:
    """The WSGI application."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._page = files("lorafold").joinpath("page.html").read_bytes()

    def __call__(self, environment: dict[str, object], start: Start) -> Iterable[bytes]:
        """See PEP 3333."""
        path = environment.get("PATH_INFO")
        if path == "/metrics":
            return answer(start, "200 OK", CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self._registry))
        if path in ("", "/"):
            return answer(start, "200 OK", HTML, self._page)
        return answer(start, "404 Not Found", "text/plain", b"here are / for people, and /metrics for Prometheus\n")


def answer(start: Start, status: str, kind: str, body: bytes) -> list[bytes]:
    """One response."""
    headers = {
        "Content-Type": kind,
        "Content-Length": str(len(body)),
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    start(status, [*headers.items()])
    return [body]


def serve_pages(address: str, registry: CollectorRegistry) -> tuple[str, Callable[[], None]]:
    """Starts the port; returns its address and what ends it. Raises OSError or ValueError."""
    host, _, port = address.rpartition(":")
    http = make_server(host.strip("[]"), int(port), Pages(registry), Server, Quiet)
    thread = Thread(target=http.serve_forever, name="lorafold-metrics", daemon=True)
    thread.start()

    def stop() -> None:
        http.shutdown()
        http.server_close()
        thread.join()

    return f"{host}:{http.server_port}", stop
