"""`lorafold.json`: what an exported checkpoint was made from, written into its folder."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.compose import Composition
from lorafold_adapters.fidelity import Fidelity
from lorafold_adapters.identity import Fingerprint

PROVENANCE_FILE = "lorafold.json"
FORMAT = 1
PACKAGES = ("lorafold", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One adapter that went in."""

    name: str
    """What people call it."""
    digest: str
    kind: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where base and adapter come from, as far as they do not say it themselves."""

    base_name: str = ""
    """What people call the base."""
    sources: tuple[Source, ...] = ()
    """The adapters that were composed; the adapter itself if there are none."""
    method: str | None = None
    """How they were composed."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else decided the result: density, seed, ..."""


def origin(base_name: str, sources: Iterable[Source], spec: Composition | None) -> Origin:
    """Where an adapter of one part, or a composition by `spec`, comes from."""
    if spec is None:
        return Origin(base_name=base_name, sources=tuple(sources))
    options = {key: value for key in ("density", "seed", "rank") if (value := getattr(spec, key)) is not None}
    return Origin(base_name=base_name, sources=tuple(sources), method=spec.method, options=options)


def provenance(bound: BoundAdapter, base: Fingerprint, origin: Origin, fidelity: Fidelity) -> dict[str, Any]:
    """Everything that decides the tensors, and how well they hold the adapter; for JSON."""
    sources = origin.sources or (Source(name="", digest=bound.digest, kind=bound.kind),)
    return {
        "format": FORMAT,
        "base": {"name": origin.base_name, "fingerprint": base.digest, "dtype": base.dtype},
        "adapter_digest": bound.digest,
        "adapters": [asdict(source) for source in sources],
        "method": origin.method,
        "options": dict(origin.options),
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
