"""The machine and the versions that a measurement was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from typing import Any

import torch

from flexprefill._version import __version__


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Names of this machine, ready for JSON. What it does not tell is None."""
    if device.type != "cuda":
        name = f"CPU, {platform.processor() or platform.machine()}"
        return {"name": name, "threads": torch.get_num_threads(), "driver": None}
    return {"name": torch.cuda.get_device_name(device), "threads": torch.get_num_threads(), "driver": _driver()}


def versions() -> dict[str, str | None]:
    """Versions of the packages that take part. None for a package that is not installed."""
    found: dict[str, str | None] = {
        "flexprefill": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "flash-attn-4"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.split("\n", 1)[0].strip() or None
