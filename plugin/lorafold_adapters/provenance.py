"""`lorafold.json`: what an exported checkpoint was made from, written into its folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.fidelity import Fidelity
from lorafold_adapters.identity import Fingerprint

PROVENANCE_FILE = "lorafold.json"
FORMAT = 1
PACKAGES = ("lorafold", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One adapter of a composition."""

    name: str
    digest: str
    kind: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """How several adapters became one."""

    method: str
    sources: tuple[Source, ...]
    options: Mapping[str, Any]
    """Whatever else decided the result: density, seed, ..."""


def provenance(
    bound: BoundAdapter, base: Fingerprint, base_name: str, composition: Composition | None, fidelity: Fidelity
) -> dict[str, Any]:
    """Everything that decides the tensors, and how well they hold the adapter; for JSON."""
    own = Source(name=bound.checkpoint.path.name, digest=bound.digest, kind=bound.kind)
    sources = (own,) if composition is None else composition.sources
    return {
        "format": FORMAT,
        "base": {"name": base_name, "fingerprint": base.digest, "dtype": base.dtype},
        "adapters": [
            {"name": source.name, "digest": source.digest, "kind": source.kind, "weight": source.weight}
            for source in sources
        ],
        "method": None if composition is None else composition.method,
        "options": {} if composition is None else dict(composition.options),
        "dtype": base.dtype,
        "fidelity": fidelity_facts(fidelity),
        "versions": {package: installed(package) for package in PACKAGES},
    }


def provenance_text(facts: Mapping[str, Any]) -> str:
    """The file's content."""
    return json.dumps(facts, indent=2) + "\n"


def fidelity_facts(fidelity: Fidelity) -> dict[str, float]:
    """The three numbers, for JSON."""
    return {
        "delta_over_weight": fidelity.delta_over_weight,
        "delta_error": fidelity.delta_error,
        "unchanged_share": fidelity.unchanged_share,
    }


def installed(package: str) -> str:
    """A package's version; empty if it is not installed as one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
