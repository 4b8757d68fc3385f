"""What the accuracy of an adapter does when its delta arrives damaged: the evidence for `[fold] max_delta_error`.

    python -m bench.fidelity [--quick]

The adapters of the demo set are folded exactly, and then with their deltas rounded to grids of growing steps, as a
dtype with too few bits would round them: the step of each weight is proportional to its size, as the spacing of
floating point numbers is, and measured in units of the delta's rms. Reported for each step: the error of the delta
that arrives (norm over norm) and the share of held-out strings that the adapter still answers right. The last line is
one JSON object.
"""

import argparse
import json
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from bench.environment import describe
from lorafold.cli.demo import shipped_set
from lorafold.demo.tasks import TASKS, held_out
from lorafold_adapters import AdapterManager

STEPS = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)
"""Steps of the grid at a weight of average size, over the rms of the delta."""
SMALLEST = 0.05
"""Weights below this share of the rms have the step of one at it."""


def coarse(weight: Tensor, delta: Tensor, step: float) -> Tensor:
    """The delta on a grid whose step grows with the weight, as that of floating point does."""
    if step == 0:
        return delta
    size = (weight.abs() / weight.square().mean().sqrt()).clamp(min=SMALLEST)
    grid = step * delta.square().mean().sqrt() * size
    return torch.round(delta / grid) * grid


class Subject:
    """One adapter of the demo set, folded into the base with the exact delta or a damaged one."""

    def __init__(self, task: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(shipped_set() / "base").eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(shipped_set() / "base")
        self._task = task
        before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        manager = AdapterManager(self.model)
        manager.load(task, shipped_set() / task)
        manager.merge_adapter(task)
        self._deltas = {
            name: (before[name], parameter.detach() - before[name])
            for name, parameter in self.model.named_parameters()
            if "_proj" in name and not torch.equal(parameter, before[name])
        }

    @torch.no_grad()
    def damage(self, step: float) -> float:
        """Puts the damaged delta into the weights; returns its error."""
        lost = whole = 0.0
        for name, (weight, delta) in self._deltas.items():
            arrives = coarse(weight, delta, step)
            lost += float((arrives - delta).square().sum())
            whole += float(delta.square().sum())
            self.model.get_parameter(name).copy_(weight + arrives)
        return float((lost / whole) ** 0.5)

    @torch.no_grad()
    def accuracy(self, texts: list[str]) -> float:
        """Share of right answers."""
        return sum(self._answer(text) == TASKS[self._task].rule(text) for text in texts) / len(texts)

    def _answer(self, text: str) -> str:
        prompt = self._tokenizer(text, return_tensors="pt")
        output = self.model.generate(**prompt, max_new_tokens=len(text) + 2, do_sample=False, pad_token_id=0)
        answer: str = self._tokenizer.decode(output[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
        return answer


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one adapter and fewer strings: under a minute")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    texts = held_out(12 if arguments.quick else 50)
    results = {}
    for task in list(TASKS)[:1] if arguments.quick else TASKS:
        subject = Subject(task)
        results[task] = [
            {"delta_error": round(subject.damage(step), 3), "accuracy": round(subject.accuracy(texts), 3)}
            for step in STEPS
        ]
        print(task + ": " + ", ".join(f"error {row['delta_error']} -> {row['accuracy']}" for row in results[task]))
    print(json.dumps({"accuracy": results, "strings": len(texts), **describe(torch.device("cpu"), subject.model)}))


if __name__ == "__main__":
    main()
