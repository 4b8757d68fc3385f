"""A whole server in this process, and clients of it in another: what gRPC and streaming cost on top of the engine."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvloop
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from bench.engines import answer
from bench.models import saved
from bench.rounds import measure
from bench.work import Work
from lorafold.app import App, start_app
from lorafold.config import Config, parse_config
from lorafold_adapters.policy import PolicyKind

START_SECONDS = 300.0


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word per token, so that every id has a text."""
    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def server_config(folder: Path, device: torch.device, **tables: Any) -> Config:
    """A server on the model in `folder`, with these tables in its file; it remembers nothing."""
    return parse_config({**server_tables(folder, device), **tables}, folder / "lorafold.toml")


def server_tables(folder: Path, device: torch.device) -> dict[str, Any]:
    """What every file of a server that is measured has."""
    return {
        "base": {"model": str(folder), "device": str(device)},
        "server": {"address": "127.0.0.1:0", "metrics_address": "127.0.0.1:0", "state_file": ""},
        "identity": {"cache": str(folder / "fingerprints"), "unstamped": "allow"},
    }


def room_for(work: Work) -> dict[str, int]:
    """`[engine]` for exactly this work."""
    return {
        "max_batch": work.rows,
        "max_context": work.context,
        "prefill_tokens": work.rows * len(work.prompts[0]),
    }


@contextmanager
def running(config: Config) -> Iterator[App]:
    """The server, on an event loop in a thread of its own, as `lorafold serve` runs it."""
    started: Future[tuple[App, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def live() -> None:
        try:
            app = await start_app(config)
        except BaseException as error:
            started.set_exception(error)
            return
        over = asyncio.Event()
        started.set_result((app, asyncio.get_running_loop(), over))
        await over.wait()
        await app.stop(0)

    thread = threading.Thread(target=lambda: uvloop.run(live()), name="bench-server")
    thread.start()
    app, loop, over = started.result(START_SECONDS)
    try:
        yield app
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


@contextmanager
def clients(address: str, module: str = "bench.clients") -> Iterator["subprocess.Popen[str]"]:
    """The process of `bench.clients`, or of another program that reads and writes lines."""
    command = [sys.executable, "-m", module, address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()


def ask(process: "subprocess.Popen[str]", asked: dict[str, Any]) -> dict[str, Any]:
    """What the clients got. Raises RuntimeError if they ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the clients ended; what they said is above")
    said: dict[str, Any] = json.loads(line)
    return said


def write_base(model: LlamaForCausalLM, folder: Path) -> None:
    """What a server needs of a base."""
    saved(model, folder)
    tokenizer_of(model.config.vocab_size).save_pretrained(str(folder))


def compare(folder: Path, device: torch.device, work: Work, rounds: int) -> tuple[dict[str, list[float]], bool]:
    """Seconds of the same work through gRPC and on the same engine, alternating; whether all tokens were the same.

    `folder` has a base, which the server puts on `device`.
    """
    answers = set()
    config = server_config(folder, device, engine=room_for(work))
    with running(config) as app, clients(app.address) as process:

        def through_grpc(_: int) -> float:
            said = ask(process, {"prompts": work.prompts, "answer": work.answer})
            answers.add(tuple(tuple(row) for row in said["tokens"]))
            return float(said["seconds"])

        def in_process(_: int) -> float:
            run = answer(app.parts.engine, work, [], PolicyKind.UNMERGED)
            answers.add(run.tokens)
            return run.seconds

        seconds = measure({"grpc": through_grpc, "engine": in_process}, rounds)
    return seconds, len(answers) == 1
