"""Every query of the dashboard, and of those who know vLLM's names, by a real Prometheus on a loaded server."""

import importlib.util
import json
import math
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lorafold.v1 import weights_pb2
from tests.conftest import POLICIES, RunningServer, demo_config, serving
from tests.prometheus import Prometheus, scraping
from tests.test_metrics import scrape

OBSERVABILITY = Path(__file__).parent.parent / "deploy" / "observability"
DASHBOARD = json.loads((OBSERVABILITY / "dashboards" / "lorafold.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
HISTOGRAMS = (
    "e2e_request_latency_seconds",
    "inter_token_latency_seconds",
    "time_to_first_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_max_num_generation_tokens",
)
"""Of which vLLM's dashboard asks for quantiles, rates of sums, or heat maps."""
SERIES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
)


@pytest.fixture(scope="module")
def loaded() -> Iterator[RunningServer]:
    """A server that answers everybody, again and again, until the tests are over."""
    over = threading.Event()
    with serving(demo_config(metrics={"compat": "vllm"})) as running, ThreadPoolExecutor(len(POLICIES) + 1) as pool:

        def ask(name: str) -> None:
            while not over.is_set():
                running.client.generate("Hello World", deployment=name)

        probe = weights_pb2.MeasureOverheadRequest(batches=[1], adapters=[1], max_pairs=16)
        assert list(running.client.stubs.weights.MeasureOverhead(probe))[-1].HasField("overhead")
        asking = [pool.submit(ask, name) for name in (*POLICIES, "base")]
        try:
            yield running
        finally:
            over.set()
            for each in asking:
                each.result(60)


@pytest.fixture(scope="module")
def prometheus(
    loaded: RunningServer, tmp_path_factory: pytest.TempPathFactory, until: Callable[..., None]
) -> Iterator[Prometheus]:
    with scraping(loaded.app.metrics_address, tmp_path_factory.mktemp("prometheus")) as running:
        until(running.ready)
        yield running


def numbers(series: list[Any]) -> list[float]:
    return [float(each["value"][1]) for each in series]


def there(prometheus: Prometheus, promql: str) -> bool:
    """True once the query has a number."""
    return any(math.isfinite(number) for number in numbers(prometheus.query(promql)))


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_every_query_of_the_dashboard_has_data(
    prometheus: Prometheus, until: Callable[..., None], title: str, query: str
) -> None:
    until(lambda: there(prometheus, query.replace("$__rate_interval", "10s")), 30)


def test_a_query_for_what_is_not_there_has_none(prometheus: Prometheus) -> None:
    assert not there(prometheus, "lorafold_no_such_thing")
    assert not there(prometheus, 'lorafold_step_seconds_count{mode="folded"}')


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_vllms_dashboard_finds_its_histograms(
    prometheus: Prometheus, until: Callable[..., None], loaded: RunningServer, name: str
) -> None:
    model = loaded.app.parts.config.base.model
    mean = f'rate(vllm:{name}_sum{{model_name="{model}"}}[10s]) / rate(vllm:{name}_count{{model_name="{model}"}}[10s])'
    buckets = f'sum by (le) (rate(vllm:{name}_bucket{{model_name="{model}"}}[10s]))'
    until(lambda: there(prometheus, mean) and there(prometheus, f"histogram_quantile(0.99, {buckets})"), 30)


@pytest.mark.parametrize("name", SERIES)
def test_vllms_dashboard_finds_its_series_once(prometheus: Prometheus, loaded: RunningServer, name: str) -> None:
    query = f'vllm:{name}{{model_name="{loaded.app.parts.config.base.model}"}}'
    found = prometheus.query(query)
    reasons = {each["metric"].get("finished_reason", "") for each in found}
    assert reasons == ({"stop"} if name == "request_success_total" else {""})
    assert len(found) == 1


def test_an_endpoint_picker_finds_who_runs_and_who_waits(loaded: RunningServer, until: Callable[..., None]) -> None:
    """It reads the newest series of this family: commas between names, and the number of places as a number."""
    seen: set[str] = set()

    def everybody() -> bool:
        (sample,) = scrape(loaded)["vllm:lora_requests_info"].samples
        assert sample.value > 1.7e9
        assert int(sample.labels["max_lora"]) == 256
        for label in ("running_lora_adapters", "waiting_lora_adapters"):
            seen.update(name for name in sample.labels[label].split(",") if name)
        assert seen <= POLICIES.keys()
        return seen == POLICIES.keys()

    until(everybody)


def test_nobody_has_vllms_names_unless_asked_for() -> None:
    with serving(demo_config()) as plain:
        assert not [name for name in scrape(plain) if name.startswith("vllm:")]


def test_the_dashboard_is_what_its_list_of_panels_says() -> None:
    made = maker()
    assert made.FILE.read_text() == made.text(), "run: python deploy/observability/make_dashboard.py"
    first = [panel["title"] for panel in DASHBOARD["panels"] if panel["gridPos"]["y"] == 1]
    assert first[:2] == ["Unmerged over merged", "In the weights"]


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_dashboard", OBSERVABILITY / "make_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
