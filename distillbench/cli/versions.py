"""The line of ``distillbench --version``: what a report of a fault needs. Torch is not imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
from pathlib import Path

import click

from distillbench._version import __version__


def version_line() -> str:
    """Such as "distillbench 0.1.0 (commit 1a2b3c4, Python 3.11.7, torch 2.5.1, CUDA 12.4)"."""
    parts = [_commit(), f"Python {platform.python_version()}", *_torch()]
    return f"distillbench {__version__} ({', '.join(filter(None, parts))})"


def print_version(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
    """Print the line and end, if it is asked for."""
    if asked and not ctx.resilient_parsing:
        click.echo(version_line())
        ctx.exit()


def _commit() -> str:
    """The commit of the checkout, "" without one."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return ""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True, check=True).stdout

    try:
        changed = " with changes" if git("status", "--porcelain", "--untracked-files=no").strip() else ""
        return f"commit {git('rev-parse', '--short', 'HEAD').strip()}{changed}"
    except (OSError, subprocess.CalledProcessError):
        return ""


def _torch() -> list[str]:
    """The versions of torch, and of the CUDA or ROCm that it was built for, from its file version.py."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ["torch is not installed"]
    found = [f"torch {importlib.metadata.version('torch')}"]
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return found
    names = {"cuda": "CUDA", "hip": "ROCm"}
    built = {name: re.search(rf"^{name}\b.*= '(.+)'", text, re.MULTILINE) for name in names}
    return found + ([f"{names[name]} {match[1]}" for name, match in built.items() if match] or ["no CUDA"])
