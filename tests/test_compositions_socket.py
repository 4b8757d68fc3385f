"""Composed deployments through a real socket: created, called in both modes, swapped, refused.

Oracle: transformers' `generate` on weights that the papers' formulas made, out of the adapters' own files.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorafold.client import Client, ServerError, translated
from lorafold.demo.reference import Reference
from lorafold.v1 import deployment_pb2 as pb
from tests.conftest import DEMO, RunningServer, demo_config, serving
from tests.deployments import delete
from tests.models import KINDS
from tests.test_compose import by_the_paper

MakeAdapter = Callable[..., Path]
PROMPT = "Compose me, please"
TIES: dict[str, Any] = {"method": "COMPOSITION_METHOD_TIES", "density": 0.5}
DECLARED = {
    "name": "declared",
    "policy": "merged",
    "compose": {
        "method": "linear",
        "parts": [
            {"adapter": str(DEMO / "upper")},
            {"adapter": str(DEMO / "shift"), "weight": 2.0},
            {"adapter": str(DEMO / "shift"), "weight": -2},
        ],
    },
}


@pytest.fixture(scope="module")
def own() -> Iterator[RunningServer]:
    """A server of this file's own, with one composition in its file."""
    plain = {"name": "upper", "adapter": str(DEMO / "upper"), "policy": "auto"}
    with serving(demo_config(deployments=[plain, DECLARED])) as running:
        yield running


def composition(parts: dict[str, float], **options: Any) -> pb.Composition:
    made = [pb.CompositionPart(adapter_path=str(DEMO / name), weight=weight) for name, weight in parts.items()]
    return pb.Composition(parts=made, **options)


def create(client: Client, name: str, policy: str = "auto", **fields: Any) -> pb.Deployment:
    wanted = pb.Deployment(name=name, policy=f"POLICY_{policy.upper()}", **fields)
    with translated():
        response = client.stubs.deployments.CreateDeployment(pb.CreateDeploymentRequest(deployment=wanted))
    made: pb.Deployment = response.deployment
    return made


def update(client: Client, name: str, mask: tuple[str, ...] = (), **fields: Any) -> pb.Deployment:
    request = pb.UpdateDeploymentRequest(deployment=pb.Deployment(name=name, **fields))
    request.update_mask.paths.extend(mask)
    with translated():
        response = client.stubs.deployments.UpdateDeployment(request)
    made: pb.Deployment = response.deployment
    return made


def delta_of(adapter: str, module: str) -> Tensor:
    """`alpha / r B A` out of an adapter's files."""
    options = json.loads((DEMO / adapter / "adapter_config.json").read_text())
    scaling = options["lora_alpha"] / (options["r"] ** 0.5 if options["use_rslora"] else options["r"])
    tensors = load_file(DEMO / adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
    delta: Tensor = scaling * b @ a
    return delta


def by_formula(method: str, parts: dict[str, float], reference: Reference, max_tokens: int) -> tuple[int, ...]:
    """Greedy tokens of the base with composed deltas in its weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO / "base")
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            deltas = [delta_of(adapter, name.removesuffix(".weight")) for adapter in parts]
            parameter.data += by_the_paper(method, deltas, list(parts.values()), 0.5)
    ids = reference.tokenizer(PROMPT, return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    answer = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens)
    return tuple(answer[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "linear"])
def test_a_composition_answers_as_the_formula_in_both_modes(
    method: str, own: RunningServer, reference: Reference
) -> None:
    parts = {"upper": 1.0, "rot13": 0.6}
    expected = by_formula(method, parts, reference, 24)
    for alone in parts:  # Negative control: it is none of its parts.
        assert expected != reference.answer(PROMPT, str(DEMO / alone), 24)
    options = {"rank": 128, "density": 0.5} if method != "linear" else {}
    wanted = composition(parts, method=f"COMPOSITION_METHOD_{method.upper()}", **options)
    for policy in ("merged", "unmerged"):
        made = create(own.client, "it", policy, composition=wanted)
        assert (made.composition, made.adapter_path) == (wanted, "")
        assert made.adapter_kind == f"{method.upper()}(LORA, LORA+rslora)"
        assert (made.bound_modules, made.adapter_modules, made.base_match) == (28, 28, pb.BASE_MATCH_SAME)
        assert made.HasField("unmerged_error") == (method != "linear")
        assert made.unmerged_error < 1e-5
        answer = own.client.generate(PROMPT, deployment="it", max_tokens=24)
        assert answer.mode == policy
        assert answer.finished.answered_by.adapter_digest == made.adapter_digest
        assert tuple(answer.token_ids) == expected
        delete(own.client, "it")


def test_a_composition_of_the_file_is_served(own: RunningServer) -> None:
    """Twice another task, and twice its negation: nothing of it is left."""
    assert own.client.generate("abcdef", deployment="declared").text == "ABCDEF"
    assert own.client.generate("abcdef").text == "abcdef"


def test_a_form_beside_the_weights_that_is_far_off_says_so(own: RunningServer) -> None:
    made = create(own.client, "near", "unmerged", composition=composition({"upper": 1, "rot13": 1}, **TIES))
    assert 0.05 < made.unmerged_error < 0.5
    far = composition({"upper": 1.0}, method="COMPOSITION_METHOD_DARE_LINEAR", density=0.5, seed=4)
    with pytest.raises(ServerError, match=r"cannot run unmerged: .*max_delta_error .*higher rank") as caught:
        create(own.client, "far", "unmerged", composition=far)
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "ADAPTER_UNSUPPORTED")
    made = create(own.client, "far", "auto", composition=far)
    assert made.unmerged_error > 0.5
    assert own.client.generate("abc", deployment="far", max_tokens=4).mode == "merged"
    with pytest.raises(ServerError, match="cannot run unmerged"):
        update(own.client, "far", policy=pb.POLICY_UNMERGED)
    delete(own.client, "near")
    delete(own.client, "far")


def test_dare_repeats_with_its_seed_only(own: RunningServer) -> None:
    digests, answers = [], []
    for seed in (1, 1, 2):
        wanted = composition(
            {"upper": 1.0, "rot13": 1.0}, method="COMPOSITION_METHOD_DARE_LINEAR", density=0.3, seed=seed
        )
        digests.append(create(own.client, "it", "merged", composition=wanted).adapter_digest)
        answers.append(own.client.generate(PROMPT, deployment="it", max_tokens=40).token_ids)
        delete(own.client, "it")
    assert digests[0] == digests[1] != digests[2]
    assert answers[0] == answers[1] != answers[2]


def test_an_update_goes_from_an_adapter_to_a_composition_and_back(own: RunningServer) -> None:
    client, wanted = own.client, composition({"upper": 1, "rot13": 1}, **TIES)
    first = create(client, "it", adapter_path=str(DEMO / "upper"))
    second = update(client, "it", composition=wanted)
    assert (second.adapter_path, second.composition) == ("", wanted)
    assert second.adapter_digest != first.adapter_digest
    third = update(client, "it", ("adapter_path",), adapter_path=str(DEMO / "upper"), composition=wanted)
    assert (third.adapter_path, third.HasField("composition")) == (str(DEMO / "upper"), False)
    assert third.adapter_digest == first.adapter_digest
    assert client.generate("abc", deployment="it").text == "ABC"
    fourth = update(client, "it", ("composition",), composition=wanted, adapter_path="ignored")
    assert fourth.adapter_digest == second.adapter_digest
    assert update(client, "it", policy=pb.POLICY_MERGED).composition == wanted
    delete(client, "it")


def only_upper(**options: Any) -> pb.Composition:
    return composition({"upper": 1.0}, **options)


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "both": (
        {"composition": only_upper(**TIES), "adapter_path": str(DEMO / "upper")},
        "INVALID_FIELD",
        "deployment.composition: is set beside adapter_path",
    ),
    "neither": ({}, "INVALID_FIELD", "deployment.adapter_path"),
    "no method": ({"composition": only_upper()}, "INVALID_FIELD", "composition.method"),
    "unknown method": ({"composition": only_upper(method=77)}, "INVALID_FIELD", "composition.method: 77"),
    "no parts": ({"composition": pb.Composition(**TIES)}, "INVALID_FIELD", "composition.parts: is empty"),
    "no density": (
        {"composition": only_upper(method="COMPOSITION_METHOD_DARE_TIES")},
        "INVALID_FIELD",
        "composition.density: is missing",
    ),
    "bad density": ({"composition": only_upper(**{**TIES, "density": 2.0})}, "INVALID_FIELD", "composition.density"),
    "surplus seed": ({"composition": only_upper(**TIES, seed=0)}, "INVALID_FIELD", "composition.seed"),
    "infinite weight": (
        {"composition": composition({"upper": 1.0, "rot13": float("inf")}, **TIES)},
        "INVALID_FIELD",
        "deployment.composition.parts[1].weight",
    ),
    "no path": (
        {"composition": pb.Composition(parts=[pb.CompositionPart()], **TIES)},
        "INVALID_FIELD",
        "deployment.composition.parts[0].adapter_path",
    ),
    "missing part": (
        {"composition": composition({"upper": 1.0, "nowhere": 1.0}, **TIES)},
        "ADAPTER_NOT_FOUND",
        "no adapter folder",
    ),
}
CODES = {"INVALID_FIELD": "INVALID_ARGUMENT", "ADAPTER_NOT_FOUND": "NOT_FOUND"}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_composition_is_refused_and_changes_nothing(name: str, own: RunningServer) -> None:
    fields, reason, words = BAD[name]
    before = own.client.stubs.deployments.ListDeployments(pb.ListDeploymentsRequest())
    with pytest.raises(ServerError) as caught:
        create(own.client, "bad", **fields)
    assert (caught.value.code, caught.value.reason) == (CODES[reason], reason)
    assert words in str(caught.value)
    if fields:
        with pytest.raises(ServerError) as caught:
            update(own.client, "upper", **fields)
        assert caught.value.reason == reason
    assert own.client.stubs.deployments.ListDeployments(pb.ListDeploymentsRequest()) == before


@pytest.mark.parametrize("mask", [("composition", "adapter_path"), ("composition",)], ids=str)
def test_a_mask_that_asks_for_what_is_not_there_is_refused(mask: tuple[str, ...], own: RunningServer) -> None:
    with pytest.raises(ServerError) as caught:
        update(own.client, "upper", mask, adapter_path=str(DEMO / "upper"))
    assert caught.value.reason == "INVALID_FIELD"


def test_every_part_is_checked_against_the_base(own: RunningServer, adapter_on_llama: MakeAdapter) -> None:
    wanted = composition({"upper": 1.0}, **TIES)
    wanted.parts.add(adapter_path=str(adapter_on_llama(**KINDS["plain"])))
    with pytest.raises(ServerError) as caught:
        create(own.client, "foreign", composition=wanted)
    assert caught.value.reason == "BASE_MISMATCH"
