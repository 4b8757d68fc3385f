"""`lorafold serve`: runs a server until it is told to stop."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lorafold.app import App
    from lorafold.config import Config


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), default="lorafold.toml")
@click.option("--address", help="gRPC address, instead of the file's.")
@click.option("--metrics-address", help="Prometheus address, instead of the file's.")
@click.option("--device", help="cpu, cuda, cuda:1 ..., instead of the file's.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Format of the log on stderr.")
def serve(
    file: Path, address: str | None, metrics_address: str | None, device: str | None, log_format: str | None
) -> None:
    """Serve a base model and its deployments.

    FILE says which; it is lorafold.toml unless given.

    \b
    A file needs [base] with a model; deployments can also be made later:
        [base]
        model = "path/or/hub-name"        # any transformers decoder
        [[deployments]]
        name = "sql"                      # what clients call
        adapter = "adapters/sql"          # a PEFT folder
        policy = "auto"                   # merged, unmerged or auto

    Ctrl-C or SIGTERM: requests in flight finish first; a second one ends at once.
    SIGHUP: FILE is read again, and changed deployments and [log] level are put in force.
    """
    start = time.perf_counter()
    early: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _: early.append(number))  # Else it would end a server that starts.
    from lorafold.config import load_config
    from lorafold.logs import set_up_logging
    from lorafold_adapters.errors import LorafoldError

    def read() -> "Config":
        return with_overrides(load_config(file), address, metrics_address, device, log_format)

    try:
        config = read()
        set_up_logging(config.log)
        failure = run(config, read, start, early)
    except LorafoldError as error:
        raise click.ClickException(str(error)) from error
    if failure is not None:
        raise click.ClickException(f"the engine died: {failure!r}; the log says more")


def with_overrides(
    config: "Config", address: str | None, metrics_address: str | None, device: str | None, log_format: str | None
) -> "Config":
    """The file's settings with the command line's over them. Raises ConfigError."""
    from lorafold.config import parse_config

    content = config.model_dump(exclude={"folder", "stem"}, mode="python")
    for section, key, value in (
        ("server", "address", address),
        ("server", "metrics_address", metrics_address),
        ("base", "device", device),
        ("log", "format", log_format),
    ):
        if value is not None:
            content[section][key] = value
    changed = parse_config(content, config.folder / "the command line")
    return changed.model_copy(update={"stem": config.stem})


def run(config: "Config", read: "Callable[[], Config]", start: float, early: Sequence[int]) -> BaseException | None:
    """Serves until a signal or the engine's death; returns what killed the engine, if something did.

    `read` reads the configuration again; `start`: since when people wait; `early`: each SIGHUP that came before there
    is an event loop. Raises LorafoldError.
    """
    import uvloop
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve_until_told(config, read, start, early))


async def serve_until_told(
    config: "Config", read: "Callable[[], Config]", start: float, early: Sequence[int]
) -> BaseException | None:
    """The life of a server."""
    from lorafold.app import start_app
    from lorafold.reloading import Reloader

    hung_up, told = asyncio.Event(), asyncio.Event()
    tell(hung_up, signal.SIGHUP)
    if early:
        hung_up.set()
    say(f"loaded the libraries in {time.perf_counter() - start:.1f} s")
    app = await start_app(config, say)
    tell(told, signal.SIGINT, signal.SIGTERM)
    say(f"serving on {app.address} after {time.perf_counter() - start:.1f} s")
    say(f"metrics at http://{app.metrics_address}/metrics")
    reloading = asyncio.create_task(Reloader(app.parts.deployments, config, read).run(hung_up))
    death = asyncio.create_task(app.wait_for_death())
    signalled = asyncio.create_task(told.wait())
    await asyncio.wait({death, signalled}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if death.done():
        await app.stop(0)
        reloading.cancel()
        return death.result()
    await stop(app, told)
    reloading.cancel()
    say("stopped")
    return None


def tell(event: asyncio.Event, *numbers: int) -> None:
    """Has an event set by signals."""
    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, event.set)


async def stop(app: "App", told: asyncio.Event) -> None:
    """Lets requests in flight finish, unless a second signal comes."""
    say("stopping: requests in flight finish first; a second signal ends at once")
    told.clear()
    stopping = asyncio.create_task(app.stop())
    again = asyncio.create_task(told.wait())
    await asyncio.wait({stopping, again}, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not stopping.done():
        await app.stop(0)
    await stopping


def say(text: str) -> None:
    """For people. Nobody may read it any more (`lorafold serve | head -1`), which is no reason to end."""
    try:
        click.echo(text)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
