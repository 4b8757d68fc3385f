"""Clients of a server, in a process of their own, so that what they cost is theirs. Needs no torch.

    python -m bench.clients ADDRESS

Reads one JSON object a line, {"prompts": [[..], ..], "answer": ..}; sends all prompts at once, one stream each, and
writes {"tokens": [[..], ..], "seconds": ..}: from before the first request until the last stream has ended.
"""

import asyncio
import json
import sys
import time

import uvloop

from lorafold.client import AsyncClient


async def serve(address: str) -> None:
    """Until the input ends."""
    async with AsyncClient(address) as client:
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            start = time.perf_counter()
            streams = [one(client, prompt, asked["answer"]) for prompt in asked["prompts"]]
            tokens = await asyncio.gather(*streams)
            print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - start}), flush=True)


async def one(client: AsyncClient, prompt: list[int], answer: int) -> list[int]:
    """The tokens of one stream."""
    stream = client.stream(prompt, max_tokens=answer)
    async for _ in stream:
        pass
    return stream.answer.token_ids


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
