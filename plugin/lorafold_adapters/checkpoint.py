"""Reads a PEFT adapter folder into memory, safely, or says why it cannot be served.

Reads safetensors only (a pickle can run code), checks every option and every number, and computes the content digest.
Knows nothing about a base model: whether the adapter fits one is `binding.py`'s job.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from torch import Tensor

from lorafold_adapters.errors import AdapterChanged, AdapterCorrupt, AdapterNotFound, AdapterUnsupported

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
TENSOR_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

MERGED_BY_PEFT = ("LOHA", "LOKR", "OFT", "IA3", "HRA", "MISS", "FOURIERFT")
"""Methods beside LoRA that PEFT can fold and that are tested here."""

# Initialisations of LoRA that leave the base weights as they are; the others rewrite them (PEFT, LoraConfig docstring).
BASE_KEEPING_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
CONVERTED_INITS = ("pissa", "olora", "corda", "lora_ga")
"""PEFT can convert these to plain LoRA when it saves them."""
OLD_OPTIONS = {"merge_weights", "enable_lora", "peft_version"}
"""Written by other versions of PEFT; they do not change what the adapter is."""

VARIANTS = {
    "use_rslora": "rslora",
    "use_dora": "dora",
    "lora_bias": "bias",
    "modules_to_save": "modules",
    "trainable_token_indices": "tokens",
    "target_parameters": "parameters",
}
SWITCHES = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")

UNSERVED_OPTIONS = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA) switches on in mid-prompt",
    "arrow_config": "Arrow routes each token among several adapters",
    "kasa_config": "KaSA rewrites the base weights",
    "layer_replication": "layer_replication changes the number of layers of the base",
    "monteclora_config": "MonteCLoRA draws its weights at random",
    "megatron_config": "it was trained for Megatron's parallel layers",
    "use_bdlora": "BD-LoRA uses block-diagonal factors",
    "use_qalora": "QA-LoRA pools its input",
    "velora_config": "VeLoRA changes the forward pass",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One adapter as it lies on disk."""

    path: Path
    """The folder it was read from."""
    options: Mapping[str, Any]
    """The contents of `adapter_config.json`."""
    tensors: Mapping[str, Tensor]
    """Every tensor by its name in the file, on the CPU, in the file's dtype."""
    digest: str
    """SHA-256 of options and tensors, hexadecimal: the adapter's identity."""

    @property
    def method(self) -> str:
        """PEFT's name of the method, e.g. `LORA`."""
        return str(self.options["peft_type"])

    @property
    def kind(self) -> str:
        """For people: `LORA`, with the variants it uses, e.g. `LORA+rslora+dora`."""
        variants = [name for key, name in VARIANTS.items() if self.options.get(key)]
        patterns = ["patterns"] if self.options.get("rank_pattern") or self.options.get("alpha_pattern") else []
        biases = ["biases"] if self.options.get("bias", "none") != "none" else []
        return "+".join([self.method, *variants, *patterns, *biases])


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads and checks the adapter folder `path`.

    Raises AdapterNotFound, AdapterCorrupt or AdapterUnsupported, each with the file or option and the remedy.
    """
    folder = Path(path)
    options = read_options(folder)
    refuse_unserved(options)
    tensors = read_tensors(folder)
    return Checkpoint(path=folder, options=options, tensors=tensors, digest=content_digest(options, tensors))


def read_again(path: str | Path, digest: str) -> Checkpoint:
    """The adapter that had this digest when `path` was read before. Raises AdapterChanged if it has another now."""
    checkpoint = read_checkpoint(path)
    if checkpoint.digest != digest:
        raise AdapterChanged(
            f"adapter folder '{path}' changed since it was deployed: it holds {checkpoint.digest[:12]} now, not "
            f"{digest[:12]}: put its files back, or update the deployment"
        )
    return checkpoint


def read_options(folder: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises AdapterNotFound or AdapterCorrupt."""
    if not is_folder(folder):
        raise AdapterNotFound(f"there is no adapter folder '{folder}': check the path, on the machine that reads it")
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise AdapterNotFound(f"'{folder}' has no {CONFIG_FILE}: point at a folder that PEFT's save_pretrained wrote")
    try:
        options = json.loads(file.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterCorrupt(f"{file} cannot be read as JSON ({error}): copy the adapter again") from error
    if not isinstance(options, dict):
        raise AdapterCorrupt(f"{file} holds no JSON object: copy the adapter again")
    return options


def is_folder(path: Path) -> bool:
    """False for paths that no file system could hold, too."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def refuse_unserved(options: Mapping[str, Any]) -> None:
    """Raises AdapterUnsupported for a kind or an option that would be served wrongly."""
    kind = options.get("peft_type")
    if kind != "LORA" and kind not in MERGED_BY_PEFT:
        raise AdapterUnsupported(
            f"peft_type is {kind!r}: LORA is served, and folded only {', '.join(MERGED_BY_PEFT)}; retrain it as one"
        )
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    known = {field.name for field in dataclasses.fields(config)} | OLD_OPTIONS
    if unknown := sorted(key for key, value in options.items() if key not in known and value):
        raise AdapterUnsupported(
            f"{CONFIG_FILE} sets {', '.join(map(repr, unknown))}, which the installed PEFT does not know: "
            "upgrade peft on the server, or retrain without it"
        )
    for option, reason in UNSERVED_OPTIONS.items():
        if options.get(option):
            raise AdapterUnsupported(f"{CONFIG_FILE} sets {option}: {reason}, which is not served; retrain without it")
    for option in SWITCHES:
        if not isinstance(options.get(option, False), bool | None):
            raise AdapterCorrupt(f"{CONFIG_FILE}: {option} is {options[option]!r}, which is neither true nor false")
    refuse_rewritten_base(options.get("init_lora_weights", True))


def refuse_rewritten_base(init: object) -> None:
    """Raises AdapterUnsupported for an initialisation that changes the base before training."""
    if init in BASE_KEEPING_INITS:
        return
    if str(init).startswith(CONVERTED_INITS):
        remedy = "convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
    else:
        remedy = "serve it on the base that was written after the initialisation, with init_lora_weights set to true"
    raise AdapterUnsupported(f"init_lora_weights is {init!r}, which trains against a rewritten base: {remedy}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the adapter. Raises AdapterNotFound, AdapterUnsupported (pickled) or AdapterCorrupt."""
    file = folder / TENSORS_FILE
    if not file.is_file():
        if (folder / PICKLE_FILE).is_file():
            raise AdapterUnsupported(
                f"'{folder}' has its tensors in {PICKLE_FILE}, a pickle, which can run code when read: "
                "save it again with safe_serialization=True"
            )
        raise AdapterNotFound(f"'{folder}' has no {TENSORS_FILE}: copy the adapter again")
    try:
        tensors = parse_safetensors(file.read_bytes())
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise AdapterCorrupt(f"{file} is truncated or damaged ({error}): copy the adapter again") from error
    if not tensors:
        raise AdapterCorrupt(f"{file} holds no tensors: save the adapter again")
    for name, tensor in tensors.items():
        if tensor.dtype not in TENSOR_DTYPES:
            raise AdapterCorrupt(
                f"tensor '{name}' in {file} is {tensor.dtype}: save it as float32, float16 or bfloat16"
            )
        if not finite(tensor):
            raise AdapterCorrupt(f"tensor '{name}' in {file} has NaN or infinite values: the training run diverged")
    return tensors


def finite(tensor: Tensor) -> bool:
    """True if no element is NaN or infinite. A sum that is finite settles it; others may just be too large."""
    return math.isfinite(tensor.sum(dtype=torch.float32)) or bool(torch.isfinite(tensor).all())


def content_digest(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, hexadecimal, over options and tensors, whatever their order in the files."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
