"""Reads lorafold.toml again while the server runs, and puts in force what can be: `[[deployments]]` and `[log] level`.

All of its deployments or none: what is wrong with the file is logged, and everything stays as it was.
"""

import asyncio
from collections.abc import Callable

import structlog

from lorafold.config import Config
from lorafold.declared import reload
from lorafold.deployments import Deployments
from lorafold.errors import ConfigError
from lorafold.logs import set_up_logging
from lorafold.own_thread import in_own_thread
from lorafold_adapters.errors import LorafoldError

LIVE = {"deployments", "log", "base"}
"""Not compared as other sections are: a change of the base is refused."""

log = structlog.get_logger(__name__)


class Reloader:
    """Reads the configuration of one server again."""

    def __init__(self, deployments: Deployments, config: Config, read: Callable[[], Config]) -> None:
        """`config`: as it was when the server started. `read`: reads it again, and raises ConfigError."""
        self._deployments = deployments
        self._config = config
        self._read = read

    async def run(self, wanted: asyncio.Event) -> None:
        """Reads it whenever `wanted` is set. Never returns."""
        while True:
            await wanted.wait()
            wanted.clear()
            await self.reload()

    async def reload(self) -> None:
        """Reads it now; what is wrong is logged."""
        try:
            await self._reload()
        except LorafoldError as error:
            log.error("configuration not taken over, nothing was changed", reason=str(error))
        except Exception:
            log.error("configuration not taken over", exc_info=True)

    async def _reload(self) -> None:
        new = await in_own_thread(self._read)
        if new.base != self._config.base:
            raise ConfigError("[base] is another one, which needs a restart: restart, or change it back")
        plan = await reload(self._deployments, new.deployments)
        restart = sorted(name for name in Config.model_fields.keys() - LIVE if changed(name, self._config, new))
        if new.log.format != self._config.log.format:
            restart.append("log.format")
        set_up_logging(self._config.log.model_copy(update={"level": new.log.level}))
        for name in restart:
            log.warning("changed in the configuration, and needs a restart", section=name)
        names = {"changed": [entry.name for entry, _ in plan.new], "deleted": [record.name for record in plan.removed]}
        log.info("configuration taken over", **names)


def changed(section: str, old: Config, new: Config) -> bool:
    """True if a section is not what it was."""
    return bool(getattr(old, section) != getattr(new, section))
