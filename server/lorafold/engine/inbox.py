"""Commands to a thread that owns something: put from anywhere, read between steps, refused once the thread is gone."""

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from lorafold.errors import EngineStopped

T = TypeVar("T")
GONE = "the server is stopping or its engine has failed: send the request to another one"


@dataclass(frozen=True, slots=True)
class Command:
    """Something to do on the engine's thread."""

    run: Callable[[], object]
    refuse: Callable[[EngineStopped], object]
    """Called instead, on any thread, if the engine is gone."""


class Inbox:
    """Nothing that is put in is ever lost: each command is either run or refused."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False

    def put(self, command: Command) -> None:
        """Queues the command, or refuses it if the inbox is closed."""
        with self._gate:
            if not self._closed:
                self._commands.put(command)
                return
        command.refuse(EngineStopped(GONE))

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Queues `function`; the future has its result or its exception."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        def refuse(error: EngineStopped) -> None:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

        self.put(Command(run, refuse))
        return future

    @property
    def empty(self) -> bool:
        """True if nobody waits for anything."""
        return self._commands.empty()

    def run_all(self, *, wait: float | None) -> None:
        """Runs what is queued; if nothing is, waits up to `wait` seconds for the first command, None for ever.

        What is queued meanwhile is left for the next time: commands that bring forth others let steps run between them.
        """
        with contextlib.suppress(queue.Empty):
            self._commands.get(block=wait != 0, timeout=wait).run()
            for _ in range(self._commands.qsize()):
                self._commands.get(block=False).run()

    def close(self) -> None:
        """Refuses what is queued and all that comes later."""
        with self._gate:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get(block=False).refuse(EngineStopped(GONE))
