"""`lorafold generate`: one prompt to a running server."""

import json
import sys

import click

from lorafold.cli.common import address_option, connected, json_option


@click.command()
@click.argument("prompt")
@click.option("-d", "--deployment", default="base", show_default=True, help="Who answers.")
@click.option("--max-tokens", type=click.IntRange(1, 2**31), help="At most this many tokens.")
@click.option("--temperature", type=float, help="0 is greedy, which is the default.")
@click.option("--top-k", type=click.IntRange(0, 2**31), help="Draw among this many most likely tokens.")
@click.option("--top-p", type=float, help="Draw among the most likely tokens that reach this probability.")
@click.option("--seed", type=click.IntRange(0, 2**63), help="Makes a draw repeatable.")
@click.option("--stop", multiple=True, help="End before this string. May be given more than once.")
@click.option("--chat", is_flag=True, help="Send PROMPT as a user's message through the model's chat template.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Give up after this many seconds.")
@json_option
@address_option
def generate(prompt: str, deployment: str, chat: bool, as_json: bool, address: str, **options: object) -> None:
    """Print the answer to PROMPT as it comes.

    A PROMPT of '-' is read from stdin.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    with connected(address) as client:
        stream = client.stream([("user", text)] if chat else text, deployment=deployment, **options)
        for piece in stream:
            if not as_json:
                click.echo(piece, nl=False)
    answer = stream.answer
    if not as_json:
        click.echo()
        return
    by = answer.finished.answered_by
    click.echo(
        json.dumps(
            {
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.started.prompt_tokens,
                "completion_tokens": answer.finished.completion_tokens,
                "seed": answer.started.seed,
                "deployment": by.deployment,
                "adapter_digest": by.adapter_digest,
                "mode": answer.mode,
                "generation": by.generation,
            }
        )
    )
