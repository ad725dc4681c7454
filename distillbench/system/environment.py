"""The environment of a run: versions, commit, hardware. No host name, user name or path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from distillbench._version import __version__

PACKAGES = ("torch", "torchvision", "diffusers", "timm", "numpy", "pandas", "scikit-learn", "torch-fidelity")


@cache
def environment(device: str, threads: int) -> dict[str, Any]:
    """Versions, git commit of the source (None for an installed wheel) and hardware, as plain values."""
    return {
        "distillbench": __version__,
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if device != "cpu" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "memory_mib": psutil.virtual_memory().total // 2**20,
        "gpu": None if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": threads,
    } | ({"rocm": torch.version.hip} if device != "cpu" and torch.version.hip else {})


def device_name(device: str) -> str:
    """The value of the column `device`: cpu or cuda, and the model."""
    return f"cpu ({_cpu()})" if device == "cpu" else f"cuda ({torch.cuda.get_device_name(device)})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True, check=True).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None
