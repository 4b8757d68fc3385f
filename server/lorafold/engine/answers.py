"""Adds chosen tokens to rows and tells their sinks, at once or while the device works on the next step.

What a token does to its row (the ids, the end of the answer) happens at once, since the next step needs it. Its text
and its event can wait until that step is launched, unless they decide something: stop strings end an answer, and the
first and the last token are what somebody waits for. Knows no tensors and no queues.
"""

from collections.abc import Callable, Sequence

import structlog

from lorafold.engine.emit import Token, Vocabulary, add, tell
from lorafold.engine.rows import Row
from lorafold.engine.sampling import Pick
from lorafold.errors import StepFailed
from lorafold.requests import Provenance
from lorafold_adapters.errors import LorafoldError

log = structlog.get_logger(__name__)


class Answers:
    """The answers of running rows, as they grow. What goes wrong with one row ends that row alone."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        overlap: bool,
        done: Callable[[Row], None],
        fail: Callable[[Row, LorafoldError], None],
    ) -> None:
        """`overlap`: whether what can wait for `tell_rest` does."""
        self._vocabulary = vocabulary
        self._overlap = overlap
        self._done = done
        self._fail = fail
        self._untold: list[Token] = []

    def extend(self, rows: Sequence[Row], picks: Sequence[Pick], provenance: Sequence[Provenance], now: float) -> None:
        """One token for each row; rows that have ended meanwhile are left out."""
        for row, pick, came_from in zip(rows, picks, provenance, strict=True):
            if row.ended:
                continue
            try:
                token = add(row, pick, came_from, self._vocabulary, now)
                waits = self._overlap and token.can_wait
                done = not waits and tell(token)
            except Exception as error:
                self._failed(row, error)
                continue
            if waits:
                self._untold.append(token)
            if done:
                self._done(row)

    def tell_rest(self) -> None:
        """Tells what waits."""
        untold, self._untold = self._untold, []
        for token in untold:
            if token.row.ended:
                continue
            try:
                tell(token)
            except Exception as error:
                self._failed(token.row, error)

    def _failed(self, row: Row, error: Exception) -> None:
        log.error("request failed", request=row.request.id, exc_info=True)
        self._fail(row, StepFailed(f"the answer could not be continued ({error}): send the request again"))
