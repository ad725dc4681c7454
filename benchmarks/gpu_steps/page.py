"""The page that benchmarks/gpu.py writes: verdicts first, then the figures, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tabulate import tabulate

SYMBOLS = {"ok": "ok", "look": "**look**", "wrong": "**WRONG**", "skipped": "not run"}


def page(report: Mapping[str, Any]) -> str:
    """Of what the JSON file holds."""
    return "\n\n".join(_parts(report)) + "\n"


def summary(report: Mapping[str, Any]) -> str:
    """Such as "41 ok, 2 look, 0 wrong, 3 not run"."""
    counted = Counter(verdict["level"] for step in report["steps"].values() for verdict in step["verdicts"])
    return ", ".join(
        f"{counted[level]} {words}" for level, words in zip(SYMBOLS, ("ok", "look", "wrong", "not run"), strict=True)
    )


def _parts(report: Mapping[str, Any]) -> Iterator[str]:
    about = report["steps"].get("environment", {}).get("data", {}).get("about", {})
    yield f"# {about.get('device', report['device'])}"
    if report["mode"] != "gpu":
        yield f"**This was a rehearsal ({report['mode']}): its figures say nothing about a GPU.**"
    words = ", ".join(
        f"{name} {value}" for name, value in about.items() if value and name not in ("device", "architectures")
    )
    yield f"`python benchmarks/gpu.py`, {report['date']}, {report['minutes']:.1f} minutes: {summary(report)}.\n{words}."
    for name, step in report["steps"].items():
        yield f"## {name}"
        yield f"{step['end']}, {step['seconds']:.0f} s."
        rows = [
            [_cell(x) for x in (SYMBOLS[v["level"]], v["what"], v["figure"], v["expected"], v["advice"])]
            for v in step["verdicts"]
        ]
        if rows:
            yield tabulate(
                rows, ("verdict", "what", "figure", "expected", "to do"), tablefmt="github", disable_numparse=True
            )
    yield from _step_times(report)


def _step_times(report: Mapping[str, Any]) -> Iterator[str]:
    found = [(n.removeprefix("speed-"), s["data"]["steps"]) for n, s in report["steps"].items() if "steps" in s["data"]]
    if not found:
        return
    batch = next(s["data"]["batch"] for s in report["steps"].values() if "batch" in s["data"])
    yield "## Step times"
    yield f"Batch {batch}. `share` is of the device's peak for that precision: the data sheet's, or as measured."
    rows = [
        (
            setting, method, f"{r['median_ms']:.2f}", f"{r['images_per_second']:,.0f}",
            "" if r["share"] is None else f"{r['share']:.0%}",
            "" if r["predicted_ms"] is None else f"{r['predicted_ms']:.1f}",
            "" if r["peak_mib"] is None else f"{r['peak_mib']:,.0f}",
        )
        for setting, methods in found for method, r in methods.items()
    ]  # fmt: skip
    headers = ("setting", "method", "ms", "images/s", "share", "roofline ms", "peak MiB")
    yield tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _cell(text: str) -> str:
    """Without what would end a cell of a table."""
    return " ".join(str(text).replace("|", "&#124;").split())
