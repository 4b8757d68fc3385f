"""How much folding an adapter gains before somebody else comes. Pure Python.

A spell is the time in which one adapter has the shared side to itself. What the last ones gained, or would have gained,
says what the next one will: with such a prediction a fold need not wait until it has paid for itself (Purohit et al.,
"Improving online algorithms via ML predictions", 2018).
"""

RECENT = 0.25
"""Weight of the latest spell. A fold that gained less than it cost lowers the mean by at least this share of what it
lost, and a gain raises it by this share of the gain at most: folds that rely on it never lose more than was gained.
"""
REMEMBERED = 1024
"""Adapters."""


class Spells:
    """The running mean of the seconds that folding gains in a spell, by adapter; 0 until the first one ended."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}
        """The latest last."""
        self._alone: str | None = None
        self._gained = 0.0

    def gained(self, alone: str | None, seconds: float) -> None:
        """For a while this adapter was alone, or none was, and folding it gained, or would have gained, so much."""
        if alone != self._alone:
            self._end()
            self._alone = alone
        self._gained += seconds

    def expected(self, adapter: str) -> float:
        """Seconds that folding this adapter gains, if it is alone now."""
        return self._means.get(adapter, 0.0)

    def _end(self) -> None:
        if self._alone is not None:
            before = self._means.pop(self._alone, 0.0)
            self._means[self._alone] = before + RECENT * (self._gained - before)
            if len(self._means) > REMEMBERED:
                del self._means[next(iter(self._means))]
        self._gained = 0.0
