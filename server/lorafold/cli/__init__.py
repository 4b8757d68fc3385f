"""The `lorafold` command. Heavy imports happen in the commands, after their arguments are known to be right."""

import logging
import sys

import click

from lorafold.cli.advise import advise
from lorafold.cli.bench import bench
from lorafold.cli.completion import completion
from lorafold.cli.demo import demo
from lorafold.cli.deployments import deployments
from lorafold.cli.export import export
from lorafold.cli.generate import generate
from lorafold.cli.inspect import inspect
from lorafold.cli.serve import serve
from lorafold.cli.stamp import stamp
from lorafold.cli.status import status
from lorafold.cli.weights import weights


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="lorafold")
def cli() -> None:
    """Serves LoRA adapters: folded into the weights, or beside them, on one base model."""


for command in (serve, generate, deployments, weights, status, bench, advise, inspect, stamp, export, demo, completion):
    cli.add_command(command)


def main() -> None:
    """Runs the command line; whatever the user did wrong becomes one sentence on stderr."""
    # On some CPUs it says at import, to people who serve nothing quantised, that a kernel of its hub is not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = cli.main(prog_name="lorafold", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"lorafold: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
