"""Writes merged checkpoints under one folder of the server's disk, while requests go on.

A worker thread writes; every look at the model is a call of its own to the engine's thread, between two steps.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

import structlog
from transformers import PreTrainedTokenizerBase

from lorafold.config import BASE, Config, local_model_path
from lorafold.deployments import Deployments
from lorafold.engine.loop import Engine
from lorafold.errors import ExportOff, InvalidField
from lorafold.model import base_name
from lorafold.recipes import Recipe
from lorafold_adapters import AdapterManager
from lorafold_adapters.export import SHARD_SIZE, Exported, Order, Progress, export_merged
from lorafold_adapters.provenance import origin

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Exports:
    """The exports of one server."""

    def __init__(
        self,
        manager: AdapterManager,
        engine: Engine,
        deployments: Deployments,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
    ) -> None:
        self._manager = manager
        self._engine = engine
        self._deployments = deployments
        self._tokenizer = tokenizer
        self._base_name = base_name(local_model_path(config))
        allowed = config.server.export_folder
        self._folder = None if allowed is None else config.folder / allowed

    async def export(self, name: str, path: str, shard_size: int) -> AsyncGenerator[Progress | Exported, None]:
        """Writes deployment `name` to `path`, which starts at the export folder; leaving early removes everything.

        Raises ExportOff, InvalidField, DeploymentNotFound, DeploymentUnservable, and what `export_merged` raises.
        """
        if self._folder is None:
            raise ExportOff("this server writes no exports: set export_folder under [server] in its configuration")
        out = inside(self._folder, path)
        if name in ("", BASE):
            raise InvalidField("deployment", "name a deployment with an adapter: the base is a checkpoint already")
        deployment = self._deployments.get(name)
        staged, source = deployment.served, deployment.wanted.source
        bound = (await self._deployments.staging.again(staged)).bound
        spec = source.spec if isinstance(source, Recipe) else None
        order = Order(
            bound=bound,
            out=out,
            origin=origin(self._base_name, staged.origin.ingredients, spec),
            tokenizer=self._tokenizer,
            shard_size=shard_size or SHARD_SIZE,
        )
        run = EngineRun(self._engine)
        async with aclosing(in_a_thread(export_merged(self._manager, order, run))) as steps:
            async for step in steps:
                yield step
        log.info("exported", deployment=name, adapter=bound.digest, path=str(out))


class EngineRun:
    """Runs functions on the engine's thread and waits for them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, function: Callable[[], T], /) -> T:
        """Raises EngineStopped, or what the function raises."""
        return self._engine.call(function).result()


def inside(folder: Path, path: str) -> Path:
    """The folder that `path` names under `folder`, links resolved. Raises InvalidField if it lies elsewhere."""
    try:
        root = folder.resolve()
        out = (root / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidField("path", f"no path on this server's disk ({error}): correct it") from error
    if root not in out.parents:
        raise InvalidField("path", "does not lie under this server's export folder: give a name inside it")
    return out


async def in_a_thread(steps: Generator[T, None, None]) -> AsyncGenerator[T, None]:
    """The items of `steps`, made in a thread of their own. Leaving early closes `steps` there, between two items."""
    loop = asyncio.get_running_loop()
    pool = ThreadPoolExecutor(1, "lorafold-export")
    try:
        while (item := await loop.run_in_executor(pool, next, steps, None)) is not None:
            yield item
    finally:
        pool.submit(steps.close)
        pool.shutdown(wait=False)
