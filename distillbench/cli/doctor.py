"""``distillbench doctor``: whether this environment, this device and this results folder are in order.

A check is a function of an :class:`Installation` that yields findings. A check that raises becomes a finding itself,
and the other checks still run. Measuring (``find_*``) is separate from judging (``judge_*``), so that every verdict can
be tested on made-up measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distillbench.cli.doctor_devices import check_device, check_threads
from distillbench.cli.doctor_disk import check_disk, check_downloads
from distillbench.cli.doctor_findings import Check, Finding, Installation, Level
from distillbench.cli.doctor_numerics import check_numerics
from distillbench.cli.doctor_packages import check_packages, check_torch
from distillbench.cli.doctor_plugins import check_networks, check_plugins
from distillbench.cli.doctor_results import check_caches, check_records, check_states, check_students
from distillbench.errors import counted
from distillbench.evaluation.pretrained_weights import weights_folder
from distillbench.registry import Registry
from distillbench.system.progress import Progress
from distillbench.system.subprocesses import in_words

if TYPE_CHECKING:
    from rich.console import Console

STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "wrong": "bold red"}
CHECKS: list[tuple[str, Check]] = [
    ("packages", check_packages),
    ("torch", check_torch),
    ("device", check_device),
    ("threads", check_threads),
    ("float32", check_numerics),
    ("disk", check_disk),
    ("plugins", check_plugins),
    ("networks", check_networks),
    ("downloads", check_downloads),
    ("caches", check_caches),
    ("records", check_records),
    ("students", check_students),
    ("states", check_states),
]


def examine(
    registry: Registry, results_dir: Path, console: Console, thorough: bool = False,
    checks: Sequence[tuple[str, Check]] | None = None,
) -> bool:  # fmt: skip
    """Run every check and print its findings as they come. True if nothing is wrong; warnings do not count."""
    installation = Installation(registry, results_dir, weights_folder(), thorough, Progress(console))
    levels: dict[Level, int] = dict.fromkeys(STYLES, 0)
    for name, check in CHECKS if checks is None else checks:
        for finding in findings(check, installation):
            levels[finding.level] += 1
            print_finding(console, name, finding)
    console.print(f"{counted(levels['wrong'], 'error')}, {counted(levels['warning'], 'warning')}", highlight=False)
    return not levels["wrong"]


def findings(check: Check, installation: Installation) -> list[Finding]:
    """All that a check finds; an exception in it is one more finding."""
    found = []
    try:
        for finding in check(installation):
            found.append(finding)
    except Exception as error:  # a broken installation can raise anything
        found.append(Finding("wrong", f"this could not be checked: {in_words(error)}"))
    return found


def print_finding(console: Console, name: str, finding: Finding) -> None:
    """Level, name of the check and line; below them the advice."""
    from rich.table import Table
    from rich.text import Text

    from distillbench.reports.terminal_table import put

    drawn = Table.grid(padding=(0, 1, 0, 0))
    drawn.add_column(min_width=7, no_wrap=True)
    drawn.add_column(min_width=10, no_wrap=True)
    drawn.add_column(overflow="fold")
    drawn.add_row(Text(finding.level, STYLES[finding.level]), Text(name), Text(_plain(finding.line)))
    if finding.advice:
        drawn.add_row("", "", Text(f"to do: {_plain(finding.advice)}"))
    put(console, drawn)


def _plain(text: str) -> str:
    """On one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in text)
