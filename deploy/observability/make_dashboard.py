"""Writes `dashboards/lorafold.json`: `python deploy/observability/make_dashboard.py`. The panels are listed here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "dashboards" / "lorafold.json"
SOURCE = {"type": "prometheus", "uid": "lorafold-prometheus"}
WIDTH, HEIGHT = 24, 8
"""Of a row, in Grafana's units."""
RATE = "[$__rate_interval]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One panel."""

    title: str
    told: str
    queries: tuple[tuple[str, str], ...]
    """PromQL, and how its series are called."""
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8


def quantile(share: float, histogram: str, *by: str) -> str:
    """PromQL for a quantile of a histogram."""
    return f"histogram_quantile({share}, sum by ({', '.join(('le', *by))}) (rate({histogram}_bucket{RATE})))"


ROWS: dict[str, tuple[Panel, ...]] = {
    "What unmerged costs, and what is folded": (
        Panel(
            title="Unmerged over merged",
            told="A decode step with low-rank paths over the same step without, and its 95 % confidence interval.",
            queries=tuple(
                (
                    f"lorafold_unmerged_overhead_ratio{end}",
                    f"{{{{batch}}}} rows, {{{{adapters}}}} adapters, r{{{{rank}}}}{name}",
                )
                for end, name in (("", ""), ("_low", " low"), ("_high", " high"))
            ),
        ),
        Panel(
            title="In the weights",
            told="The adapter that is folded now, or the base.",
            queries=(("lorafold_folded", "{{adapter}}"),),
            kind="stat",
            width=4,
        ),
        Panel(
            title="Base verified",
            told="1 if the base was whole when it was last given back or read.",
            queries=(("lorafold_base_verified", "verified"), ("lorafold_fold_held", "held by hand")),
            kind="stat",
            width=4,
        ),
        Panel(
            title="Changes of the weights",
            told="Folds, and how often the base was given back.",
            queries=((f"sum by (result) (rate(lorafold_weights_changes_total{RATE}))", "{{result}}"),),
            unit="ops",
        ),
    ),
    "Latency": (
        Panel(
            title="Time to first token, by mode",
            told="In the engine.",
            queries=(
                (quantile(0.5, "lorafold_time_to_first_token_seconds", "mode"), "{{mode}} median"),
                (quantile(0.99, "lorafold_time_to_first_token_seconds", "mode"), "{{mode}} p99"),
            ),
            unit="s",
        ),
        Panel(
            title="From token to token, by mode",
            told="In the engine.",
            queries=(
                (quantile(0.5, "lorafold_inter_token_seconds", "mode"), "{{mode}} median"),
                (quantile(0.99, "lorafold_inter_token_seconds", "mode"), "{{mode}} p99"),
            ),
            unit="s",
        ),
        Panel(
            title="From token to token, by deployment",
            told="99th percentile, in the engine.",
            queries=((quantile(0.99, "lorafold_inter_token_seconds", "deployment"), "{{deployment}}"),),
            unit="s",
        ),
        Panel(
            title="Waiting for a turn",
            told="Because others had theirs, or weights were changed; 99th percentile.",
            queries=((quantile(0.99, "lorafold_swap_wait_seconds", "deployment"), "{{deployment}}"),),
            unit="s",
        ),
        Panel(
            title="Waiting for room",
            told="99th percentile.",
            queries=((quantile(0.99, "lorafold_queue_seconds", "deployment"), "{{deployment}}"),),
            unit="s",
        ),
        Panel(
            title="Decode steps, by mode",
            told="Median of the forward step and the choice of tokens.",
            queries=((quantile(0.5, "lorafold_step_seconds", "phase", "mode"), "{{phase}} {{mode}}"),),
            unit="s",
        ),
    ),
    "Traffic": (
        Panel(
            title="Tokens generated, by deployment",
            told="A second.",
            queries=((f'sum by (deployment) (rate(lorafold_tokens_total{{kind="answer"}}{RATE}))', "{{deployment}}"),),
        ),
        Panel(
            title="Requests that ended, by outcome",
            told="A second.",
            queries=((f"sum by (outcome) (rate(lorafold_requests_total{RATE}))", "{{outcome}}"),),
            unit="reqps",
        ),
        Panel(
            title="Requests now",
            told="With room in the batch, and without.",
            queries=(("lorafold_requests_running", "running"), ("lorafold_requests_waiting", "waiting")),
        ),
        Panel(
            title="Cache for keys and values",
            told="Share of its pages in use.",
            queries=(("lorafold_kv_cache_usage_ratio", "used"),),
            unit="percentunit",
        ),
        Panel(
            title="Adapters, by place",
            told="On the device, in host memory, and all.",
            queries=(("lorafold_adapters", "{{place}}"),),
        ),
        Panel(
            title="gRPC calls, by code",
            told="A second.",
            queries=(
                (
                    f"sum by (grpc_method, grpc_code) (rate(grpc_server_handled_total{RATE}))",
                    "{{grpc_method}} {{grpc_code}}",
                ),
            ),
            unit="reqps",
        ),
    ),
    "Folding": (
        Panel(
            title="What a change of the weights takes",
            told="99th percentile.",
            queries=((quantile(0.99, "lorafold_weights_change_seconds", "result"), "{{result}}"),),
            unit="s",
        ),
        Panel(
            title="Its parts",
            told="Mean.",
            queries=(
                (
                    f"sum by (phase) (rate(lorafold_weights_change_phase_seconds_sum{RATE})) / "
                    f"sum by (phase) (rate(lorafold_weights_change_phase_seconds_count{RATE}))",
                    "{{phase}}",
                ),
            ),
            unit="s",
        ),
        Panel(
            title="What the policy does, by cause",
            told="Changes of its plan a second.",
            queries=((f"sum by (cause) (rate(lorafold_policy_decisions_total{RATE}))", "{{cause}}"),),
            unit="ops",
        ),
        Panel(
            title="What a fold loses of an adapter",
            told="Share of its delta, by norm, that rounding takes.",
            queries=(("lorafold_delta_error_ratio", "{{deployment}}"),),
            unit="percentunit",
        ),
        Panel(
            title="Memory of the undo",
            told="What is held to give the base back.",
            queries=(("lorafold_undo_bytes", "undo"),),
            unit="bytes",
        ),
        Panel(
            title="Deployments",
            told="What each points at.",
            queries=(("lorafold_deployment_info", "{{deployment}}: {{adapter}}, {{policy}}"),),
            kind="stat",
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """What Grafana reads."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"h": 1, "w": WIDTH, "x": 0, "y": y}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place, "collapsed": False})
        y, x = y + 1, 0
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + HEIGHT
            panels.append(panel_of(panel, len(panels) + 1, x, y))
            x += panel.width
        y += HEIGHT
    return {
        "uid": "lorafold",
        "title": "lorafold",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-15m", "to": "now"},
        "panels": panels,
    }


def panel_of(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """One panel, as Grafana has it."""
    targets = [
        {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": query, "legendFormat": legend}
        for index, (query, legend) in enumerate(panel.queries)
    ]
    made: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.told,
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": panel.width, "x": x, "y": y},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0 if panel.kind == "timeseries" else None},
            "overrides": [],
        },
        "targets": targets,
    }
    if panel.kind == "stat":
        made["options"] = {
            "textMode": "value_and_name",
            "colorMode": "none",
            "reduceOptions": {"calcs": ["lastNotNull"]},
        }
    return made


def text() -> str:
    """The file."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
