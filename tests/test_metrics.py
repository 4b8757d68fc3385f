"""What the server counts, by scraping it: that all of it is documented, there, and right."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from lorafold.client import ServerError
from lorafold.metrics import Metrics
from lorafold.metrics.adapters import Deployed
from lorafold.metrics.document import SECTIONS, described, document
from lorafold.metrics.labels import Names
from lorafold.v1 import deployment_pb2 as pb
from lorafold.v1 import weights_pb2
from lorafold_adapters.policy import Mode
from tests.conftest import DEMO, RunningServer, demo_config, serving

ONLY_WHEN_BROUGHT = {"lorafold_adapter_fetch_seconds"}
"""What a server with room for all adapters never does."""


def scrape(server: RunningServer) -> dict[str, Metric]:
    """Everything that a server tells, by name."""
    with urllib.request.urlopen(f"http://{server.app.metrics_address}/metrics") as page:
        return {metric.name: metric for metric in text_string_to_metric_families(page.read().decode())}


def value(server: RunningServer, sample: str, **labels: str) -> float:
    """The sum of the samples of that name with these labels, and any others."""
    found = [each for metric in scrape(server).values() for each in metric.samples if each.name == sample]
    return sum(each.value for each in found if labels.items() <= each.labels.items())


@pytest.fixture(scope="module")
def used() -> Iterator[RunningServer]:
    """A server that has done a bit of everything."""
    with serving(demo_config(metrics={"compat": "vllm"})) as running:
        for name in ("base", "upper", "rot13", "shift", "swapcase", "vowels"):
            running.client.generate("Hello", deployment=name)
        running.client.stubs.weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="rot13"))
        running.client.generate("Hello", deployment="rot13")
        running.client.stubs.weights.ReleaseFoldState(weights_pb2.ReleaseFoldStateRequest())
        running.client.stubs.weights.VerifyBase(weights_pb2.VerifyBaseRequest())
        probe = weights_pb2.MeasureOverheadRequest(batches=[1], adapters=[1], max_pairs=16)
        assert list(running.client.stubs.weights.MeasureOverhead(probe))[-1].HasField("overhead")
        yield running


def test_the_page_is_what_the_code_says() -> None:
    page = Path(__file__).parent.parent / "docs" / "metrics.md"
    assert page.read_text() == document(), "run: python -m lorafold.metrics.document > docs/metrics.md"


def test_a_scrape_has_every_documented_metric_and_no_other(used: RunningServer) -> None:
    documented = {row[0].removesuffix("_total") for make in SECTIONS.values() for row in described(make)}
    found = {name: metric for name, metric in scrape(used).items() if not name.endswith("_created")}
    assert found.keys() == documented
    assert {name for name, metric in found.items() if not metric.samples} == ONLY_WHEN_BROUGHT
    for metric in found.values():
        for sample in metric.samples:
            assert 0 <= sample.value < 1e12, sample


def test_tokens_and_times_are_counted_by_deployment_and_mode(used: RunningServer) -> None:
    before = {
        name: value(used, name, deployment="shift", mode="unmerged")
        for name in (
            "lorafold_time_to_first_token_seconds_count",
            "lorafold_inter_token_seconds_count",
            "lorafold_queue_seconds_count",
            "lorafold_request_seconds_count",
            "lorafold_request_seconds_sum",
        )
    }
    answer = used.client.generate("Hello", deployment="shift")
    tokens = len(answer.token_ids)
    assert tokens > 2
    grown = {name: value(used, name, deployment="shift", mode="unmerged") - old for name, old in before.items()}
    assert grown["lorafold_time_to_first_token_seconds_count"] == 1
    assert grown["lorafold_inter_token_seconds_count"] == tokens - 1
    assert grown["lorafold_queue_seconds_count"] == 1
    assert grown["lorafold_request_seconds_count"] == 1
    assert 0 < grown["lorafold_request_seconds_sum"] < 30
    assert not value(used, "lorafold_inter_token_seconds_count", deployment="shift", mode="merged")


def test_times_of_a_request_add_up(used: RunningServer) -> None:
    parts = ("queue", "swap_wait", "request_prefill", "request_decode")
    of_parts = sum(value(used, f"lorafold_{part}_seconds_sum") for part in parts)
    assert of_parts == pytest.approx(value(used, "lorafold_request_seconds_sum"))


def test_changes_of_the_weights_are_told_with_their_parts(used: RunningServer) -> None:
    assert value(used, "lorafold_folded") == 1, "exactly one thing is in the weights"
    weights = used.client.stubs.weights
    folds = value(used, "lorafold_weights_changes_total", result="folded")
    held = weights.MergeAdapter(weights_pb2.MergeAdapterRequest(deployment="rot13"))
    assert value(used, "lorafold_weights_changes_total", result="folded") == folds + 1
    assert value(used, "lorafold_folded", adapter=held.fold_state.adapter_digest[:12]) == 1
    assert not value(used, "lorafold_folded", adapter="base")
    assert value(used, "lorafold_fold_held") == 1
    assert value(used, "lorafold_folded_bytes_total") >= held.weight_bytes > 0
    weights.UnmergeAdapter(weights_pb2.UnmergeAdapterRequest())
    assert value(used, "lorafold_folded", adapter="base") == 1
    assert not value(used, "lorafold_fold_held")
    assert (
        value(used, "lorafold_generation")
        == weights.GetFoldState(weights_pb2.GetFoldStateRequest()).fold_state.generation
    )
    of_phases = value(used, "lorafold_weights_change_phase_seconds_sum")
    assert 0.3 * value(used, "lorafold_weights_change_seconds_sum") < of_phases
    assert of_phases <= value(used, "lorafold_weights_change_seconds_sum")
    assert value(used, "lorafold_base_verified") == 1


def test_a_damaged_base_is_told(used: RunningServer) -> None:
    seen: list[float] = []
    parts, weights = used.app.parts, used.app.parts.engine.weights

    def damage() -> None:
        name, tensor = next(iter(parts.base.model.named_parameters()))
        tensor.data.view(-1)[0] += 1.0
        assert name in weights.verify().mismatched
        seen.append(value(used, "lorafold_base_verified"))

    reloads = value(used, "lorafold_base_reloads_total")
    parts.engine.call(damage).result(60)
    used.client.generate("Hello", deployment="rot13")
    assert seen == [0]
    assert value(used, "lorafold_base_verified") == 1
    assert value(used, "lorafold_base_reloads_total") == reloads + 1
    assert value(used, "lorafold_weights_changes_total", result="reloaded") == reloads + 1


def test_calls_are_counted_by_how_they_ended(used: RunningServer) -> None:
    def handled(method: str, code: str) -> float:
        return value(used, "grpc_server_handled_total", grpc_method=method, grpc_code=code)

    def messages() -> float:
        return value(used, "grpc_server_msg_sent_total", grpc_method="StreamGenerate")

    streams, sent, refused = handled("StreamGenerate", "OK"), messages(), handled("Generate", "NotFound")
    told = len(list(used.client.stream("Hello", deployment="rot13")))
    with pytest.raises(ServerError):
        used.client.generate("Hello", deployment="nobody")
    assert handled("StreamGenerate", "OK") == streams + 1
    assert messages() >= sent + told > sent
    assert handled("Generate", "NotFound") == refused + 1


def test_what_a_deployment_points_at_goes_with_it(used: RunningServer) -> None:
    deployments = used.client.stubs.deployments
    made = pb.Deployment(name="shout", adapter_path=str(DEMO / "upper"), policy=pb.POLICY_MERGED)
    digest = deployments.CreateDeployment(pb.CreateDeploymentRequest(deployment=made)).deployment.adapter_digest
    count = value(used, "lorafold_deployments")
    used.client.generate("Hello", deployment="shout")
    assert value(used, "lorafold_deployment_info", deployment="shout", adapter=digest[:12], policy="merged") == 1
    assert 0 < value(used, "lorafold_delta_error_ratio", deployment="shout") < 1e-3  # fp32 weights.
    assert value(used, "lorafold_requests_total", deployment="shout") == 1
    deployments.DeleteDeployment(pb.DeleteDeploymentRequest(name="shout"))
    assert not any(
        sample.labels.get("deployment") == "shout" for metric in scrape(used).values() for sample in metric.samples
    )
    assert value(used, "lorafold_deployments") == count - 1


def test_more_deployments_than_labels_are_other() -> None:
    names = Names(2)
    for name in "abc":
        names.add(name)
    asked = ("b", "a", "c", "b", "base", "unknown", "never deployed")
    assert [names.label(name) for name in asked] == ["b", "a", "other", "b", "base", "unknown", "other"]
    assert names.own() == ["a", "b"]
    assert names.forget("a")
    assert not names.forget("never deployed")
    assert names.label("c") == "c"
    assert names.label("a") == "other", "an answer that ends after its deployment"


def test_series_are_as_few_as_declared() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, deployments=3)
    for number in range(100):
        metrics.deployments.deployed(f"d{number}", Deployed(adapter="a", policy="auto", delta_error=0.1))
        metrics.token(f"d{number}", Mode.MERGED, 0.001, first=False)

    def of(metric: str) -> set[str]:
        found = [each for each in registry.collect() if each.name == metric]
        return {sample.labels["deployment"] for each in found for sample in each.samples}

    assert of("lorafold_inter_token_seconds") == {"d0", "d1", "d2", "other"}
    assert of("lorafold_delta_error_ratio") == {"d0", "d1", "d2"}
    others = {"deployment": "other", "mode": "merged"}
    assert registry.get_sample_value("lorafold_inter_token_seconds_count", others) == 97
    metrics.forget("d1")
    metrics.token("d1", Mode.MERGED, 0.001, first=False)
    assert of("lorafold_inter_token_seconds") == {"d0", "d2", "other"}
