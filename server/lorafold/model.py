"""Loads the base model and its tokenizer, and makes sure that our attention computes what the model means."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import structlog
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorafold.config import BaseConfig
from lorafold.engine import attention
from lorafold.engine.attention_means import IN_PLACE, PLAIN
from lorafold.engine.detokenize import remembering
from lorafold.engine.emit import Vocabulary
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.linear import choose_linear
from lorafold.engine.step import Part, plan_step
from lorafold.errors import ModelUnsupported
from lorafold_adapters.quantised import keep_as_loaded, quantised_modules

log = structlog.get_logger(__name__)
PROBE_TOKENS = 24
PROBE_PAGE = 4
# Largest difference of logits between two attention implementations, over the largest logit: some units in the last
# place of the dtype, grown by the depth of the network.
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
QUANTISED_TOLERANCE = 1e-1  # int8 rounds inputs too, so that a difference in the last place can become one in 127.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBase:
    """A base model, ready for the engine."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int
    """Tokens the model can take."""
    cache_bytes_per_token: int
    """Keys and values of all layers."""

    @property
    def vocabulary_size(self) -> int:
        """Token ids must be below this."""
        return vocabulary_size(self.model)

    def vocabulary(self) -> Vocabulary:
        """What the engine needs of it."""
        stop = self.model.generation_config.eos_token_id if self.model.generation_config else None
        stop = self.tokenizer.eos_token_id if stop is None else stop
        ids = stop if isinstance(stop, list) else [] if stop is None else [stop]
        return Vocabulary(decode=remembering(self.decode), end_of_sequence=frozenset(ids))

    def decode(self, ids: Any) -> str:
        """Token ids as text, without special tokens."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def load_base(config: BaseConfig, path: str) -> LoadedBase:
    """Loads the base from `path`, a folder or a name on the hub. Raises ModelUnsupported."""
    refuse_no_model(path)
    device = pick_device(config.device)
    with translated(path):
        model = load_model(config, path)
        if model.device != device:
            cast(torch.nn.Module, model).to(device)
        tokenizer = AutoTokenizer.from_pretrained(path)
        cast(torch.nn.Module, model).eval().requires_grad_(False)
        keep_as_loaded(model)
    found = use_our_attention(model)
    if means := choose_linear(model):
        log.info("linear layers", by_tokens=means)
    return LoadedBase(
        model=model,
        tokenizer=tokenizer,
        context=context_of(model, found.windows),
        cache_bytes_per_token=found.cache_bytes_per_token,
    )


def load_model(config: BaseConfig, path: str) -> PreTrainedModel:
    """The model alone: on its device if it is quantised, on the CPU otherwise. Raises ModelUnsupported."""
    if config.quantise != "none" or is_quantised_checkpoint(path):
        return load_quantised(path, config, pick_device(config.device))
    return load_weights(path, config.dtype)


def is_quantised_checkpoint(path: str) -> bool:
    """True if the checkpoint says how it is quantised."""
    return getattr(AutoConfig.from_pretrained(path), "quantization_config", None) is not None


def load_quantised(path: str, config: BaseConfig, device: torch.device) -> PreTrainedModel:
    """The model in `path`, quantised as it is or as `config` says, on `device`. Raises ModelUnsupported."""
    if config.quantise != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelUnsupported(
            f"base.quantise is '{config.quantise}', which needs bitsandbytes: pip install bitsandbytes"
        )
    if config.quantise != "none" and is_quantised_checkpoint(path):
        raise ModelUnsupported(f"base model '{path}' is quantised already: set base.quantise to 'none'")
    wanted = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    options = {} if config.quantise == "none" else {"quantization_config": quantisation(path, config)}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=wanted, device_map={"": device}, **options
    )
    return model


def quantisation(path: str, config: BaseConfig) -> BitsAndBytesConfig:
    """What `base.quantise` stands for; 4-bit weights compute in the dtype of the activations."""
    if config.quantise == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = getattr(AutoConfig.from_pretrained(path), "dtype", None) if config.dtype == "auto" else config.dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.float32
    )


def load_weights(path: str, dtype: str = "auto") -> PreTrainedModel:
    """The model in `path`, a folder or a name on the hub, on the CPU. Raises ModelUnsupported."""
    refuse_no_model(path)
    with translated(path):
        wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=wanted)
    return model


def base_name(path: str) -> str:
    """What people call a base: the name of its folder, or its name on the hub."""
    return Path(path).resolve().name if Path(path).is_dir() else path


@contextmanager
def translated(path: str) -> Iterator[None]:
    """Inside, whatever transformers raises becomes ModelUnsupported: a file or a package that is missing, ..."""
    try:
        yield
    except ModelUnsupported:
        raise
    except Exception as error:
        raise ModelUnsupported(f"cannot load the base model '{path}': {first_line(error)}") from error


def refuse_no_model(path: str) -> None:
    """Raises ModelUnsupported for what can be neither a model's folder nor a name on the hub."""
    folder = Path(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelUnsupported(f"base model '{path}' is a PEFT adapter: name the model it was trained on")
    if not folder.is_dir() and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        raise ModelUnsupported(f"base model '{path}' is no folder here and no name on the hub: correct it")


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding: token ids must be below."""
    weight: Any = model.get_input_embeddings().weight
    return int(weight.shape[0])


def first_line(error: Exception) -> str:
    """The first line of a library's message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def pick_device(name: str) -> torch.device:
    """`auto` becomes the first GPU or the CPU. Raises ModelUnsupported if the device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelUnsupported(f"base.device is '{name}', which torch does not have: {first_line(error)}") from error
    return device


def context_of(model: PreTrainedModel, windows: set[int]) -> int:
    """How many tokens the model can take, as far as we compute what it means.

    Rotary embeddings that change with length count up to where they change. A model that limits how far back it looks,
    but tells its mask and not its attention (`windows` is empty), counts up to that limit.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    limits = [getattr(config, "max_position_embeddings", 2**31)]
    if original and rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        limits.append(original)
    if not windows:
        limits += [getattr(config, name, None) or 2**31 for name in ("sliding_window", "attention_chunk_size")]
    return int(min(limits))


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one prompt told about a model's attention."""

    windows: set[int]
    """The sizes of sliding windows that it hands on."""
    cache_bytes_per_token: int


@torch.inference_mode()
def use_our_attention(model: PreTrainedModel) -> Found:
    """Puts our attention into `model` and compares one prompt with the model's own.

    Raises ModelUnsupported if the model has a part that our attention does not know.
    """
    attention.register()
    ids = torch.arange(PROBE_TOKENS, device=model.device) % vocabulary_size(model)
    name = type(model).__name__
    try:
        model.set_attn_implementation("eager")
        theirs = model(input_ids=ids[None], use_cache=False).logits[0]
        windows = attention.register_spy()
        model.set_attn_implementation(attention.SPY)
        cache = PagedCache(pages=1 + PROBE_TOKENS // PROBE_PAGE, size=PROBE_PAGE)
        ours = probe(model, ids, cache)
        model.set_attn_implementation(attention.NAME)
    except Exception as error:
        raise ModelUnsupported(f"{name} cannot be served: {first_line(error)}") from error
    error_size = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
    tolerance = QUANTISED_TOLERANCE if quantised_modules(model) else PROBE_TOLERANCE.get(model.dtype, 1e-1)
    if not error_size <= tolerance:
        raise ModelUnsupported(
            f"{name} cannot be served: with our attention its logits are off by {error_size:.2g} of their size; "
            "please report the model"
        )
    return Found(windows=windows, cache_bytes_per_token=cache.nbytes // (cache.pages * cache.size))


def probe(model: PreTrainedModel, ids_T: Tensor, cache: PagedCache) -> Tensor:
    """Logits of a prompt read in two chunks and then two single tokens, through our attention."""
    pages = range(cache.pages - 1, 0, -1)
    means = IN_PLACE if ids_T.device.type == "cpu" else PLAIN
    logits = []
    for past, stop in (
        (0, 9),
        (9, PROBE_TOKENS - 2),
        (PROBE_TOKENS - 2, PROBE_TOKENS - 1),
        (PROBE_TOKENS - 1, PROBE_TOKENS),
    ):
        part = Part(tokens=stop - past, past=past, pages=pages, decodes=stop - past == 1)
        step = plan_step(cache, [part], ids_T.device, with_tables=means.tables)
        out = model(
            input_ids=ids_T[None, past:stop],
            position_ids=step.position_T[None],
            use_cache=False,
            step=step,
            means=means,
        )
        logits.append(out.logits[0])
    return torch.cat(logits)
