"""What can be known of an adapter: from its folder alone, and together with a base. Changes nothing.

Where an adapter would be refused, the reason is one of the facts, and the others are found all the same.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.checkpoint import Checkpoint, content_digest, read_options, read_tensors, refuse_unserved
from lorafold_adapters.errors import AdapterError, BaseMismatch, DeltaLost, LorafoldError
from lorafold_adapters.estimate import Cost, base_cost, two_path_cost
from lorafold_adapters.fidelity import Fidelity
from lorafold_adapters.manager import AdapterManager
from lorafold_adapters.stamp import Match, Stamp, check_stamp, own_stamp, read_stamp
from lorafold_adapters.updates import LowRank

T = TypeVar("T")
FACTORS = (".lora_A.weight", ".lora_embedding_A")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Rank and scale of the modules that a pattern of the configuration names."""

    pattern: str
    """Empty: of all other modules."""
    rank: int
    alpha: float
    scale: float
    """alpha / rank, or with rsLoRA alpha / sqrt(rank)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """An adapter's folder."""

    options: Mapping[str, Any]
    """Its adapter_config.json."""
    scales: tuple[Scale, ...]
    ranks: Mapping[int, int]
    """How many modules have factors of each rank, as the tensors say."""
    tensors: int
    nbytes: int
    dtypes: tuple[str, ...]
    checkpoint: Checkpoint | None
    """None if its tensors cannot be read."""
    stamp: Stamp | None
    refusals: tuple[str, ...]
    """Why no server would take it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """An adapter in a base."""

    bound: BoundAdapter
    scales: Mapping[tuple[int, float], int]
    """How many modules have each rank and scale."""
    fold_refusal: str | None
    """What `merge_adapter` would say; None if it folds."""
    route_refusal: str | None
    """Why it does not run beside the weights; None if it does."""
    fidelity: Fidelity | None
    """None if it cannot be folded at all."""
    cost: Cost | None
    """Of the two-path form, per token; None if it has none."""
    base_cost: Cost


def describe(folder: Path) -> Described:
    """Reads an adapter's folder. Raises AdapterNotFound or AdapterCorrupt if it has no readable configuration."""
    options = read_options(folder)
    refusals: list[str] = []
    attempt(refusals, lambda: refuse_unserved(options))
    tensors = attempt(refusals, lambda: read_tensors(folder)) or {}
    digest = content_digest(options, tensors)
    checkpoint = Checkpoint(path=folder, options=options, tensors=tensors, digest=digest) if tensors else None
    stamp = attempt(refusals, lambda: own_stamp(checkpoint) if checkpoint else read_stamp(folder))
    return Described(
        options=options,
        scales=scales_of(options),
        ranks=dict(Counter(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(FACTORS))),
        tensors=len(tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        checkpoint=checkpoint,
        stamp=stamp,
        refusals=tuple(refusals),
    )


def attempt(refusals: list[str], read: Callable[[], T]) -> T | None:
    """What `read` returns; where it refuses, the reason joins `refusals`."""
    try:
        return read()
    except AdapterError as error:
        refusals.append(str(error))
        return None


def scales_of(options: Mapping[str, Any]) -> tuple[Scale, ...]:
    """What a LoRA's configuration says of ranks and scales; nothing if it is no LoRA or makes no sense."""
    if options.get("peft_type") != "LORA":
        return ()
    ranks, alphas = options.get("rank_pattern") or {}, options.get("alpha_pattern") or {}
    try:
        return tuple(
            make_scale(pattern, ranks.get(pattern, options["r"]), alphas.get(pattern, options["lora_alpha"]), options)
            for pattern in ("", *dict.fromkeys([*ranks, *alphas]))
        )
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
        return ()


def make_scale(pattern: str, rank: int, alpha: float, options: Mapping[str, Any]) -> Scale:
    """The scale as PEFT computes it."""
    over = math.sqrt(rank) if options.get("use_rslora") else rank
    return Scale(pattern=pattern, rank=int(rank), alpha=float(alpha), scale=alpha / over)


def place(manager: AdapterManager, checkpoint: Checkpoint) -> Placed:
    """Binds an adapter to a base and measures it. Raises what `bind` raises."""
    bound = manager.bind(checkpoint)
    fold_refusal, fidelity = folding(manager, bound)
    model = manager.model
    ranks = Counter(
        (update.a_RI.shape[0], update.scaling) for update in bound.updates.values() if isinstance(update, LowRank)
    )
    routed = bound.route_refusal is None
    return Placed(
        bound=bound,
        scales=dict(ranks),
        fold_refusal=fold_refusal,
        route_refusal=bound.route_refusal,
        fidelity=fidelity,
        cost=two_path_cost(bound, model, model.dtype.itemsize) if routed else None,
        base_cost=base_cost(model),
    )


def folding(manager: AdapterManager, bound: BoundAdapter) -> tuple[str | None, Fidelity | None]:
    """What `merge_adapter` would say, and how much of the adapter would arrive."""
    try:
        manager.gate.check(bound)
    except DeltaLost as error:
        return str(error), manager.gate.fidelity(bound)
    except LorafoldError as error:
        return str(error), None
    return None, manager.gate.fidelity(bound)


def stamped(manager: AdapterManager, checkpoint: Checkpoint) -> tuple[str, str]:
    """Why the stamp forbids this base, empty if it does not; and how the bases compare."""
    try:
        return "", check_stamp(checkpoint, manager.base, manager.base_as).match.value
    except BaseMismatch as error:
        return str(error), Match.OTHER_BASE.value
    except AdapterError as error:
        return str(error), "unknown"
