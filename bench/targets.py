"""What the measured ratios are to reach, by kind of device. Plain data: nothing fails because one is missed."""

from collections.abc import Iterator, Mapping
from typing import Any

# Key of the result, then what it must reach: by batch, or at any (None). `over_*` and shares are to be at least that.
TARGETS: dict[str, dict[str, dict[str | None, float]]] = {
    "cpu": {
        "over_generate": {"1": 1.0, "8": 1.1, "32": 1.1},
        "over_continuous_batching": {None: 1.2},
        "roofline_share": {None: 0.7},
        "roofline_share_compiled": {None: 0.7},
        "over_peft_mixed": {None: 2.0},
        "unmerged_over_merged": {"8": 1.10},
        "unmerged_over_merged_8_adapters": {"8": 1.25},
        "merged_over_base": {None: 1.01},
        "grpc_over_engine": {None: 0.9},
    },
    "cuda": {
        "over_generate": {None: 2.0},
        "roofline_share": {None: 0.85},
        "over_peft_mixed": {None: 3.0},
        "unmerged_over_merged": {None: 1.05},
        "unmerged_over_merged_8_adapters": {None: 1.08},
        "merged_over_base": {None: 1.005},
        "grpc_over_engine": {None: 0.95},
    },
}
# The same wherever it is measured.
ANYWHERE: dict[str, dict[str | None, float]] = {
    "wrong": {None: 0},
    "lost": {None: 0},
    "longest_gap_over_fold_time": {None: 1.5},
    "throughput_over_no_swaps": {None: 0.9},
    "p99_ttft_over_resident": {None: 2.0},
    "metrics_share": {None: 0.01},
    "probed_over_metrics": {None: 1.02},
}
AT_MOST = (
    "unmerged_over_merged",
    "unmerged_over_merged_8_adapters",
    "merged_over_base",
    "wrong",
    "lost",
    "longest_gap_over_fold_time",
    "p99_ttft_over_resident",
    "metrics_share",
    "probed_over_metrics",
)


def missed(result: Mapping[str, Any], device: str) -> Iterator[str]:
    """A line for people for each value of `result` that is not what it should be; what was not measured counts not."""
    for key, wanted in {**ANYWHERE, **TARGETS.get(device, {})}.items():
        found = result.get(key)
        values = found if isinstance(found, Mapping) else {None: found}
        for batch, value in values.items():
            target = wanted.get(batch, wanted.get(None))
            if value is None or target is None:
                continue
            if value > target if key in AT_MOST else value < target:
                at = "" if batch is None else f" at batch {batch}"
                bound = "at most" if key in AT_MOST else "at least"
                yield f"{key}{at} is {value}, should be {bound} {target}"
