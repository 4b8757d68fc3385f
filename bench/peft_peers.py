"""What PEFT offers for the same work: rows of one batch with adapters of their own, and one adapter beside or in the
weights.
"""

from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import LlamaForCausalLM

from bench.peers import generate
from bench.work import Run, Work


class Peft:
    """A PeftModel with all adapters loaded, in the dtype of the base. Its model is its own, its base tensors too."""

    def __init__(self, model: LlamaForCausalLM, adapters: Sequence[Path]) -> None:
        self._names = [folder.name for folder in adapters]
        self._model = PeftModel.from_pretrained(
            model, str(adapters[0]), adapter_name=self._names[0], autocast_adapter_dtype=False
        )
        for folder, name in zip(adapters[1:], self._names[1:], strict=True):
            self._model.load_adapter(str(folder), adapter_name=name, autocast_adapter_dtype=False)
        self._model.eval().requires_grad_(False)

    def mixed(self, work: Work) -> Run:
        """Row i with adapter i, in turn, by `generate(adapter_names=...)`."""
        self._model.unmerge_adapter()
        return generate(self._model, work, adapter_names=[self._names[i % len(self._names)] for i in range(work.rows)])

    def unmerged(self, work: Work) -> Run:
        """All rows with the first adapter, beside the weights."""
        self._model.unmerge_adapter()
        return generate(self._model, work)

    def merged(self, work: Work) -> Run:
        """All rows with the first adapter, in the weights."""
        self._model.merge_adapter([self._names[0]])
        return generate(self._model, work)
