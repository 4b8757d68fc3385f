"""Calls that are being answered, so that a server that stops can wait for them and take no more. On the event loop."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from lorafold.errors import EngineStopped


class InFlight:
    """Counts calls."""

    def __init__(self) -> None:
        self._calls = 0
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return self._calls

    @contextmanager
    def one(self) -> Iterator[None]:
        """Around one call. Raises EngineStopped once `close` was called."""
        self.refuse_once_closed()
        self._calls += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._empty.set()

    def refuse_once_closed(self) -> None:
        """Raises EngineStopped once `close` was called."""
        if self._closed:
            raise EngineStopped("the server is stopping: send the request to another one")

    def close(self) -> None:
        """From now on no call is taken; those that are in flight go on."""
        self._closed = True

    async def emptied(self, seconds: float) -> bool:
        """Waits until no call is in flight; False if some still are after so many seconds."""
        if not self._calls:
            return True
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except TimeoutError:
            return False
        return True
