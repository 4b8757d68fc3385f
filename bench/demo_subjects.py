"""The demo's base with whatever delta is put on it, how well it then does a task, and what of an adapter arrives."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafold.cli.demo import shipped_set
from lorafold.demo.tasks import TASKS
from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.compose import Composition
from lorafold_adapters.composed import compose
from lorafold_adapters.paths import LowRankPath, low_rank_path
from lorafold_adapters.updates import LowRank

Deltas = Mapping[str, Tensor]
"""What is added to the base's parameters, fp32, by name."""


class Judge:
    """The base in fp32."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.model: Any = AutoModelForCausalLM.from_pretrained(shipped_set() / "base").eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(shipped_set() / "base", padding_side="left")
        self.base = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self._prompts = self._tokenizer(list(texts), return_tensors="pt", padding=True)

    @torch.inference_mode()
    def accuracy(self, task: str, deltas: Deltas) -> float:
        """Share of the texts that are answered as the task asks for, with `deltas` in the weights."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.base[name] + deltas[name] if name in deltas else self.base[name])
        longest = max(map(len, self.texts)) + 2
        output = self.model.generate(**self._prompts, max_new_tokens=longest, do_sample=False, pad_token_id=0)
        answers = self._tokenizer.batch_decode(output[:, self._prompts.input_ids.shape[1] :], skip_special_tokens=True)
        pairs = zip(answers, self.texts, strict=True)
        return sum(bool(answer == TASKS[task].rule(text)) for answer, text in pairs) / len(self.texts)


class Arrivals:
    """The base in one dtype, and adapters that are folded into it or put beside it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(shipped_set() / "base", dtype=dtype).eval()
        self.base = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in self._model.named_parameters()
        }
        self._manager = AdapterManager(self._model, max_delta_error=float("inf"))

    def merged(self, adapter: Path | BoundAdapter) -> Deltas:
        """What is in the weights once it is folded, less what was there before."""
        self._manager.load("one", adapter)
        self._manager.merge_adapter("one")
        parameters = dict(self._model.named_parameters())
        found = {name: parameters[name].detach().float() - before for name, before in self.base.items()}
        self._manager.unmerge_adapter()
        self._manager.drop("one")
        return {name: delta for name, delta in found.items() if delta.any()}

    def unmerged(self, adapter: Path) -> Deltas:
        """What a low-rank adapter's path multiplies by, in all."""
        modules = dict(self._model.named_modules())
        found = {}
        for name, update in low_rank(self._manager.bind(adapter)).items():
            path = low_rank_path(update, modules[name], lambda _: torch.empty(0), modules[name].weight)
            assert isinstance(path, LowRankPath)
            found[f"{name}.weight"] = (path.a_IR.float() @ path.scaled_b_RO.float()).T
        return found

    def meant(self, adapter: Path) -> Deltas:
        """What a low-rank adapter is to add, in fp32."""
        updates = low_rank(self._manager.bind(adapter))
        return {
            f"{name}.weight": update.scaling * (update.b_OR.float() @ update.a_RI.float())
            for name, update in updates.items()
        }

    def ties(self, adapters: Sequence[Path], density: float) -> BoundAdapter:
        """Several adapters as one, by TIES."""
        parts = [(self._manager.bind(adapter), 1.0) for adapter in adapters]
        return compose(parts, Composition(method="ties", density=density), self._model)


def low_rank(bound: BoundAdapter) -> dict[str, LowRank]:
    """The updates of an adapter that is nothing but low-rank products. Raises TypeError for others."""
    found = {name: update for name, update in bound.updates.items() if isinstance(update, LowRank)}
    if len(found) != len(bound.updates):
        raise TypeError("the adapter is more than low-rank products")
    return found


def error(deltas: Deltas, meant: Deltas) -> float:
    """Norm of what is off, over the norm of what was meant."""
    off = sum(float((deltas.get(name, torch.zeros(())) - delta).square().sum()) for name, delta in meant.items())
    return float((off / sum(float(delta.square().sum()) for delta in meant.values())) ** 0.5)


def times(deltas: Deltas, factor: float) -> Deltas:
    """All of them, scaled."""
    return {name: delta * factor for name, delta in deltas.items()}


def nf4(weight: Tensor) -> Tensor:
    """What is left of a weight in NF4, in blocks of 64, as bitsandbytes has it."""
    values, state = bnb.quantize_4bit(weight.contiguous(), quant_type="nf4", blocksize=64)
    dense: Tensor = bnb.dequantize_4bit(values, state)
    return dense


def requantised(base: Deltas, deltas: Deltas) -> tuple[Deltas, Deltas]:
    """For a base in NF4: the delta beside it, and folded and quantised again; both over the base as it was."""
    projections = [name for name in deltas if "_proj" in name]
    dense = {name: nf4(base[name]) for name in projections}
    beside = {name: dense[name] + deltas[name] - base[name] for name in projections}
    again = {name: nf4(dense[name] + deltas[name]) - base[name] for name in projections}
    others = {name: deltas[name] for name in deltas if name not in dense}
    return {**others, **beside}, {**others, **again}
