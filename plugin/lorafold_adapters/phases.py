"""How long each part of a change of the weights takes. Knows nothing of what is changed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Adds up the seconds of named parts, until they are taken."""

    def __init__(self, device: torch.device) -> None:
        """`device`: what the work runs on. Every part waits for its end."""
        self._device = device
        self._seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around one part; not to be nested."""
        start = time.perf_counter()
        try:
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by name since the last time."""
        taken, self._seconds = self._seconds, {}
        return taken
