"""Remembers a base's fingerprint by the identity of its files, so that a large model is not hashed at every start.

A file counts as the same while its path, size, inode and times of change are. A cache that cannot be read or written
is never an error: the fingerprint is computed again. Call `model_files` before and after loading: if the two differ,
what is in memory may be neither, and is not remembered.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from lorafold_adapters.files import write_whole
from lorafold_adapters.identity import Fingerprint, digest_of

VERSION = 1
PATTERNS = ("*.json", "*.safetensors")
FileIdentity = tuple[str, int, int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheEntry:
    """Where the fingerprint of one base is remembered, or nowhere."""

    file: Path | None
    """None: the base has no files that could be told apart; nothing is remembered."""
    key: str
    """What the fingerprint depends on, as JSON."""

    def read(self) -> Fingerprint | None:
        """The fingerprint, unless there is none or the file is damaged."""
        if self.file is None:
            return None
        try:
            content = json.loads(self.file.read_bytes())
            found = Fingerprint(**content["fingerprint"])
            good = content["key"] == self.key and digest_of(found.tensors) == found.digest
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return found if good else None

    def write(self, fingerprint: Fingerprint) -> None:
        """Remembers the fingerprint if it can."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                content = {"key": self.key, "fingerprint": dataclasses.asdict(fingerprint)}
                write_whole(self.file, json.dumps(content))


def cache_entry(
    folder: Path, model: PreTrainedModel, before: list[FileIdentity], after: list[FileIdentity]
) -> CacheEntry:
    """The entry in `folder` for `model`, whose files were `before` and `after` it was loaded."""
    parts: dict[str, Any] = {
        "version": VERSION,
        "transformers": transformers.__version__,
        "class": type(model).__qualname__,
        "dtype": str(model.dtype),
        "quantisation": quantisation_of(model),
        "files": after,
    }
    key = json.dumps(parts, sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()
    return CacheEntry(file=folder / f"{name}.json" if after and before == after else None, key=key)


def quantisation_of(model: PreTrainedModel) -> str | None:
    """How the weights were quantised, and by which bitsandbytes; None if they were not."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    installed = importlib.util.find_spec("bitsandbytes") is not None
    return f"{config} {importlib.metadata.version('bitsandbytes') if installed else ''} {model.device.type}"


def model_files(model: str) -> list[FileIdentity]:
    """Every file that a model is loaded from; none if it has no safetensors on this machine.

    `model` is a folder or a name on the hub, which is looked up among the snapshots that were downloaded.
    """
    try:
        config = cached_file(model, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if config is None:
            return []
        folder = Path(config).parent.resolve()
        found = [identity_of(file) for pattern in PATTERNS for file in sorted(folder.glob(pattern))]
    except (OSError, ValueError):
        return []
    return found if any(path.endswith(".safetensors") for path, *_ in found) else []


def identity_of(file: Path) -> FileIdentity:
    """Path, size, inode and both times of change; the time of the inode changes even where a copy sets the other."""
    status = file.stat()
    return (str(file), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
