"""Mixed traffic against a running server: every deployment at once, some requests cancelled, one adapter swapped.

Knows no torch: what it sees is what any client sees.
"""

import asyncio
import random
from dataclasses import dataclass

from lorafold.client import Answer, AsyncClient
from lorafold.demo.tasks import held_out
from lorafold.v1 import deployment_pb2 as pb

CONCURRENCY = 16
MAX_TOKENS = 24
SWAP_EVERY = 14
"""Requests between two swaps of the live deployment."""
LIVE = "live"
"""The deployment that is swapped while its requests run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came back for one request."""

    deployment: str
    prompt: str
    text: str
    token_ids: list[int]
    adapter: str
    """Folder of the adapter that the server says answered; empty for the base."""
    mode: str
    """Empty if the request was cancelled."""
    cancelled: bool


class Traffic:
    """One seeded run."""

    def __init__(self, client: AsyncClient, deployments: list[str], swap_between: list[str], seed: int = 0) -> None:
        self._client = client
        self._deployments = deployments
        self._swap_between = swap_between
        self._rng = random.Random(seed)
        self._swapping = asyncio.Lock()
        self._folders: dict[str, str] = {"": ""}
        """Of each adapter that was deployed, by digest."""
        self._answers: list[tuple[str, str, Answer]] = []
        """Deployment, prompt, answer."""
        self.swaps = 0

    async def run(self, requests: int) -> None:
        """Sends `requests` requests, `CONCURRENCY` at a time, and waits for all of them."""
        listed = await self._client.stubs.deployments.ListDeployments(pb.ListDeploymentsRequest())
        self._folders |= {item.adapter_digest: item.adapter_path for item in listed.deployments}
        gate = asyncio.Semaphore(CONCURRENCY)
        async with asyncio.TaskGroup() as group:
            for number, prompt in enumerate(held_out(requests)):
                await gate.acquire()
                name = self._deployments[number % len(self._deployments)]
                task = group.create_task(self._one(name, prompt, cancel=self._rng.random() < 0.1))
                task.add_done_callback(lambda _: gate.release())
                if number % SWAP_EVERY == SWAP_EVERY - 1:
                    group.create_task(self._swap())

    async def _one(self, deployment: str, prompt: str, *, cancel: bool) -> None:
        stream = self._client.stream(prompt, deployment=deployment, max_tokens=MAX_TOKENS)
        pieces = 0
        async for _ in stream:
            pieces += 1
            if cancel and pieces == 4:
                stream.cancel()
                break
        self._answers.append((deployment, prompt, stream.answer))

    def outcomes(self) -> list[Outcome]:
        """Once all swaps are over: before, an answer may come of an adapter of which only the server knows."""
        return [self._outcome(*each) for each in self._answers]

    def _outcome(self, deployment: str, prompt: str, answer: Answer) -> Outcome:
        done = answer.finished.HasField("answered_by")
        return Outcome(
            deployment=deployment,
            prompt=prompt,
            text=answer.text,
            token_ids=answer.token_ids,
            adapter=self._folders[answer.started.answered_by.adapter_digest],
            mode=answer.mode if done else "",
            cancelled=not done,
        )

    async def _swap(self) -> None:
        """One at a time: the server refuses to change a deployment that is being changed."""
        async with self._swapping:
            path = self._swap_between[self.swaps % len(self._swap_between)]
            wanted = pb.UpdateDeploymentRequest(deployment=pb.Deployment(name=LIVE, adapter_path=path))
            swapped = await self._client.stubs.deployments.UpdateDeployment(wanted)
            self._folders[swapped.deployment.adapter_digest] = path
            self.swaps += 1
