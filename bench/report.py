"""What `bench.throughput` says of what it measured: lines for people, and the keys of its last line."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from bench.cases import Case, Measured, equal_rows, ratios, roofline_shares
from bench.plans import Plan
from bench.work import steps_of

BY_BATCH = (
    "over_generate",
    "over_continuous_batching",
    "unmerged_over_merged",
    "unmerged_over_merged_8_adapters",
    "peft_unmerged_over_merged",
    "compiled_over_merged",
)
EQUAL_IN_FP32 = "generate_dynamic = continuous_batching"
"""The one comparison of tokens in which we have no part."""


def outcome(measured: Measured, step_bytes: int, *, absolute: bool) -> dict[str, Any]:
    """Everything that is said of one case; milliseconds only where they are worth something."""
    found: dict[str, Any] = {
        "ratios": {**ratios(measured), **roofline_shares(measured, step_bytes)},
        "equal_rows": equal_rows(measured),
        "rounds": len(measured.bandwidths),
        "failed": dict(measured.failed),
    }
    if absolute:
        medians = {name: statistics.median(steps_of(runs)) for name, runs in measured.runs.items()}
        found["step_milliseconds"] = {name: round(seconds * 1e3, 3) for name, seconds in medians.items()}
    return found


def show(case: Case, found: Mapping[str, Any]) -> None:
    """A block of lines for one case."""
    print(f"{case.shape}, batch {case.batch}, prompts of {case.prompt}, answers of {case.answer}, ", end="")
    print(f"{found['rounds']} rounds:")
    for name, value in found["ratios"].items():
        fastest = f"   of the fastest rounds {value['of_fastest']:.3f}" if "of_fastest" in value else ""
        cache = f" ({value['cache']} cache)" if "cache" in value else ""
        spread = f"[{value['quartile_1']:.3f}, {value['quartile_3']:.3f}]{fastest}"
        print(f"  {name + cache:<36} {value['median']:>7.3f}   {spread}")
    for name, share in found["equal_rows"].items():
        print(f"  {'same tokens, ' + name:<60} {share:.0%} of the rows")
    for name, milliseconds in found.get("step_milliseconds", {}).items():
        print(f"  {name:<36} {milliseconds:>9.3f} ms a step")
    for name, why in found["failed"].items():
        print(f"  {name} did not run: {why}")


def headline(plan: Plan, outcomes: Mapping[Case, Mapping[str, Any]]) -> dict[str, Any]:
    """The keys that a reader looks for first, of the headline's shape and its first prompt length; medians."""
    prompt = plan.of(plan.headline)[0].prompt
    cases = {
        case.batch: found for case, found in outcomes.items() if (case.shape, case.prompt) == (plan.headline, prompt)
    }
    result: dict[str, Any] = {"greedy_equal": greedy_equal(outcomes.values())}
    for name in BY_BATCH:
        values = {str(batch): median(found, name) for batch, found in cases.items()}
        result[name] = {batch: value for batch, value in values.items() if value is not None} or None
    smallest = cases[min(cases)]
    result["over_peft_mixed"] = next(
        (value for found in cases.values() if (value := median(found, "over_peft_mixed"))), None
    )
    result["merged_over_base"] = median(smallest, "merged_over_base")
    for name in ("roofline_share", "roofline_share_compiled"):
        result[name] = median(smallest, name)
    return result


def median(found: Mapping[str, Any], name: str) -> float | None:
    """Of one ratio of a case; None if it was not measured."""
    value = found["ratios"].get(name)
    return None if value is None else float(value["median"])


def greedy_equal(outcomes: Iterable[Mapping[str, Any]]) -> bool:
    """True if every row of ours has its oracle's tokens."""
    return all(
        share == 1.0 for found in outcomes for name, share in found["equal_rows"].items() if name != EQUAL_IN_FP32
    )


def nested(outcomes: Mapping[Case, Mapping[str, Any]]) -> dict[str, Any]:
    """By shape, prompt length and batch."""
    tree: dict[str, Any] = {}
    for case, found in outcomes.items():
        tree.setdefault(case.shape, {}).setdefault(f"prompt {case.prompt}", {})[f"batch {case.batch}"] = dict(found)
    return tree
