"""What PEFT's own merge and unmerge leave in the weights after the same adapters in the same order."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import LlamaForCausalLM

from bench.adapters import KINDS
from bench.models import tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """Weights after the last unmerge, against what they were."""

    dtype: str
    adapters: int
    """Those without modules_to_save, which PEFT does not merge."""
    merges: int
    largest: float
    """The largest absolute difference of a weight."""
    rms_over_weight_rms: float
    """The difference of all targeted weights together, over the weights."""
    changed_share: float
    """Of the values of all targeted weights, how many are not what they were."""

    def details(self) -> dict[str, Any]:
        """For the last line."""
        return asdict(self)

    def sentence(self) -> str:
        """For people."""
        return (
            f"{self.dtype}, PEFT: {self.merges} merges and unmerges of {self.adapters} adapters changed "
            f"{self.changed_share:.1%} of the weights for good, by {self.largest:.2g} at most, "
            f"by {self.rms_over_weight_rms:.1%} of their rms together"
        )


@torch.no_grad()
def drift(model: LlamaForCausalLM, folders: dict[str, Path], sequence: Sequence[str]) -> Drift:
    """Merges and unmerges on `model` whatever of `sequence` PEFT can hold; uses the model up."""
    held = [name for name in folders if "modules_to_save" not in KINDS[name]]
    kept = {name: tensor.detach().clone() for name, tensor in tensors(model).items()}
    adapted = PeftModel.from_pretrained(model, str(folders[held[0]]), adapter_name=held[0])
    for name in held[1:]:
        adapted.load_adapter(str(folders[name]), adapter_name=name)
    merged = [name for name in sequence if name in held]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT, for each layer that an adapter leaves alone.
        for name in merged:
            adapted.merge_adapter([name])
            adapted.unmerge_adapter()
    modules = adapted.get_base_model().named_modules()
    layers: dict[str, Any] = {name: module for name, module in modules if isinstance(module, LoraLayer)}
    pairs = [(layer.get_base_layer().weight, kept[f"{name}.weight"]) for name, layer in layers.items()]
    return compared(pairs, len(held), len(merged))


def compared(pairs: list[tuple[Tensor, Tensor]], adapters: int, merges: int) -> Drift:
    """The figures of all (after, before) together."""
    after = torch.cat([one.float().flatten() for one, _ in pairs])
    before = torch.cat([other.float().flatten() for _, other in pairs])
    off = (after - before).abs()
    return Drift(
        dtype=str(pairs[0][0].dtype).removeprefix("torch."),
        adapters=adapters,
        merges=merges,
        largest=round(float(off.max()), 6),
        rms_over_weight_rms=round(float(off.norm() / before.norm()), 4),
        changed_share=round(float((off != 0).float().mean()), 4),
    )
