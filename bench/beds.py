"""One shape, ready to be measured: our engine with adapters on one model, and every peer with a model of its own.

The peers of the folded engine have the folded weights, those with adapters the base's, so that all must answer alike.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from bench.engines import Driven, engine_of
from bench.low_rank import write_low_rank
from bench.models import shaped, shell
from bench.peers import ContinuousBatching, Peer, generate
from bench.peft_peers import Peft
from bench.serving import tokenizer_of
from bench.teams import release_team
from bench.work import Run, Work
from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.policy import PolicyKind

ADAPTERS = 8
COMPILED = "compiled"
"""The folded engine with `engine.compile`, on a CPU."""
OURS = ("merged", "merged_again", "base", "unmerged_1", "unmerged_8", COMPILED)
PEERS = ("generate_dynamic", "generate_static", "continuous_batching", "peft_mixed", "peft_unmerged", "peft_merged")
SEVERAL = ("unmerged_8", "peft_mixed")
"""Variants with all adapters in one batch: only for batches that are large enough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How large a bed must be."""

    slots: int
    """Sequences in one batch."""
    context: int
    """Tokens of one sequence."""
    prefill: int
    """Prompt tokens of one batch: all are read in one step, so that all rows decode from then on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bed:
    """What can be run on one shape."""

    base: LlamaForCausalLM
    """As it was drawn; nobody changes its tensors."""
    driven: Driven
    others: Sequence[Driven]
    """More engines of ours."""
    variants: Mapping[str, Peer]
    """By name: does some work and says what came of it."""
    close_peers: Callable[[], None]
    """Frees what peers keep for one size of batch."""

    def leave_cores(self) -> None:
        """On a CPU: ends the threads in which somebody computed, so that the next has all cores to itself."""
        if self.base.device.type == "cpu":
            self.close_peers()
            for driven in (self.driven, *self.others):
                driven.call(release_team)
            release_team()


@contextmanager
def bed_of(
    shape: str, device: torch.device, dtype: torch.dtype, rank: int, size: Size, names: Sequence[str], scratch: Path
) -> Iterator[Bed]:
    """The variants of `names` on one shape."""
    base = shaped(shape, device, dtype)
    folders = [write_low_rank(base, scratch / f"adapter-{seed}", seed, rank) for seed in range(ADAPTERS)]
    with ExitStack() as stack:
        driven, bound = stack.enter_context(driving(base, folders, size))
        manager = driven.manager
        variants = ours(driven, bound)
        others = []
        if COMPILED in names:
            other, adapters = stack.enter_context(driving(base, folders[:1], size, compiled=True))
            variants[COMPILED] = partial(other.run, adapters=adapters, policy=PolicyKind.MERGED)
            others.append(other)
        batching = None
        if set(names) & {"generate_dynamic", "generate_static", "continuous_batching"}:
            folded = with_adapter(base, manager, bound[0])
            batching = ContinuousBatching(shell(folded))
            variants |= transformers_peers(folded, batching)
        if any(name.startswith("peft") for name in names):
            peft = Peft(copy.deepcopy(base) if "peft_merged" in names else shell(base), folders)
            variants |= {"peft_mixed": peft.mixed, "peft_unmerged": peft.unmerged, "peft_merged": peft.merged}
        yield Bed(
            base=base,
            driven=driven,
            others=others,
            variants={name: variants[name] for name in names},
            close_peers=batching.close if batching else lambda: None,
        )


@contextmanager
def driving(
    base: LlamaForCausalLM, folders: Sequence[Path], size: Size, *, compiled: bool = False
) -> Iterator[tuple[Driven, list[BoundAdapter]]]:
    """An engine on a copy of `base`, running, with adapters on it."""
    engine, manager, _ = engine_of(
        copy.deepcopy(base),
        tokenizer_of(base.config.vocab_size),
        slots=size.slots,
        context=size.context,
        prefill_tokens=size.prefill,
        compiled=compiled,
    )
    bound = [manager.bind(folder) for folder in folders]
    with Driven(engine, manager) as driven:
        driven.put_on(bound)
        yield driven, bound


def ours(driven: Driven, adapters: Sequence[BoundAdapter]) -> dict[str, Peer]:
    """Our engine: one adapter in the weights or beside them, several beside them, and before it had any."""

    def base(work: Work) -> Run:
        driven.take_off(adapters)
        try:
            return driven.run(work)
        finally:
            driven.put_on(adapters)

    merged = partial(driven.run, adapters=adapters[:1], policy=PolicyKind.MERGED)
    return {
        "merged": merged,
        "merged_again": merged,
        "base": base,
        "unmerged_1": partial(driven.run, adapters=adapters[:1]),
        "unmerged_8": partial(driven.run, adapters=adapters),
    }


def transformers_peers(model: LlamaForCausalLM, batching: ContinuousBatching) -> dict[str, Peer]:
    """transformers on the folded weights."""
    return {
        "generate_dynamic": partial(generate, model, cache="dynamic"),
        "generate_static": partial(generate, model, cache="static"),
        "continuous_batching": batching,
    }


def with_adapter(base: LlamaForCausalLM, manager: AdapterManager, bound: BoundAdapter) -> LlamaForCausalLM:
    """A copy of the base with the weights that a fold would write."""
    folded, merged = copy.deepcopy(base), manager.merged(bound)
    for name, parameter in folded.named_parameters():
        parameter.copy_(merged.read(name))
    return folded
