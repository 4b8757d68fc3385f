"""`lorafold generate`: one prompt to a running server."""

import json
import sys
from typing import TYPE_CHECKING

import click

from lorafold.cli.common import address_option, connected, json_option

if TYPE_CHECKING:
    from lorafold.client import Answer


@click.command()
@click.argument("prompt")
@click.option("-d", "--deployment", default="base", show_default=True, help="Who answers.")
@click.option("--max-tokens", type=click.IntRange(1, 2**31), help="At most this many tokens.")
@click.option("--temperature", type=float, help="0 is greedy, which is the default.")
@click.option("--top-k", type=click.IntRange(0, 2**31), help="Draw among this many most likely tokens.")
@click.option("--top-p", type=float, help="Draw among the likeliest up to this share.")
@click.option("--min-p", type=float, help="Draw among those as likely, over the likeliest.")
@click.option("--repetition-penalty", type=float, help="Divides logits of tokens seen so far.")
@click.option("--presence-penalty", type=float, help="Lowers logits of the answer's tokens.")
@click.option("--frequency-penalty", type=float, help="The same, each time a token occurs.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Makes a draw repeatable.")
@click.option("-n", "--completions", "n", metavar="N", type=click.IntRange(1, 16), help="So many answers.")
@click.option("--stop", multiple=True, help="End before this string; may be repeated.")
@click.option("--stop-token-id", "stop_token_ids", type=int, multiple=True, help="The same, for a token.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end of the sequence.")
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
    if not as_json:
        click.echo()
    for answer in stream.answer.others if not as_json else [stream.answer, *stream.answer.others]:
        click.echo(json.dumps(described(answer)) if as_json else answer.text)


def described(answer: "Answer") -> dict[str, object]:
    """One completion, for a line of JSON."""
    by = answer.finished.answered_by
    return {
        "index": answer.index,
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
