"""Writes small files so that a reader sees the old one or the new one, whole, even after a power failure."""

import os
import uuid
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Puts `text` into `file`, in place of what it held. Raises OSError and then leaves the file as it was."""
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with beside.open("x", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
