"""Deployments and weights through a real socket: create, swap, delete, bad adapters, folding by hand."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafold.client import Client, ServerError
from lorafold.demo.reference import Reference
from lorafold.v1 import deployment_pb2 as pb
from lorafold_adapters.stamp import STAMP_FILE
from tests.conftest import DEMO, RunningServer, demo_config, serving
from tests.deployments import create, delete, update
from tests.models import KINDS, save_adapter

MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="module")
def own() -> Iterator[RunningServer]:
    """A server of this file's own: its tests change deployments."""
    with serving(demo_config()) as running:
        yield running


def names(client: Client) -> list[str]:
    return [item.name for item in client.stubs.deployments.ListDeployments(pb.ListDeploymentsRequest()).deployments]


def test_a_deployment_is_callable_from_create_to_delete(own: RunningServer) -> None:
    client = own.client
    made = create(client, "fresh", DEMO / "shift")
    assert made.adapter_digest
    assert (made.bound_modules, made.adapter_modules, made.adapter_kind) == (28, 28, "LORA+dora")
    assert made.base_match == pb.BASE_MATCH_SAME
    got = client.stubs.deployments.GetDeployment(pb.GetDeploymentRequest(name="fresh")).deployment
    assert got == made
    assert "fresh" in names(client)
    assert client.generate("abcdef", deployment="fresh").text == "bcdefg"
    delete(client, "fresh")
    assert "fresh" not in names(client)
    with pytest.raises(ServerError, match="no deployment"):
        client.generate("abc", deployment="fresh")


def test_listing_goes_page_by_page(own: RunningServer) -> None:
    seen, token, pages = [], "", 0
    while True:
        request = pb.ListDeploymentsRequest(page_size=2, page_token=token)
        page = own.client.stubs.deployments.ListDeployments(request)
        seen += [item.name for item in page.deployments]
        token, pages = page.next_page_token, pages + 1
        if not token:
            break
    assert seen == sorted(seen) == names(own.client)
    assert pages == (len(seen) + 1) // 2 > 1


def test_a_swap_under_load_finishes_each_request_on_what_it_started_with(
    own: RunningServer, reference: Reference
) -> None:
    client = own.client
    made = create(client, "swapped", DEMO / "rot13")
    digests = {made.adapter_digest: "rot13"}
    prompt = "Swap me in flight"

    def ask(_: int) -> tuple[str, tuple[int, ...]]:
        stream = client.stream(prompt, deployment="swapped", max_tokens=24)
        list(stream)
        answer = stream.answer
        assert answer.started.answered_by.adapter_digest == answer.finished.answered_by.adapter_digest
        return answer.finished.answered_by.adapter_digest, tuple(answer.token_ids)

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(ask, index) for index in range(60)]
        for number in range(8):
            target = ("shift", "upper", "rot13")[number % 3]
            policy = (pb.POLICY_UNMERGED, pb.POLICY_MERGED)[number % 2]
            swapped = update(client, "swapped", adapter_path=str(DEMO / target), policy=policy)
            digests[swapped.adapter_digest] = target
        for answer in answers:
            digest, tokens = answer.result()
            assert tokens == reference.answer(prompt, str(DEMO / digests[digest]), 24)
    assert len(digests) == 3
    delete(client, "swapped")


def test_a_removed_adapter_leaves_the_device_once_its_last_request_has_ended(
    own: RunningServer, tmp_path: Path
) -> None:
    engine, client = own.app.parts.engine, own.client
    loaded = lambda: set(own.app.parts.manager.adapters)  # noqa: E731
    before = engine.call(loaded).result(10)
    made = create(client, "once", unlike(DEMO / "upper", tmp_path))
    stream = iter(client.stream("abcdefghijkl", deployment="once", max_tokens=24))
    first = next(stream)
    delete(client, "once")
    assert first + "".join(stream) == "ABCDEFGHIJKL"
    client.generate("a")  # One more turn of the loop.
    after = engine.call(loaded).result(10)
    assert made.adapter_digest not in after
    assert after == before


def unlike(adapter: Path, folder: Path) -> Path:
    """A copy of an adapter with another digest and the same behaviour."""
    copy = Path(shutil.copytree(adapter, folder / "unlike"))
    file = copy / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "revision": "another"}))
    (copy / STAMP_FILE).unlink()  # It is for the adapter that was copied.
    return copy


def test_an_etag_guards_against_lost_updates(own: RunningServer) -> None:
    made = create(own.client, "tagged", DEMO / "upper")
    changed = update(own.client, "tagged", made.etag, policy=pb.POLICY_MERGED)
    assert changed.etag != made.etag
    with pytest.raises(ServerError, match="was changed since") as caught:
        update(own.client, "tagged", made.etag, policy=pb.POLICY_AUTO)
    assert (caught.value.code, caught.value.reason) == ("ABORTED", "ETAG_MISMATCH")
    with pytest.raises(ServerError, match="was changed since"):
        delete(own.client, "tagged", made.etag)
    delete(own.client, "tagged", changed.etag)


def spoil_config(**options: Any) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **options}))

    return spoil


def truncate(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def pickle(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")


def put_nan(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")


def wrong_shape(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)
    save_file(tensors, adapter / "adapter_model.safetensors")


BAD_ADAPTERS: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "missing": (lambda adapter: shutil.rmtree(adapter), "NOT_FOUND", "ADAPTER_NOT_FOUND", "no adapter folder"),
    "truncated": (truncate, "INVALID_ARGUMENT", "ADAPTER_CORRUPT", "truncated or damaged"),
    "pickled": (pickle, "FAILED_PRECONDITION", "ADAPTER_UNSUPPORTED", "safe_serialization=True"),
    "wrong shapes": (wrong_shape, "FAILED_PRECONDITION", "BASE_MISMATCH", "this base needs [8, 256]"),
    "with NaN": (put_nan, "INVALID_ARGUMENT", "ADAPTER_CORRUPT", "NaN or infinite"),
    "unknown option": (spoil_config(warp=9), "FAILED_PRECONDITION", "ADAPTER_UNSUPPORTED", "'warp'"),
    "other kind": (spoil_config(peft_type="VERA"), "FAILED_PRECONDITION", "ADAPTER_UNSUPPORTED", "'VERA'"),
    "other architecture": (
        spoil_config(target_modules=["c_attn"]),
        "FAILED_PRECONDITION",
        "BASE_MISMATCH",
        "does not fit this base",
    ),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused_and_changes_nothing(
    name: str, own: RunningServer, tmp_path: Path, reference: Reference
) -> None:
    spoil, code, reason, words = BAD_ADAPTERS[name]
    client = own.client
    adapter = Path(shutil.copytree(DEMO / "upper", tmp_path / "adapter"))
    spoil(adapter)
    before = client.stubs.deployments.ListDeployments(pb.ListDeploymentsRequest())
    prompt = "not to be disturbed"
    expected = reference.answer(prompt, str(DEMO / "rot13"), 24)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(client.generate, prompt, deployment="rot13", max_tokens=24) for _ in range(8)]
        attempts: tuple[Callable[[], object], ...] = (
            lambda: create(client, "bad", adapter),
            lambda: update(client, "upper", adapter_path=str(adapter)),
        )
        for attempt in attempts:
            with pytest.raises(ServerError) as caught:
                attempt()
            assert (caught.value.code, caught.value.reason) == (code, reason)
            assert words in str(caught.value)
            assert "Traceback" not in str(caught.value)
        assert {tuple(answer.result().token_ids) for answer in running} == {expected}
    assert client.stubs.deployments.ListDeployments(pb.ListDeploymentsRequest()) == before
    assert client.generate("still", deployment="upper").text == "STILL"


def test_an_adapter_of_another_model_is_refused(own: RunningServer, adapter_on_llama: MakeAdapter) -> None:
    with pytest.raises(ServerError) as caught:
        create(own.client, "foreign", adapter_on_llama(**KINDS["plain"]))
    assert caught.value.reason == "BASE_MISMATCH"


def test_two_changes_of_one_deployment_at_once_are_not_mixed(own: RunningServer) -> None:
    create(own.client, "raced", DEMO / "upper")

    def swap(index: int) -> str:
        try:
            return update(own.client, "raced", adapter_path=str(DEMO / ("rot13", "shift")[index % 2])).adapter_digest
        except ServerError as error:
            return f"{error.code} {error.reason}"

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(swap, range(16)))
    digests = {result for result in results if len(result) == 64}
    assert digests
    assert set(results) - digests <= {"ABORTED DEPLOYMENT_BUSY"}
    now = own.client.stubs.deployments.GetDeployment(pb.GetDeploymentRequest(name="raced")).deployment
    assert now.adapter_digest in digests
    delete(own.client, "raced")


def test_an_adapter_that_only_folds_is_served_folded(own: RunningServer, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base")
    save_adapter(model, tmp_path, method=peft.LoHaConfig, target_modules=["v_proj", "up_proj"], r=4, alpha=400)
    with pytest.raises(ServerError, match="LOHA has no low-rank form") as caught:
        create(own.client, "loha", tmp_path, "unmerged")
    assert caught.value.reason == "ADAPTER_UNSUPPORTED"
    made = create(own.client, "loha", tmp_path, "auto")
    assert made.adapter_kind == "LOHA"
    assert "LOHA" in made.route_refusal
    answer = own.client.generate("hello", deployment="loha", max_tokens=8)
    assert answer.mode == "merged"
    assert answer.text != own.client.generate("hello", max_tokens=8).text  # Negative control.
    delete(own.client, "loha")
