"""The events of one request on their way from the engine's thread to its stream, and not more of them than it reads."""

import asyncio
import threading
from collections.abc import Callable

from lorafold.requests import Event

MAX_UNREAD = 256
"""Events that may wait for a client; beyond, its request pauses until half of them are read."""


class Mailbox:
    """Made on the event loop that takes the events."""

    def __init__(self, resume: Callable[[], None], limit: int = MAX_UNREAD) -> None:
        """`resume` is called on the event loop once there is room again after `stalled` was true."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._resume = resume
        self._limit = limit
        self._lock = threading.Lock()
        self._unread = 0
        self._stalled = False

    def put(self, event: Event) -> None:
        """Any thread."""
        with self._lock:
            self._unread += 1
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def stalled(self) -> bool:
        """True if the client is so far behind that the request should pause. Any thread."""
        with self._lock:
            full = self._unread >= self._limit
            self._stalled = self._stalled or full  # Until `take` resumes: the request's other rows ask as well.
            return full

    async def take(self) -> Event:
        """The next event."""
        event = await self._events.get()
        with self._lock:
            self._unread -= 1
            room = self._stalled and self._unread <= self._limit // 2
            self._stalled = self._stalled and not room
        if room:
            self._resume()
        return event
