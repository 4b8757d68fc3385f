"""Compares the stamps of adapters with this server's base, and follows `[identity] unstamped`.

Called from one worker thread at a time. The engine's thread is asked to read the base, and only where a digest of it as
another dtype decides and is not remembered.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import structlog

from lorafold.engine.loop import Engine
from lorafold_adapters import AdapterManager
from lorafold_adapters.checkpoint import Checkpoint
from lorafold_adapters.errors import AdapterUnstamped
from lorafold_adapters.identity import Fingerprint
from lorafold_adapters.stamp import Finding, Match, check_stamp

log = structlog.get_logger(__name__)


class StampCheck:
    """The stamps of one server's adapters."""

    def __init__(
        self,
        manager: AdapterManager,
        engine: Engine,
        unstamped: Literal["allow", "warn", "refuse"],
        remember: Callable[[Fingerprint], None],
    ) -> None:
        self._manager = manager
        self._engine = engine
        self._unstamped = unstamped
        self._remember = remember
        self._base = manager.base
        self._said: set[tuple[str, Match]] = set()

    def check(self, checkpoint: Checkpoint) -> Match:
        """What the adapter's stamp says about the base; anything but `SAME` is logged, once for each adapter.

        Raises BaseMismatch, AdapterUnstamped if a stamp is demanded, or AdapterCorrupt or AdapterUnsupported for a
        stamp that cannot be used.
        """
        finding = check_stamp(checkpoint, self._base, self._cast)
        if finding.match is Match.UNSTAMPED and self._unstamped == "refuse":
            raise AdapterUnstamped(finding.sentence)
        self._say(checkpoint.digest, finding)
        return finding.match

    def _say(self, digest: str, finding: Finding) -> None:
        if finding.match is Match.SAME or (digest, finding.match) in self._said:
            return
        self._said.add((digest, finding.match))
        allowed = finding.match is Match.UNSTAMPED and self._unstamped == "allow"
        (log.info if allowed else log.warning)(finding.sentence, adapter=digest)

    def _cast(self, dtype: str) -> str:
        if dtype not in self._base.casts:
            digest = self._engine.call(lambda: self._manager.base_as(dtype)).result()
            self._base = replace(self._base, casts={**self._base.casts, dtype: digest})
            self._remember(self._base)
        return self._base.casts[dtype]
