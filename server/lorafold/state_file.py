"""The file that deployments are remembered in: read once at start, written whole at every change, and locked meanwhile.

Nothing is guessed: a file that cannot be understood is refused and stays as it is.
"""

import errno
import json
from collections import Counter
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from lorafold.engine.inbox import GONE
from lorafold.errors import ConfigError, EngineStopped, StateDiskFull, StateNotSaved
from lorafold.own_thread import in_own_thread
from lorafold.state import VERSION, State
from lorafold_adapters.files import remove_unfinished, write_whole

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class StateFile:
    """The state file of one server, or none: then nothing is remembered."""

    def __init__(self, file: Path | None) -> None:
        """Takes the lock, which `close` or the end of the process gives back. Raises ConfigError."""
        self._file = file and file.resolve()
        self._closed = False
        self._lock: FileLock | None = None
        if self._file is not None:
            self._lock = locked(self._file)

    def read(self) -> State:
        """What is remembered; nothing if there is no file yet. Raises ConfigError."""
        if self._file is None:
            return State()
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            return State()
        except OSError as error:
            raise ConfigError(f"cannot read the state file '{self._file}': {error.strerror or error}") from error
        return parsed(content, self._file)

    async def write(self, state: State) -> None:
        """Returns when `state` is on the disk.

        Raises StateNotSaved, or EngineStopped once it is closed; the file then holds what it held (but for what
        `write_whole` says of its folder: the next write puts that right).
        """
        if self._closed:
            raise EngineStopped(GONE)
        if self._file is None:
            return
        try:
            await in_own_thread(write_state, self._file, state)
        except OSError as error:
            kind = StateDiskFull if error.errno in FULL else StateNotSaved
            remedy = "free room there" if kind is StateDiskFull else "make its folder writable"
            raise kind(
                f"nothing was changed, as the state file '{self._file}' cannot be written "
                f"({error.strerror or error}): {remedy}, then try again"
            ) from error

    def close(self) -> None:
        """Gives the lock back; nothing is written from then on."""
        self._closed = True
        if self._lock is not None:
            self._lock.release()


def locked(file: Path) -> FileLock:
    """The lock of `file`, taken; what killed servers left beside it is removed. Raises ConfigError."""
    lock = FileLock(file.with_name(f".{file.name}.lock"), thread_local=False, blocking=False)
    elsewhere = "or name another file as server.state_file"
    if not file.parent.is_dir():
        raise ConfigError(f"the state file's folder '{file.parent}' is not there: make it, {elsewhere}")
    try:
        lock.acquire()
        remove_unfinished(file)
    except Timeout as error:
        raise ConfigError(f"another server uses the state file '{file}': stop that one, {elsewhere}") from error
    except OSError as error:
        raise ConfigError(
            f"the state file '{file}' cannot be locked ({error.strerror or error}): make its folder writable, "
            f'{elsewhere}; "" remembers nothing'
        ) from error
    return lock


def write_state(file: Path, state: State) -> None:
    """Puts `state` into `file`. Raises OSError."""
    write_whole(file, state.model_dump_json(indent=2) + "\n")


def parsed(content: bytes, file: Path) -> State:
    """The state in `content`. Raises ConfigError."""
    try:
        version = version_of(content)
        if version > VERSION:
            raise ConfigError(
                f"the state file '{file}' was written by a newer lorafold (version {version}, this one reads "
                f"{VERSION}): upgrade, or name another file as server.state_file"
            )
        state = State.model_validate_json(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the state file '{file}' is damaged ({first_of(error)}): put a copy of it back, or move it away to start "
            "with the deployments of lorafold.toml alone"
        ) from error
    refuse_doubles(state, file)
    return state


def version_of(content: bytes) -> int:
    """The version that `content` says, 0 if none. Raises ValueError."""
    found = json.loads(content)
    version = found.get("version") if isinstance(found, dict) else None
    return version if isinstance(version, int) else 0


def first_of(error: Exception) -> str:
    """The first thing that is wrong, on one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def refuse_doubles(state: State, file: Path) -> None:
    """Raises ConfigError if a name is there twice."""
    names = Counter([record.name for record in state.deployments] + [entry.name for entry in state.deleted])
    if doubles := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"the state file '{file}' is damaged ('{doubles[0]}' is there twice): put a copy of it back")
