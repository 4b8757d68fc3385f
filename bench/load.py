"""Streams of requests to a server while its deployments are swapped, in a process of their own. Needs no torch.

    python -m bench.load ADDRESS

Reads one `Load` a line, as JSON; does it and writes one `Served`.
"""

import asyncio
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

from lorafold.client import AsyncClient, ServerError
from lorafold.v1 import deployment_pb2 as pb


@dataclass(frozen=True, kw_only=True, slots=True)
class Swaps:
    """Deployments that are pointed at other adapters meanwhile: an idle one each time, both drawn."""

    every: float
    """Seconds from the begin of one to that of the next; more where all deployments are being swapped."""
    deployments: list[str]
    adapters: list[str]
    """Folders, as the server sees them."""
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Greedy requests; each stream sends its next one as soon as the one before has ended."""

    prompts: list[list[int]]
    streams: list[list[tuple[str, int]]]
    """Of each: deployment, and index of the prompt, of one request after the other."""
    answer: int
    """Tokens of each answer."""
    seconds: float | None = None
    """When streams begin no more requests; those that are through begin anew. None: every request once."""
    swaps: Swaps | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What came of one request."""

    deployment: str
    prompt: int
    digest: str = ""
    """Of the adapter that answered."""
    mode: str = ""
    tokens: list[int] = field(default_factory=list)
    first: float | None = None
    """Seconds until the first token was there."""
    lost: str = ""
    """Why it has no proper end; empty if it has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What came of a load."""

    replies: list[Reply]
    tokens: int
    """That came in `seconds`."""
    seconds: float
    swaps: int
    """That were done."""

    @property
    def seconds_per_token(self) -> float:
        """Of all streams together."""
        return self.seconds / max(1, self.tokens)


def served_from(line: dict[str, Any]) -> Served:
    """What `python -m bench.load` wrote."""
    return Served(**{**line, "replies": [Reply(**reply) for reply in line["replies"]]})


class Tally:
    """Counts tokens until a time."""

    def __init__(self, seconds: float | None) -> None:
        self.start = time.perf_counter()
        self.until = None if seconds is None else self.start + seconds
        self.tokens = 0

    @property
    def over(self) -> bool:
        """True if nothing is to begin any more."""
        return self.until is not None and time.perf_counter() >= self.until

    def add(self, tokens: int) -> None:
        """So many came now."""
        if not self.over:
            self.tokens += tokens


async def run(client: AsyncClient, load: Load) -> Served:
    """Does it all."""
    tally = Tally(load.seconds)
    swapping = asyncio.create_task(swap(client, load.swaps, tally))
    streams = await asyncio.gather(*(stream(client, load, asked, tally) for asked in load.streams))
    seconds = time.perf_counter() - tally.start if load.seconds is None else load.seconds
    replies = [reply for of_stream in streams for reply in of_stream]
    return Served(replies=replies, tokens=tally.tokens, seconds=seconds, swaps=await swapping)


async def stream(client: AsyncClient, load: Load, asked: list[tuple[str, int]], tally: Tally) -> list[Reply]:
    """One request after the other."""
    requests: Iterator[tuple[str, int]] = iter(asked) if load.seconds is None else itertools.cycle(asked)
    replies: list[Reply] = []
    while not tally.over and (request := next(requests, None)):
        replies.append(await one(client, load, *request, tally))
    return replies


async def one(client: AsyncClient, load: Load, deployment: str, prompt: int, tally: Tally) -> Reply:
    """One request."""
    start, first, lost = time.perf_counter(), None, ""
    asked = client.stream(load.prompts[prompt], deployment=deployment, max_tokens=load.answer)
    answer, before = asked.answer, 0
    try:
        async for _ in asked.apieces():
            if first is None and answer.token_ids:
                first = time.perf_counter() - start
            tally.add(len(answer.token_ids) - before)
            before = len(answer.token_ids)
        if answer.finish_reason != "length" or before != load.answer:
            lost = f"{before} of {load.answer} tokens, finish reason {answer.finish_reason}"
    except ServerError as error:
        lost = f"{error.code}: {error}"
    return Reply(
        deployment=deployment,
        prompt=prompt,
        digest=answer.finished.answered_by.adapter_digest,
        mode=answer.mode,
        tokens=answer.token_ids,
        first=first,
        lost=lost,
    )


async def swap(client: AsyncClient, swaps: Swaps | None, tally: Tally) -> int:
    """Points deployments at other adapters until the time is over; how often. None is swapped twice at once."""
    if swaps is None:
        return 0
    numbers, done = random.Random(swaps.seed), 0
    listed = await client.stubs.deployments.ListDeployments(pb.ListDeploymentsRequest())
    adapters = {deployment.name: deployment.adapter_path for deployment in listed.deployments}
    under_way: dict[str, asyncio.Task[None]] = {}

    async def point(name: str) -> None:
        changed = pb.Deployment(name=name, adapter_path=adapters[name])
        await client.stubs.deployments.UpdateDeployment(pb.UpdateDeploymentRequest(deployment=changed))

    while not tally.over:
        due = time.perf_counter() + swaps.every
        if idle := [name for name in swaps.deployments if name not in under_way or under_way[name].done()]:
            name = numbers.choice(idle)
            adapters[name] = numbers.choice([folder for folder in swaps.adapters if folder != adapters[name]])
            under_way[name] = asyncio.create_task(point(name))
            done += 1
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    await asyncio.gather(*under_way.values())
    return done


async def serve(address: str) -> None:
    """Until the input ends."""
    async with AsyncClient(address) as client:
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            swaps = asked["swaps"] and Swaps(**asked["swaps"])
            served = await run(client, Load(**{**asked, "swaps": swaps}))
            print(json.dumps(asdict(served)), flush=True)


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
