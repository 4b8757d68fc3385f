"""The demo: a server as its own process, traffic through a real socket, every answer checked twice."""

import asyncio
import json
import signal
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from lorafold.cli.bench import line_of
from lorafold.client import AsyncClient
from lorafold.demo.tasks import TASKS
from lorafold.demo.traffic import LIVE, MAX_TOKENS, Outcome, Traffic
from lorafold.v1 import weights_pb2

POLICIES = {"upper": "merged", "rot13": "unmerged", "shift": "unmerged", "swapcase": "auto", "vowels": "merged"}
SWAPPED = ("rot13", "upper", "shift")
"""What the live deployment points at, in turn."""
START_TIMEOUT = 120.0
MEASURED = weights_pb2.MeasureOverheadRequest(batches=[1, 8], adapters=[1, 5], max_pairs=100)


@dataclass(frozen=True, kw_only=True, slots=True)
class Driven:
    """What came of the traffic."""

    outcomes: list[Outcome]
    swaps: int
    restored: bool
    """Whether the base was what was loaded."""
    overheads: list[weights_pb2.Overhead]
    """What the unmerged path was found to cost."""
    clean_exit: bool


def run_demo(folder: Path, requests: int) -> int:
    """Runs everything and prints what happened; the exit status."""
    start = time.perf_counter()
    folder = folder.absolute()
    driven = asyncio.run(drive(folder, requests))
    outcomes = driven.outcomes
    click.echo("checking every answer against transformers generate() with PEFT ...")
    wrong = check(outcomes, folder)
    result = {
        "requests": len(outcomes),
        "wrong": len(wrong),
        "deployments": sorted({outcome.deployment for outcome in outcomes}),
        "modes": sorted({outcome.mode for outcome in outcomes if outcome.mode}),
        "exact_match": exact_match(outcomes),
        "base_restored": driven.restored,
        "cancelled": sum(outcome.cancelled for outcome in outcomes),
        "swaps": driven.swaps,
        "unmerged_over_merged": {key_of(found): round(found.ratio, 3) for found in driven.overheads},
        "seconds": round(time.perf_counter() - start, 1),
    }
    for outcome in wrong[:5]:
        click.echo(f"WRONG: {outcome}")
    print_table(outcomes, wrong)
    click.echo("what a decode step takes on this machine:")
    for found in driven.overheads:
        click.echo(f"  {line_of(found)}")
    click.echo("less than 100 % right with no difference from PEFT is the small model's own mistake")
    click.echo(json.dumps(result))
    return 0 if not wrong and driven.restored and driven.clean_exit else 1


def key_of(found: weights_pb2.Overhead) -> str:
    """`b8_a5_r8`: rows, adapters, rank."""
    return f"b{found.cell.batch}_a{found.cell.adapters}_r{found.cell.rank}"


async def drive(folder: Path, requests: int) -> Driven:
    """Server and traffic, and afterwards what the unmerged path costs."""
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "lorafold.toml"
        config.write_text(server_config(folder))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "lorafold", "serve", str(config), stdout=asyncio.subprocess.PIPE
        )
        try:
            address = await asyncio.wait_for(listening(process), START_TIMEOUT)
            relay = asyncio.create_task(relay_output(process))
            async with AsyncClient(address) as client:
                names = ["base", *POLICIES, LIVE]
                click.echo(f"sending {requests} requests to {', '.join(names)}, swapping '{LIVE}' meanwhile ...")
                traffic = Traffic(client, names, [str(folder / name) for name in SWAPPED])
                await traffic.run(requests)
                verified = await client.stubs.weights.VerifyBase(weights_pb2.VerifyBaseRequest())
                click.echo("measuring what the unmerged path costs here ...")
                messages = client.stubs.weights.MeasureOverhead(MEASURED)
                overheads = [each.overhead async for each in messages if each.HasField("overhead")]
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            status = await process.wait()
        await relay
        return Driven(
            outcomes=traffic.outcomes(),
            swaps=traffic.swaps,
            restored=verified.restored,
            overheads=overheads,
            clean_exit=status == 0,
        )


def server_config(folder: Path) -> str:
    """The demo's lorafold.toml."""
    text = f'[base]\nmodel = "{folder / "base"}"\n\n'
    text += '[server]\naddress = "127.0.0.1:0"\nmetrics_address = "127.0.0.1:0"\n\n'
    text += '[log]\nlevel = "warning"\n\n'
    text += '[identity]\nunstamped = "refuse"\n\n'
    text += "[policy]\nmax_wait_seconds = 0.2\n"
    for name, policy in (*POLICIES.items(), (LIVE, "unmerged")):
        adapter = folder / (SWAPPED[-1] if name == LIVE else name)
        text += f'\n[[deployments]]\nname = "{name}"\nadapter = "{adapter}"\npolicy = "{policy}"\n'
    return text


async def listening(process: asyncio.subprocess.Process) -> str:
    """Shows what the server says until it says where it listens; that address."""
    assert process.stdout is not None
    while line := (await process.stdout.readline()).decode().rstrip():
        click.echo(f"server | {line}")
        if line.startswith("serving on "):
            return line.split()[2]
    raise click.ClickException("the server did not start; what it said is above")


async def relay_output(process: asyncio.subprocess.Process) -> None:
    """Shows the rest of what the server says."""
    assert process.stdout is not None
    async for line in process.stdout:
        click.echo(f"server | {line.decode().rstrip()}")


def check(outcomes: list[Outcome], folder: Path) -> list[Outcome]:
    """The outcomes that differ from PEFT: whole answers token for token, cancelled ones as far as they got."""
    from transformers.utils import logging as transformers_logging

    from lorafold.demo.reference import Reference

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # Libraries to each other; nothing to do with the demo.
    reference = Reference(folder / "base")
    wrong = []
    for outcome in outcomes:
        expected = list(reference.answer(outcome.prompt, outcome.adapter, MAX_TOKENS))
        got = outcome.token_ids
        if got != (expected[: len(got)] if outcome.cancelled else expected):
            wrong.append(outcome)
    return wrong


def exact_match(outcomes: list[Outcome]) -> dict[str, float]:
    """By deployment: the share of whole answers that are what the adapter's task asks for; the base copies."""
    right: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        if not outcome.cancelled:
            task = TASKS.get(Path(outcome.adapter).name)
            expected = task.rule(outcome.prompt) if task else outcome.prompt
            right[outcome.deployment].append(outcome.text == expected)
    return {name: round(sum(marks) / len(marks), 3) for name, marks in sorted(right.items())}


def print_table(outcomes: list[Outcome], wrong: list[Outcome]) -> None:
    """What happened, for people."""
    table = Table(
        "deployment", "what it does", "policy", "requests", "cancelled", "modes", "differs from PEFT", "right"
    )
    matches = exact_match(outcomes)
    for name in sorted({outcome.deployment for outcome in outcomes}):
        own = [outcome for outcome in outcomes if outcome.deployment == name]
        table.add_row(
            name,
            TASKS[name].says if name in TASKS else "copies" if name == "base" else "is swapped meanwhile",
            POLICIES.get(name, "unmerged" if name == LIVE else ""),
            str(len(own)),
            str(sum(outcome.cancelled for outcome in own)),
            ", ".join(sorted({outcome.mode for outcome in own if outcome.mode})),
            str(sum(outcome in wrong for outcome in own)),
            f"{matches.get(name, 0.0):.0%}",
        )
    Console(width=118).print(table)
