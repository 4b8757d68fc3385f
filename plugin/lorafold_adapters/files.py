"""Writes small files so that a reader sees the old one or the new one, whole, even after a power failure."""

import glob
import os
import uuid
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Puts `text` into `file`, in place of what it held, and returns when it is on the disk.

    Raises OSError and then leaves the file as it was. Only if its folder could not be synced, the file may be the new
    one, and may be either after a power failure.
    """
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with beside.open("x", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Returns when the names of the folder's files are on the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(file: Path) -> None:
    """Removes what writers of `file` left that were killed; only while nobody writes it. Raises OSError."""
    for beside in file.parent.glob(f".{glob.escape(file.name)}.{'[0-9a-f]' * 32}"):
        beside.unlink(missing_ok=True)
