"""What a number was measured on: hardware, versions, command, commit, model shape."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lorafold_adapters.provenance import installed


def describe(device: torch.device, model: PreTrainedModel) -> dict[str, Any]:
    """Everything that goes beside a result."""
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters_m": round(model.num_parameters() / 1e6, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("torch", "transformers", "peft", "lorafold")},
        "commit": commit(),
        "command": " ".join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def cpu_name() -> str:
    """Model name and number of the processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.machine()


def commit() -> str:
    """The commit measured, or 'unknown' outside a checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
