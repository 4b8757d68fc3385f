"""Work that every engine is given alike, and what came of it: which tokens, and when each was known.

Knows neither engines nor models. Times are in seconds on `time.perf_counter`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Prompts of one length that are answered greedily, all with the same number of tokens."""

    prompts: tuple[tuple[int, ...], ...]
    answer: int
    """Tokens of each answer."""

    @property
    def rows(self) -> int:
        """Sequences in the batch."""
        return len(self.prompts)

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompts[0]) + self.answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One engine's answers to some work."""

    tokens: tuple[tuple[int, ...], ...]
    """By row."""
    times: tuple[tuple[float, ...], ...]
    """When each token was known."""
    start: float
    """When the work was handed over."""

    @property
    def seconds(self) -> float:
        """From handing over to the last token."""
        return max(row[-1] for row in self.times) - self.start

    @property
    def step_seconds(self) -> float:
        """Seconds from one token of a row to its next while all rows decode, so that no prompt is read meanwhile.

        The mean over the rows, each by its own tokens: those of one step are not told at the same instant. Raises
        ValueError if the rows did not decode together for two tokens.
        """
        begin, end = max(row[0] for row in self.times), min(row[-1] for row in self.times)
        return statistics.fmean(pace([time for time in row if begin <= time <= end]) for row in self.times)


def pace(times: Sequence[float]) -> float:
    """Mean seconds between neighbours. Raises ValueError for less than two."""
    if len(times) < 2:
        raise ValueError("the rows did not decode together: ask for longer answers")
    return (times[-1] - times[0]) / (len(times) - 1)


def drawn(rows: int, prompt: int, answer: int, vocabulary: int, seed: int = 0) -> Work:
    """Random prompts of `prompt` tokens below `vocabulary`, no two alike."""
    numbers = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, prompt), generator=numbers).tolist()
    return Work(prompts=tuple(tuple(row) for row in ids), answer=answer)


def share_equal(ours: Run, theirs: Run) -> float:
    """Share of the rows whose tokens are all the same."""
    rows = zip(ours.tokens, theirs.tokens, strict=True)
    return sum(one == other for one, other in rows) / len(ours.tokens)


def steps_of(runs: Sequence[Run]) -> list[float]:
    """Seconds per step of each run."""
    return [run.step_seconds for run in runs]
