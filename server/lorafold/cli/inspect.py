"""`lorafold inspect`: what an adapter is, whether it would be served, and what serving it costs and loses."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorafold.cli.common import DTYPES, json_option
from lorafold.cli.inspect_table import show

if TYPE_CHECKING:
    from lorafold_adapters import AdapterManager
    from lorafold_adapters.fidelity import Fidelity
    from lorafold_adapters.inspection import Described, Placed

WORST = 5
"""Parameters that are listed unless all are asked for."""


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", metavar="MODEL", help="Look at it in this base: a folder or a hub name.")
@click.option("--dtype", type=DTYPES, default="auto", show_default=True, help="Of the base's weights.")
@click.option("--modules", is_flag=True, help="List the fidelity of every parameter, not of the worst.")
@click.option("--prompt", "prompts", multiple=True, help="Measure the folded distributions on this text. Repeatable.")
@json_option
def inspect(
    adapter: Path, base: str | None, dtype: str, modules: bool, prompts: tuple[str, ...], as_json: bool
) -> None:
    """Show what the folder ADAPTER holds, and with --base what a server would make of it.

    Reads the base on the CPU. Exit status 1, after everything that can be known, if a server would refuse the adapter.
    """
    from transformers.utils import logging as transformers_logging

    from lorafold_adapters.errors import LorafoldError
    from lorafold_adapters.inspection import describe

    if base is None and (prompts or modules):
        raise click.UsageError("--prompt and --modules need a base: give --base MODEL")
    transformers_logging.disable_progress_bar()
    try:
        described = describe(adapter)
        facts, refusals = folder_facts(adapter, described), list(described.refusals)
        if base is not None and described.checkpoint is not None:
            refusals += base_facts(facts, described, base, dtype, modules, prompts)
    except (LorafoldError, OSError) as error:
        raise click.ClickException(str(error)) from error
    facts["refusals"] = list(dict.fromkeys(refusals))
    if as_json:
        click.echo(json.dumps(finite(facts)))
    else:
        show(facts)
    if refusals:
        raise click.ClickException(refusals[0])


def folder_facts(adapter: Path, described: "Described") -> dict[str, Any]:
    """What the folder alone says."""
    options, checkpoint, stamp = described.options, described.checkpoint, described.stamp
    targets = options.get("target_modules")
    return {
        "adapter": str(adapter),
        "method": str(options.get("peft_type")),
        "kind": checkpoint.kind if checkpoint and "peft_type" in options else str(options.get("peft_type")),
        "ranks": {str(rank): count for rank, count in sorted(described.ranks.items())},
        "scales": [
            {"pattern": scale.pattern, "rank": scale.rank, "alpha": scale.alpha, "scale": scale.scale}
            for scale in described.scales
        ],
        "targets": sorted(map(str, targets)) if isinstance(targets, list) else targets,
        "tensors": described.tensors,
        "bytes": described.nbytes,
        "dtypes": list(described.dtypes),
        "digest": checkpoint.digest if checkpoint else None,
        "stamp": stamp and {"base": stamp.base, "name": stamp.name, "dtype": stamp.dtype},
    }


def base_facts(
    facts: dict[str, Any], described: "Described", base: str, dtype: str, modules: bool, prompts: tuple[str, ...]
) -> list[str]:
    """Adds what the adapter is in a base; returns why a server with that base would refuse it."""
    from lorafold.model import load_weights
    from lorafold_adapters import AdapterManager
    from lorafold_adapters.errors import AdapterError
    from lorafold_adapters.inspection import place, stamped

    assert described.checkpoint is not None
    model = load_weights(base, dtype)
    manager = AdapterManager(model)
    facts["base"] = {"name": base, "fingerprint": manager.base.digest, "dtype": manager.base.dtype}
    refusal, found = stamped(manager, described.checkpoint)
    facts["match"] = found
    refusals = [refusal] if refusal else []
    if described.refusals:
        return refusals
    try:
        placed = place(manager, described.checkpoint)
    except AdapterError as error:
        return [*refusals, str(error)]
    facts.update(placed_facts(placed, modules))
    if prompts:
        facts["kl"] = divergence_over(manager, placed, base, prompts)
    if placed.fold_refusal and placed.route_refusal:
        refusals.append(placed.fold_refusal)
    return refusals


def placed_facts(placed: "Placed", modules: bool) -> dict[str, Any]:
    """What `inspection.place` found, for JSON."""
    cost, fidelity = placed.cost, placed.fidelity
    return {
        "bound": {"bound": placed.bound.bound, "targeted": placed.bound.targeted},
        "modules": [
            {"rank": rank, "scale": scale, "modules": count} for (rank, scale), count in sorted(placed.scales.items())
        ],
        "modes": {"merged": placed.fold_refusal or "yes", "unmerged": placed.route_refusal or "yes"},
        "fidelity": fidelity and fidelity_facts(fidelity),
        "parameters": fidelity and parameter_facts(fidelity, modules),
        "two_path": cost and {"flops_per_token": cost.flops, "bytes_per_token": cost.nbytes},
        "base_cost": {"flops_per_token": placed.base_cost.flops, "bytes_per_token": placed.base_cost.nbytes},
    }


def parameter_facts(fidelity: "Fidelity", everything: bool) -> list[dict[str, Any]]:
    """The fidelity of single parameters, those that lose most first."""
    single = sorted(fidelity.by_parameter().items(), key=lambda item: -item[1].delta_error)
    return [{"name": name, **fidelity_facts(alone)} for name, alone in (single if everything else single[:WORST])]


def fidelity_facts(fidelity: "Fidelity") -> dict[str, float]:
    """The three numbers."""
    from lorafold_adapters.provenance import fidelity_facts

    return fidelity_facts(fidelity)


def divergence_over(
    manager: "AdapterManager", placed: "Placed", base: str, prompts: tuple[str, ...]
) -> dict[str, Any] | None:
    """KL(two-path || folded) over the prompts, the mean of all positions; None if the adapter has only one form."""
    from transformers import AutoTokenizer

    from lorafold.model import translated
    from lorafold_adapters import AdapterManager
    from lorafold_adapters.fidelity import kl_divergence

    if placed.route_refusal or placed.fidelity is None:
        return None
    with translated(base):
        tokenizer = AutoTokenizer.from_pretrained(base)
    # Also where so much is lost that nobody should fold it: that is when the number is asked for.
    anyway = AdapterManager(manager.model, fingerprint=manager.base, max_delta_error=math.inf)
    anyway.load("it", placed.bound)
    total, positions = 0.0, 0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        if ids.numel() == 0:
            raise click.UsageError("a --prompt has no tokens: give some text")
        total += kl_divergence(anyway, "it", ids) * ids.numel()
        positions += ids.numel()
    return {"nats": total / positions, "positions": positions}


def finite(value: Any) -> Any:
    """The same without numbers that JSON has no words for: null in place of them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
