"""How long steps take: on a CPU by its clock, on a GPU by events in its stream, read when they have passed."""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

Tell = Callable[[float], object]
"""Takes the seconds of a step."""


class StepClock(Protocol):
    """Takes the time of one step after the other."""

    def begin(self) -> None:
        """A step is about to be launched."""
        ...

    def end(self, tell: Tell) -> None:
        """It was launched, and on a CPU has run; `tell` is called with its seconds, now or in a later `poll`."""
        ...

    def poll(self) -> None:
        """Tells of the steps that have run."""
        ...


class HostClock:
    """For a device that computes while the host waits."""

    def __init__(self) -> None:
        self._start = 0.0

    def begin(self) -> None:
        """See `StepClock`."""
        self._start = time.perf_counter()

    def end(self, tell: Tell) -> None:
        """See `StepClock`."""
        tell(time.perf_counter() - self._start)

    def poll(self) -> None:
        """See `StepClock`."""


class EventClock:
    """For a GPU: never waits for it."""

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, Tell]] = deque()
        self._start: torch.cuda.Event | None = None

    def begin(self) -> None:
        """See `StepClock`."""
        self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._start.record()

    def end(self, tell: Tell) -> None:
        """See `StepClock`."""
        assert self._start is not None, "begin() comes first"
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end.record()
        self._pending.append((self._start, end, tell))

    def poll(self) -> None:
        """See `StepClock`."""
        while self._pending and self._pending[0][1].query():  # type: ignore[no-untyped-call]
            start, end, tell = self._pending.popleft()
            tell(start.elapsed_time(end) / 1000)


def clock_for(device: torch.device) -> StepClock:
    """What suits the device."""
    return EventClock() if device.type == "cuda" else HostClock()
