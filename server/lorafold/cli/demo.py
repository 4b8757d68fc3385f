"""`lorafold demo`: a server and a client on a small model whose adapters do checkable things."""

from pathlib import Path

import click


@click.command()
@click.option("--make", type=click.Path(path_type=Path), metavar="DIR", help="Only train the demo set anew, into DIR.")
@click.option("--seed", default=0, show_default=True, help="Of the training run.")
@click.option("--requests", default=280, show_default=True, type=click.IntRange(min=1), help="How many to send.")
@click.option(
    "--set", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Use the demo set in DIR."
)
def demo(make: Path | None, seed: int, requests: int, folder: Path | None) -> int:
    """Serve the demo set and check every answer.

    Sends mixed traffic to a server of its own, swaps adapters and cancels requests meanwhile. Prints a table and, as
    its last line, one JSON object; the exit status is 0 only if every answer was right and the base was given back
    bit for bit.
    """
    if make is not None:
        from lorafold.demo.make import make_demo_set

        make_demo_set(make, seed=seed)
        click.echo(f"made {make}")
        return 0
    from lorafold.demo.run import run_demo

    return run_demo(folder or shipped_set(), requests)


def shipped_set() -> Path:
    """The demo set that comes with the package."""
    import lorafold.demo

    return Path(lorafold.demo.__file__).parent / "set"
