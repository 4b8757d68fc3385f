"""Days on which much goes wrong at once. Through the socket; afterwards the base verifies and others were untouched."""

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafold.client import AsyncClient, ServerError
from lorafold.demo.reference import Reference
from lorafold.engine.loop import Engine
from lorafold.v1 import deployment_pb2 as pb
from lorafold.v1 import weights_pb2
from lorafold_adapters.router import Router
from lorafold_adapters.staging import Stager
from lorafold_adapters.stamp import STAMP_FILE
from tests.conftest import DEMO, RunningServer, demo_config, serving, wait_until_idle
from tests.deployments import create, update

MANY = 10_000


@pytest.fixture
def own() -> Iterator[RunningServer]:
    with serving(demo_config()) as running:
        yield running
        wait_until_idle(running)
        assert running.client.stubs.weights.VerifyBase(weights_pb2.VerifyBaseRequest()).restored


@pytest.mark.timeout(400)
def test_ten_thousand_requests_at_once_are_answered_or_refused_and_nobody_is_disturbed(
    own: RunningServer, reference: Reference
) -> None:
    names = ["upper", "rot13", "shift", "swapcase", "vowels"]
    prompt = "Much at once"
    expected = {name: reference.answer(prompt, str(DEMO / name), 4) for name in names}

    async def ask(client: AsyncClient, number: int) -> str:
        name = names[number % len(names)]
        try:
            answer = await client.generate(prompt, deployment=name, max_tokens=4)
        except ServerError as error:
            return error.reason or f"{error.code} {error}"
        return "right" if tuple(answer.token_ids) == expected[name] else "wrong"

    async def ask_all() -> Counter[str]:
        async with AsyncClient(own.address) as client:
            return Counter(await asyncio.gather(*(ask(client, number) for number in range(MANY))))

    alone = own.client.generate("Runs all the time", deployment="rot13", max_tokens=300, ignore_eos=True).token_ids
    with ThreadPoolExecutor(1) as pool:
        beside = own.client.stream("Runs all the time", deployment="rot13", max_tokens=300, ignore_eos=True)
        next(iter(beside))
        ended = pool.submit(list, beside)
        outcomes = asyncio.run(ask_all())
        ended.result(300)
    assert beside.answer.token_ids == alone
    assert outcomes["right"] >= 1024
    assert outcomes.total() == MANY
    assert set(outcomes) <= {"right", "QUEUE_FULL"}


def test_a_clock_that_jumps_changes_no_answer(own: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.monotonic
    shift = [0.0]
    monkeypatch.setattr(Engine, "now", staticmethod(lambda: real() + shift[0]))
    with ThreadPoolExecutor(8) as pool:
        answers = [
            pool.submit(own.client.generate, f"jump {number}", deployment=("upper", "vowels", "swapcase")[number % 3])
            for number in range(30)
        ]
        for jump in (3600.0, -3600.0, 86400.0, 0.0):
            shift[0] = jump
            own.client.generate("abc", deployment="rot13")
        texts = [answer.result(60).text for answer in answers]
    assert texts[0::3] == [f"JUMP {number}" for number in range(0, 30, 3)]


@pytest.mark.parametrize("where", ["stage", "load"])
def test_an_adapter_that_finds_no_memory_on_the_device_is_refused_and_changes_nothing(
    where: str, own: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Reference
) -> None:
    """Out of memory while it is copied beside the engine's steps, or while the rest is done between two of them."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("injected")

    client, prompt = own.client, "not to be disturbed"
    expected = reference.answer(prompt, str(DEMO / "rot13"), 24)
    before = client.stubs.deployments.ListDeployments(pb.ListDeploymentsRequest())
    swapped = Path(shutil.copytree(DEMO / "upper", tmp_path / "swapped"))
    rescale(swapped)
    with ThreadPoolExecutor(4) as pool, monkeypatch.context() as patch:
        running = [pool.submit(client.generate, prompt, deployment="rot13", max_tokens=24) for _ in range(8)]
        patch.setattr(*{"stage": (Stager, "stage"), "load": (Router, "add")}[where], full)
        attempts: tuple[Callable[[], object], ...] = (
            lambda: create(client, "one-more", swapped),
            lambda: update(client, "upper", adapter_path=str(swapped)),
        )
        for attempt in attempts:
            with pytest.raises(ServerError, match="drop others first") as caught:
                attempt()
            assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "DEVICE_FULL")
        assert {tuple(answer.result(60).token_ids) for answer in running} == {expected}
    assert client.stubs.deployments.ListDeployments(pb.ListDeploymentsRequest()) == before
    assert client.generate("still", deployment="upper").text == "STILL"
    update(client, "upper", adapter_path=str(swapped))  # Negative control: with memory it goes.


def rescale(adapter: Path) -> None:
    """Makes it another adapter, without a stamp and with the same answers."""
    (adapter / STAMP_FILE).unlink()
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        tensors[name] = tensors[name] * (2.0 if "lora_A" in name else 0.5)
    save_file(tensors, adapter / "adapter_model.safetensors")
