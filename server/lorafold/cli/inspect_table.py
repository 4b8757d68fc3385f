"""The facts of `lorafold inspect` as lines for people."""

from typing import Any

import click


def show(facts: dict[str, Any]) -> None:
    """Prints the facts for people."""
    for key, line in lines(facts):
        click.echo(f"{key:<10} {line}")


def lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The table."""
    stamp, targets = facts["stamp"], facts["targets"]
    rows = [("adapter", facts["adapter"]), ("kind", facts["kind"])]
    rows += [("rank", f"{rank}, {count} modules") for rank, count in facts["ranks"].items()]
    for scale in facts["scales"]:
        where = f"{scale['pattern']}: " if scale["pattern"] else ""
        rows.append(("scale", f"{where}{scale['scale']:.4g} (rank {scale['rank']}, alpha {scale['alpha']:g})"))
    rows.append(("targets", ", ".join(targets) if isinstance(targets, list) else str(targets)))
    rows.append(("tensors", f"{facts['tensors']}, {facts['bytes']:,} bytes, {', '.join(facts['dtypes'])}"))
    rows.append(("digest", facts["digest"] or "unknown"))
    rows.append(("stamp", f"base {stamp['base'][:12]}… ({stamp['name']}, {stamp['dtype']})" if stamp else "none"))
    return rows + (base_lines(facts) if "base" in facts else [])


def base_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What needs a base."""
    base = facts["base"]
    rows = [("base", f"{base['fingerprint'][:12]} ({base['name']}, {base['dtype']})"), ("match", facts["match"])]
    if "bound" not in facts:
        return rows
    rows.append(("bound", f"{facts['bound']['bound']} of {facts['bound']['targeted']} modules"))
    rows += [
        ("", f"{row['modules']} of rank {row['rank']}, scale {row['scale']:.4g}")
        for row in (facts["modules"] if len(facts["modules"]) > 1 else [])
    ]
    rows += [(mode, verdict) for mode, verdict in facts["modes"].items()]
    if facts["fidelity"]:
        rows.append(("fidelity", fidelity_line(facts["fidelity"])))
        rows += [("", f"{row['name']}: {fidelity_line(row)}") for row in facts["parameters"]]
    costs = {"two-path": facts["two_path"], "base": facts["base_cost"]}
    for name, cost in costs.items():
        if cost:
            rows.append((name, f"{cost['flops_per_token']:,} flops and {cost['bytes_per_token']:,} bytes a token"))
    if kl := facts.get("kl"):
        rows.append(("KL", f"{kl['nats']:.3g} nats, two-path against folded, mean of {kl['positions']} positions"))
    return rows


def fidelity_line(numbers: dict[str, float]) -> str:
    """The three numbers, for people."""
    return (
        f"rms(delta)/rms(W) {numbers['delta_over_weight']:.3g}, delta error {numbers['delta_error']:.3g}, "
        f"unchanged {numbers['unchanged_share']:.1%}"
    )
