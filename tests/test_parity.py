"""The engine against `model.generate()` and PEFT, token for token: all families, all lengths, any mix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from lorafold.errors import ModelUnsupported
from lorafold.model import context_of, use_our_attention
from lorafold.requests import Finished, Sampling
from lorafold_adapters.policy import Mode, PolicyKind
from tests.engines import Bench, Collected
from tests.models import DEVICES, KINDS, SHAPE, on, prompts, tiny_llama

MakeAdapter = Callable[..., Path]
LENGTHS = [1, 2, 5, 16, 17, 63, 64, 65, 130, 300]
WINDOW = {"sliding_window": 8}
HEAD = {"head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": WINDOW,
    "Qwen2": {},
    "Qwen3": HEAD,
    "Gemma": HEAD,
    "Gemma2": {**HEAD, **WINDOW, "query_pre_attn_scalar": 16},
    "Gemma3": {**HEAD, **WINDOW},
    "Phi": {},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 4},
}


def family(name: str, device: str) -> Any:
    config_name = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**SHAPE, **FAMILIES[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    model.generation_config = transformers.GenerationConfig()
    return on(device, model)


def generated(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_generate_for_every_length_in_one_mix(name: str, device: str) -> None:
    asked = [prompts(1, length, seed=length)[0].tolist() for length in LENGTHS]
    expected = [generated(family(name, device), prompt, 12) for prompt in asked]
    with Bench(family(name, device), slots=4, prefill=50) as bench:
        answers = [bench.submit(str(index), prompt, 12) for index, prompt in enumerate(asked)]
        for answer in answers:
            assert isinstance(answer.last, Finished), answer.last
    assert [answer.tokens for answer in answers] == expected
    assert len({tuple(tokens) for tokens in expected}) > 5  # Negative control: prompts matter.


def test_rows_of_different_adapters_and_of_the_base_share_a_step(
    adapter_on_llama: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(tiny_llama()) as bench:
        digests = [bench.load(adapter_on_llama(seed=seed, **KINDS["plain"])) for seed in (1, 2, 3)]
        seen: list[set[str | None]] = []
        real = bench.runner.run

        def run(pieces: Any) -> Any:
            seen.append({piece.adapter for piece in pieces})
            return real(pieces)

        monkeypatch.setattr(bench.runner, "run", run)
        rows: list[str | None] = [*digests, None]
        answers = [bench.submit(str(index), [5, 6, 7], 20, adapter=row) for index, row in enumerate(rows)]
        for answer in answers:
            assert isinstance(answer.last, Finished)
    assert set(rows) in seen


@pytest.mark.parametrize("device", DEVICES)
def test_every_adapter_and_policy_at_once_equals_peft_alone(device: str, adapter_on_llama: MakeAdapter) -> None:
    kinds = ["rslora", "dora", "saved-head", "patterns", "all-linear", "saved-embedding"]
    folders = {kind: adapter_on_llama(seed=index, **KINDS[kind]) for index, kind in enumerate(kinds)}
    policies = [PolicyKind.UNMERGED, PolicyKind.MERGED, PolicyKind.UNMERGED, PolicyKind.MERGED, PolicyKind.AUTO]
    plan: list[tuple[str | None, PolicyKind, list[int]]] = []
    for index, prompt in enumerate(prompts(36, 40, seed=3).tolist()):
        kind = [None, *kinds][index % 7]
        policy = policies[index % 5] if kind is not None else PolicyKind.UNMERGED
        plan.append((kind, policy, prompt[: 1 + index]))
    oracles: dict[str | None, Any] = {
        kind: PeftModel.from_pretrained(on(device, tiny_llama()), str(folder)).eval()
        for kind, folder in folders.items()
    }
    oracles[None] = on(device, tiny_llama())
    with Bench(on(device, tiny_llama()), slots=6, prefill=30) as bench:
        digests: dict[str | None, str | None] = {kind: bench.load(folder) for kind, folder in folders.items()}
        digests[None] = None
        answers: list[Collected] = [
            bench.submit(str(index), prompt, 10, adapter=digests[kind], policy=policy)
            for index, (kind, policy, prompt) in enumerate(plan)
        ]
        for answer, (kind, policy, prompt) in zip(answers, plan, strict=True):
            last = answer.last
            assert isinstance(last, Finished)
            assert answer.tokens == generated(oracles[kind], prompt, 10), (kind, policy)
            if policy is not PolicyKind.AUTO:
                mode = Mode.BASE if kind is None else Mode(policy.value)
                assert last.provenance.mode is mode
        assert set(bench.recorder.steps) == {Mode.BASE, Mode.MERGED, Mode.UNMERGED}
        assert bench.engine.call(bench.engine.weights.verify).result(60).mismatched == ()


def test_requests_that_join_and_leave_do_not_change_the_others() -> None:
    long, late, gone = (prompts(1, length, seed=length)[0].tolist() for length in (90, 7, 33))
    with Bench(tiny_llama(), slots=3, prefill=16) as bench:
        first = bench.submit("long", long, 60)
        leaver = bench.submit("gone", gone, 400)
        second = bench.submit("late", late, 30)
        assert isinstance(second.last, Finished)
        bench.engine.cancel("gone")
        third = bench.submit("again", late, 30)
        assert isinstance(third.last, Finished)
        assert isinstance(first.last, Finished)
    assert first.tokens == generated(tiny_llama(), long, 60)
    assert second.tokens == third.tokens == generated(tiny_llama(), late, 30)
    assert len(leaver.tokens) < 400


def test_a_seed_gives_the_same_tokens_whatever_the_neighbours_are() -> None:
    prompt = prompts(1, 12)[0].tolist()
    seeded = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=42)
    with Bench(tiny_llama(), slots=8) as bench:
        alone = bench.submit("alone", prompt, 40, sampling=seeded)
        assert isinstance(alone.last, Finished)
        crowd = [
            bench.submit(
                f"n{index}",
                prompts(1, 5 + index, seed=index)[0].tolist(),
                50,
                sampling=Sampling(temperature=2.0, seed=index),
            )
            for index in range(6)
        ]
        among = bench.submit("among", prompt, 40, sampling=seeded)
        other = bench.submit("other", prompt, 40, sampling=Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=43))
        for answer in (*crowd, among, other):
            assert isinstance(answer.last, Finished)
    assert among.tokens == alone.tokens
    assert other.tokens != alone.tokens


def test_a_model_whose_attention_we_do_not_know_is_refused() -> None:
    config = transformers.GptOssConfig(
        **{**SHAPE, **HEAD, "num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    )
    with pytest.raises(ModelUnsupported, match="s_aux"):
        use_our_attention(transformers.GptOssForCausalLM(config).eval())


def test_a_window_that_only_the_mask_knows_limits_the_context() -> None:
    told = family("Mistral", "cpu")
    assert use_our_attention(told).windows == {8}
    assert context_of(told, {8}) == SHAPE["max_position_embeddings"]
    config = transformers.Qwen2MoeConfig(
        **{**SHAPE, "num_experts": 4, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}
    )
    untold = transformers.Qwen2MoeForCausalLM(config).eval()
    assert context_of(untold, use_our_attention(untold).windows) == 32


def test_a_wrong_attention_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafold.engine import attention_means

    monkeypatch.setattr(attention_means, "visible", lambda place, position, window: place <= position + 1)
    with pytest.raises(ModelUnsupported, match="off by"):
        use_our_attention(family("Llama", "cpu"))
