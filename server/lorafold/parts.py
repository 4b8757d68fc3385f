"""What a server is made of: base, plugin, engine, deployments and metrics, before anything listens."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from grpc_health.v1 import health, health_pb2
from prometheus_client import CollectorRegistry
from transformers import PreTrainedModel

from lorafold.config import Config, EngineConfig, FoldConfig, ResidencyConfig, fingerprint_folder, local_model_path
from lorafold.deployments import Deployments
from lorafold.engine.loop import Engine
from lorafold.engine.probe import Probe
from lorafold.engine.step_clock import clock_for
from lorafold.engine_parts import Cache, make_cache, make_engine
from lorafold.errors import ConfigError
from lorafold.metrics import Metrics
from lorafold.metrics.vllm import VllmAdapters
from lorafold.model import LoadedBase, load_base, load_model, load_weights
from lorafold.overheads import Overheads
from lorafold.own_thread import in_own_thread
from lorafold.reading import Reader
from lorafold.staging import Staging
from lorafold.stamps import StampCheck
from lorafold.state_file import StateFile
from lorafold_adapters import AdapterManager
from lorafold_adapters.errors import BaseMismatch
from lorafold_adapters.fingerprint_cache import CacheEntry, cache_entry, model_files
from lorafold_adapters.identity import fingerprint, quantised_from
from lorafold_adapters.stand_ins import FoldOptions

T = TypeVar("T")
SCRAPE_PATIENCE = 1.0
"""Seconds that a scrape waits for a step of the engine to end."""
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
    overheads: Overheads
    metrics: Metrics
    health: health.aio.HealthServicer
    died: "asyncio.Future[BaseException | None]"
    """Done when the engine has ended: None if it was told to, or else what killed it."""


async def load_parts(config: Config, file: StateFile, say: Say) -> Parts:
    """Everything but the network and what `file` remembers. Raises ModelUnsupported."""
    path = local_model_path(config)
    base, manager, entry = await load_manager(config, path, say)
    pool, runner = await load_cache(config.engine, base, manager, say)
    base = replace(base, context=min(base.context, pool.tokens))
    metrics = make_metrics(config)
    device, dtype = str(base.model.device), str(base.model.dtype).removeprefix("torch.")
    metrics.engine.serving(model=config.base.model, base=manager.base.digest, dtype=dtype, device=device)
    loop = asyncio.get_running_loop()
    died: asyncio.Future[BaseException | None] = loop.create_future()
    health_servicer = health.aio.HealthServicer()
    engine = make_engine(
        config,
        pool=pool,
        runner=runner,
        manager=manager,
        vocabulary=base.vocabulary(),
        metrics=metrics,
        load_base=lambda: load_model(config.base, path),
        on_death=lambda why: loop.call_soon_threadsafe(died.set_result, why),
        on_health=lambda whole: asyncio.run_coroutine_threadsafe(set_health(health_servicer, whole), loop),
    )
    if metrics.vllm is not None:
        VllmAdapters(
            metrics.registry,
            queued=lambda: engine.queued().result(SCRAPE_PATIENCE),
            names=metrics.deployments.pointing_at,
            slots=config.residency.device_slots,
        )
    stamps = StampCheck(manager, engine, config.identity.unstamped, entry.write)
    reader = Reader(manager, engine, stamps, config.folder)
    return Parts(
        config=config,
        base=base,
        manager=manager,
        engine=engine,
        deployments=Deployments(Staging(manager, engine, reader, metrics), file, metrics),
        overheads=Overheads(
            engine,
            manager,
            Probe(runner, manager, pool, clock_for(base.model.device)),
            metrics.overhead,
            max_batch=config.engine.max_batch,
            context=min(config.engine.max_context, base.context),
        ),
        metrics=metrics,
        health=health_servicer,
        died=died,
    )


def make_metrics(config: Config) -> Metrics:
    """On a registry of their own."""
    declared = config.metrics
    model = config.base.model if declared.compat == "vllm" else ""
    return Metrics(CollectorRegistry(), declared.deployments, vllm_model=model)


async def load_manager(config: Config, path: str, say: Say) -> tuple[LoadedBase, AdapterManager, CacheEntry]:
    """The base, what folds adapters into it, and where its fingerprint is remembered."""
    before = await in_own_thread(model_files, path)
    base = await timed(say, "loaded the base", lambda: load_base(config.base, path))
    model = base.model
    say(f"  {type(model).__name__}, {model.num_parameters() / 1e6:,.1f} M parameters, {model.dtype}, {model.device}")
    entry = cache_entry(fingerprint_folder(config), model, before, await in_own_thread(model_files, path))
    folder = Path(before[0][0]).parent if before else None
    manager = await timed(say, "read its fingerprint", lambda: attach(model, entry, config, path, folder))
    say(f"  base {manager.base.digest[:12]}")
    return base, manager, entry


async def load_cache(limits: EngineConfig, base: LoadedBase, manager: AdapterManager, say: Say) -> Cache:
    """The cache and what runs steps on it, ready to run. Raises DeviceFull."""
    pool, runner = await timed(say, "made the cache", lambda: make_cache(limits, base, manager))
    if limits.compile:
        await timed(say, "ran torch.compile", runner.compile)
    if base.model.device.type == "cuda":
        context = min(limits.max_context, base.context)
        await timed(say, "recorded decode steps", lambda: runner.record(limits.max_batch, context))
    say(f"  {pool.tokens:,} tokens, up to {pool.tokens * base.cache_bytes_per_token / 1e6:,.1f} MB")
    if pool.tokens < base.context:
        say(f"  contexts are cut to {pool.tokens:,} of {base.context:,} tokens: engine.kv_memory_gib gives no more")
    return pool, runner


def attach(
    model: PreTrainedModel, entry: CacheEntry, config: Config | None = None, path: str = "", folder: Path | None = None
) -> AdapterManager:
    """A manager of `model`, whose tensors are read only if their fingerprint is not remembered.

    What was quantised while it was loaded is then loaded once more as it is in `path`, for its fingerprint. `folder` is
    where the base's files are. Raises ConfigError if the base is to be folded into a checkpoint that is not there.
    """
    known, fold = entry.read(), FoldConfig() if config is None else config.fold
    remembered = known is not None
    if not remembered and config is not None and config.base.quantise != "none":
        known = quantised_from(fingerprint(model), fingerprint(load_weights(path, config.base.dtype)))
    try:
        manager = AdapterManager(
            model,
            undo=fold.undo,
            source=folder,
            fingerprint=known,
            max_delta_error=fold.max_delta_error,
            device_slots=ResidencyConfig().device_slots if config is None else config.residency.device_slots,
            quantised=FoldOptions(requantise=fold.requantise, provenance=fold.provenance),
        )
    except BaseMismatch as error:
        raise ConfigError(f"fold.provenance is '{fold.provenance}': {error}") from error
    if not remembered:
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
    result = await in_own_thread(work)
    say(f"{what} in {time.perf_counter() - start:.1f} s")
    return result
