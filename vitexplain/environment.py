"""Where a figure was measured: device, threads, versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

PACKAGES = ("torch", "timm", "numpy")
ABSENT = "absent"


def environment(device: torch.device, packages: tuple[str, ...] = PACKAGES, optional: tuple[str, ...] = ()) -> dict[str, object]:
    """``device``, ``threads`` and ``versions``, as they stand beside every figure; optional packages where installed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    found = versions(packages) | {package: number for package, number in versions(optional).items() if number != ABSENT}
    listed = ", ".join(f"{package} {number}" for package, number in found.items())
    return {"device": name, "threads": torch.get_num_threads(), "versions": listed}


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Python's version and those of packages, by name; ``"absent"`` for one that is not installed."""
    return {"python": platform.python_version()} | {package: _version(package) for package in packages}


def with_used(packages: tuple[str, ...], model: nn.Module, **used: bool) -> tuple[str, ...]:
    """``packages``, those of ``used`` that are in use, and transformers where the model is one of its own."""
    used["transformers"] = "transformers" in type(model).__module__
    return (*packages, *(name for name, is_used in used.items() if is_used))


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # with the build behind a plus sign
    try:
        return version(package)
    except PackageNotFoundError:
        return ABSENT


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"
