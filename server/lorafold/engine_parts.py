"""The engine of a server, and its cache, as the configuration says."""

from collections.abc import Callable

import torch
from torch import nn

from lorafold.config import Config, EngineConfig, PolicyConfig, ResidencyConfig
from lorafold.engine.budget import PAGE_TOKENS, Wishes, pages_for, step_bytes
from lorafold.engine.emit import Vocabulary
from lorafold.engine.kv_cache import PagedCache
from lorafold.engine.loop import Engine
from lorafold.engine.pages import PagePool
from lorafold.engine.residents import Residents
from lorafold.engine.runner import Runner
from lorafold.engine.scheduler import Scheduler
from lorafold.engine.step_clock import clock_for
from lorafold.engine.weights import WeightsControl
from lorafold.metrics import Metrics
from lorafold.model import LoadedBase
from lorafold_adapters import AdapterManager
from lorafold_adapters.costs import Costs
from lorafold_adapters.residency import UNLIMITED, Limits
from lorafold_adapters.turns import MeasuredTurns

PREFILL_TOKENS = {"cpu": 128, "cuda": 1024}
Cache = tuple[PagePool, Runner]
"""Whose every page is, and what runs steps on them."""


def make_engine(
    config: Config,
    *,
    pool: PagePool,
    runner: Runner,
    manager: AdapterManager,
    vocabulary: Vocabulary,
    metrics: Metrics,
    load_base: Callable[[], nn.Module],
    on_death: Callable[[BaseException | None], object],
    on_health: Callable[[bool], object],
) -> Engine:
    """An engine that is not running yet. `load_base` loads the base anew, should it be damaged."""
    limits, device, costs = config.engine, manager.model.device, Costs()
    residents = Residents(manager, make_limits(config.residency))
    return Engine(
        runner=runner,
        weights=WeightsControl(manager, make_policy(config.policy, costs), costs, metrics, load_base),
        residents=residents,
        scheduler=Scheduler(
            pool=pool,
            adapters=residents,
            max_batch=limits.max_batch,
            max_waiting=limits.max_queue,
            prefill_tokens=prefill_tokens(limits, device),
        ),
        vocabulary=vocabulary,
        observer=metrics,
        clock=clock_for(device),
        on_death=on_death,
        on_health=on_health,
        overlap=device.type == "cuda",
    )


def make_limits(declared: ResidencyConfig) -> Limits:
    """What adapters may take, as declared."""
    device = declared.device_memory_gib
    return Limits(
        device_slots=declared.device_slots,
        device_bytes=UNLIMITED if device is None else int(device * 2**30),
        host_bytes=int(declared.host_memory_gib * 2**30),
    )


def make_policy(declared: PolicyConfig, costs: Costs) -> MeasuredTurns:
    """Who is folded when, as declared."""
    return MeasuredTurns(costs, swap_share=declared.swap_share, max_wait=declared.max_wait_seconds)


def prefill_tokens(limits: EngineConfig, device: torch.device) -> int:
    """Tokens of one step at most, as declared or as suits the device."""
    return limits.prefill_tokens or PREFILL_TOKENS[device.type]


def make_cache(limits: EngineConfig, base: LoadedBase, manager: AdapterManager) -> Cache:
    """Cache and runner, with the memory that they need. Raises DeviceFull."""
    pool = make_pool(limits, base)
    runner = Runner(base.model, manager, PagedCache(pages=pool.pages, size=pool.size))
    runner.warm_up()
    return pool, runner


def make_pool(limits: EngineConfig, base: LoadedBase) -> PagePool:
    """The pages of the cache, within the memory that is declared or there."""
    device = base.model.device
    wishes = Wishes(
        declared_gib=limits.kv_memory_gib, max_batch=limits.max_batch, context=min(limits.max_context, base.context)
    )
    step = step_bytes(base.model, min(prefill_tokens(limits, device), wishes.context))
    pages = pages_for(wishes, base.cache_bytes_per_token, device, step)
    return PagePool(pages=pages, size=PAGE_TOKENS, neighbours=device.type == "cpu")
