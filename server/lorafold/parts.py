"""What a server is made of: base, plugin, engine, deployments and metrics, before anything listens."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from grpc_health.v1 import health, health_pb2
from prometheus_client import CollectorRegistry
from transformers import PreTrainedModel

from lorafold.config import Config, FoldConfig, fingerprint_folder, local_model_path
from lorafold.deployments import Deployments
from lorafold.engine.kv_cache import SlotCache
from lorafold.engine.loop import Engine
from lorafold.engine.runner import Runner
from lorafold.engine.scheduler import Scheduler
from lorafold.engine.weights import WeightsControl
from lorafold.metrics import Metrics
from lorafold.model import LoadedBase, load_base, load_weights
from lorafold.stamps import StampCheck
from lorafold_adapters import AdapterManager
from lorafold_adapters.fingerprint_cache import CacheEntry, FileIdentity, cache_entry, model_files
from lorafold_adapters.policy import TurnTaking

T = TypeVar("T")
Say = Callable[[str], None]
SERVICES = (
    "lorafold.v1.GenerationService",
    "lorafold.v1.DeploymentService",
    "lorafold.v1.WeightsService",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a server is made of, before it listens."""

    config: Config
    base: LoadedBase
    manager: AdapterManager
    engine: Engine
    deployments: Deployments
    metrics: Metrics
    health: health.aio.HealthServicer
    died: "asyncio.Future[BaseException | None]"
    """Done when the engine has ended: None if it was told to, or else what killed it."""


async def load_parts(config: Config, say: Say) -> Parts:
    """Everything but the network. Raises ModelUnsupported."""
    path = local_model_path(config)
    before = await asyncio.to_thread(model_files, path)
    base = await timed(say, "loaded the base", lambda: load_base(config.base, path))
    model = base.model
    say(f"  {type(model).__name__}, {model.num_parameters() / 1e6:,.1f} M parameters, {model.dtype}, {model.device}")
    entry = cache_entry(fingerprint_folder(config), model, before, await asyncio.to_thread(model_files, path))
    manager = await timed(say, "read its fingerprint", lambda: attach(model, entry, config.fold, before))
    say(f"  base {manager.base.digest[:12]}")
    metrics = Metrics(CollectorRegistry())
    loop = asyncio.get_running_loop()
    died: asyncio.Future[BaseException | None] = loop.create_future()
    limits = config.engine
    cache = SlotCache(slots=limits.max_batch, length=min(limits.max_context, base.context))
    runner = Runner(model, manager, cache)
    await timed(say, "made the cache", runner.warm_up)
    say(f"  {cache.slots} sequences of {cache.length} tokens, {cache.nbytes / 1e6:,.0f} MB")
    health_servicer = health.aio.HealthServicer()
    engine = Engine(
        runner=runner,
        weights=WeightsControl(
            manager,
            TurnTaking(config.policy.turn_seconds),
            metrics.weights_changed,
            lambda: load_weights(path, config.base.dtype),
        ),
        scheduler=Scheduler(slots=limits.max_batch, max_waiting=limits.max_queue, prefill_tokens=limits.prefill_tokens),
        vocabulary=base.vocabulary(),
        observer=metrics,
        on_death=lambda why: loop.call_soon_threadsafe(died.set_result, why),
        on_health=lambda whole: asyncio.run_coroutine_threadsafe(set_health(health_servicer, whole), loop),
    )
    stamps = StampCheck(manager, engine, config.identity.unstamped, entry.write)
    deployments = Deployments(manager, engine, stamps, config.folder)
    return Parts(
        config=config,
        base=base,
        manager=manager,
        engine=engine,
        deployments=deployments,
        metrics=metrics,
        health=health_servicer,
        died=died,
    )


def attach(model: PreTrainedModel, entry: CacheEntry, fold: FoldConfig, files: list[FileIdentity]) -> AdapterManager:
    """A manager of `model`, whose tensors are read only if their fingerprint is not remembered."""
    known = entry.read()
    manager = AdapterManager(
        model,
        undo=fold.undo,
        source=Path(files[0][0]).parent if files else None,
        fingerprint=known,
        max_delta_error=fold.max_delta_error,
    )
    if known is None:
        entry.write(manager.base)
    return manager


async def set_health(servicer: health.aio.HealthServicer, serving: bool) -> None:
    """What health checks of every service hear."""
    status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
    for service in (*SERVICES, ""):
        await servicer.set(service, status)


async def timed(say: Say, what: str, work: Callable[[], T]) -> T:
    """Runs `work` in a thread and says how long it took."""
    start = time.perf_counter()
    result = await asyncio.to_thread(work)
    say(f"{what} in {time.perf_counter() - start:.1f} s")
    return result
