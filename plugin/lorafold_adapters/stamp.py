"""The stamp that binds an adapter to the content of the base it was trained on, and its comparison with a live base.

Lies beside `adapter_config.json`. Names the adapter's own digest, so that a stamp that was copied or is older
than the adapter is found out. Knows nothing about what a server does with an adapter that has none.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import nn

from lorafold_adapters.checkpoint import Checkpoint
from lorafold_adapters.errors import AdapterCorrupt, AdapterUnsupported, BaseMismatch
from lorafold_adapters.files import write_whole
from lorafold_adapters.identity import CASTS, Fingerprint, cast_digest

STAMP_FILE = "lorafold_stamp.json"
VERSION = 1
DIGEST = re.compile(r"[0-9a-f]{64}")
AGAIN = "stamp the adapter again with 'lorafold stamp --force'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """Which base one adapter was trained on."""

    adapter: str
    """Content digest of the adapter."""
    base: str
    """Fingerprint of the base as its checkpoint is."""
    dtype: str
    """The dtype of most of that base's weights."""
    casts: Mapping[str, str]
    """Fingerprints of that base cast to one dtype, by dtype: they tell another dtype from other weights."""
    name: str = ""
    """What people call the base; decides nothing."""
    version: int = VERSION
    """Of this format."""


class Match(StrEnum):
    """How the base that an adapter was trained on compares with the one that is there."""

    SAME = "same"
    OTHER_DTYPE = "other dtype"
    OTHER_BASE = "other base"
    UNSTAMPED = "unstamped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a comparison found."""

    match: Match
    sentence: str
    """The fact and the remedy, for people."""


def make_stamp(checkpoint: Checkpoint, model: nn.Module, base: Fingerprint, name: str = "") -> Stamp:
    """The stamp that says `checkpoint` was trained on `model`, whose fingerprint is `base`; reads all its tensors."""
    casts = {dtype: base.casts.get(dtype) or cast_digest(model, dtype) for dtype in CASTS}
    return Stamp(adapter=checkpoint.digest, base=base.digest, dtype=base.dtype, casts=casts, name=name)


def write_stamp(folder: Path, stamp: Stamp) -> Path:
    """Writes the stamp into the adapter's folder, in place of one that is there. Raises OSError."""
    file = folder / STAMP_FILE
    write_whole(file, json.dumps(dataclasses.asdict(stamp), indent=2) + "\n")
    return file


def read_stamp(folder: Path) -> Stamp | None:
    """The stamp in the adapter's folder; None if there is none. Raises AdapterCorrupt or AdapterUnsupported."""
    file = folder / STAMP_FILE
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterCorrupt(f"{file} cannot be read as JSON ({error}): {AGAIN}") from error
    if isinstance(content, dict) and isinstance(version := content.get("version"), int) and version > VERSION:
        raise AdapterUnsupported(f"{file} has format {version}, this version reads up to {VERSION}: upgrade lorafold")
    if not is_stamp(content):
        raise AdapterCorrupt(f"{file} is no stamp: {AGAIN}")
    return Stamp(**content)


def is_stamp(content: Any) -> bool:
    """True for what `write_stamp` may have written."""
    required = {field.name for field in dataclasses.fields(Stamp)}
    if not isinstance(content, dict) or content.keys() != required or content["version"] != VERSION:
        return False
    casts = content["casts"]
    if not isinstance(casts, dict) or casts.keys() != CASTS.keys():
        return False
    digests = [content["adapter"], content["base"], *casts.values()]
    words = [content["dtype"], content["name"]]
    return all(isinstance(value, str) for value in words + digests) and all(map(DIGEST.fullmatch, digests))


def compare(stamp: Stamp | None, base: Fingerprint, cast: Callable[[str], str], adapter: str) -> Finding:
    """Compares a stamp with a base; `adapter` is its name for people.

    `cast` gives the base's fingerprint as a dtype. It is called only where the answer depends on it.
    """
    if stamp is None:
        sentence = "nothing says which base it was trained on: stamp it with 'lorafold stamp ADAPTER --base MODEL'"
        return Finding(match=Match.UNSTAMPED, sentence=f"adapter '{adapter}' has no stamp, so {sentence}")
    if stamp.base == base.digest:
        return Finding(match=Match.SAME, sentence=f"adapter '{adapter}' was trained on this base")
    if any(stamp.casts[dtype] == (base.casts.get(dtype) or cast(dtype)) for dtype in decisive(stamp, base)):
        sentence = f"was trained on this base as {stamp.dtype}, and this server holds it as {base.dtype}"
        remedy = f"answers may differ slightly; load the base as {stamp.dtype} to avoid it"
        if stamp.dtype == base.dtype:
            sentence, remedy = "was trained on this base before it was quantised", "answers may differ slightly"
        return Finding(match=Match.OTHER_DTYPE, sentence=f"adapter '{adapter}' {sentence}: {remedy}")
    trained = f"{stamp.base[:12]}… ({stamp.name})" if stamp.name else f"{stamp.base[:12]}…"
    remedy = "retrain it or start the server with that base"
    sentence = f"adapter '{adapter}' was trained on base {trained}, this server holds {base.digest[:12]}…: {remedy}"
    return Finding(match=Match.OTHER_BASE, sentence=sentence)


def decisive(stamp: Stamp, base: Fingerprint) -> list[str]:
    """The dtypes in which equal casts mean the same checkpoint: the one that is there, then the one trained with.

    Casting to float32 loses nothing, so it finds nothing that casting the stamp's base the other way does not.
    """
    both = [base.dtype, *([stamp.dtype] if stamp.dtype not in (base.dtype, "float32") else [])]
    return [dtype for dtype in both if dtype in CASTS]


def own_stamp(checkpoint: Checkpoint) -> Stamp | None:
    """The adapter's stamp; None if it has none. Raises AdapterCorrupt for another's, and what `read_stamp` raises."""
    stamp = read_stamp(checkpoint.path)
    if stamp is not None and stamp.adapter != checkpoint.digest:
        raise AdapterCorrupt(
            f"the stamp of adapter '{checkpoint.path.name}' was made for adapter {stamp.adapter[:12]}…, this one is "
            f"{checkpoint.digest[:12]}…: stamp it again with 'lorafold stamp'"
        )
    return stamp


def check_stamp(checkpoint: Checkpoint, base: Fingerprint, cast: Callable[[str], str]) -> Finding:
    """What the adapter's stamp says about this base: the same, another dtype of it, or no stamp.

    Raises BaseMismatch for another base; AdapterCorrupt or AdapterUnsupported for a stamp that cannot be used.
    """
    finding = compare(own_stamp(checkpoint), base, cast, checkpoint.path.name)
    if finding.match is Match.OTHER_BASE:
        raise BaseMismatch(finding.sentence)
    return finding
