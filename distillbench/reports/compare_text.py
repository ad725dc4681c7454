"""What `distillbench compare` prints: first whether run B reproduces run A, then what differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.text import Text

from distillbench.errors import counted
from distillbench.reports.compare import (
    BETTER,
    GONE,
    LEVEL,
    NEW,
    SAME_VALUE,
    WORSE,
    Change,
    Comparison,
)
from distillbench.reports.differences import RowNamer
from distillbench.reports.terminal_table import fits, new_table, number, plain, put, say
from distillbench.reports.words import listed

MOST_NAMED = 3  # scores that the first line names


def reproduction(found: Comparison) -> str:
    """Whether B reproduces A, in a line: its scores, beyond noise.

    The tests are those of the table, Welch's. Their p are corrected by Holm's method, so that a faithful run is called
    different in 5 % of all comparisons at most, however many scores it has.
    """
    if not found.comparable:
        why = "protocols differ" if found.protocols else "the runs have no row in common"
        return f"Nothing can be compared: {why}."
    tested = [one for one in found.scores if one.p is not None]
    apart = [one for one, sure in zip(tested, holm([one.p or 0.0 for one in tested]), strict=True) if sure]
    apart += [one for one in found.scores if one.verdict == GONE]
    unknown = [one for one in found.scores if one.verdict.endswith("not known")]
    known = len(found.scores) - len(unknown)
    missing = (
        f" {counted(len(found.lost), 'row')} of A failed or {'is' if len(found.lost) == 1 else 'are'} missing in B."
        if found.lost
        else ""
    )
    if found.protocols:
        missing += " Rows with another protocol are not compared."
    if apart:
        name = RowNamer([one.row for one in found.scores], found.labels)
        most = sorted(apart, key=lambda one: one.p or 0.0)
        texts = [f"{found.labels.label(one.name).short} of {name(one.row)} ({_change(one, 0)})" for one in most]
        return (
            f"B does not reproduce A: {len(apart)} of {counted(known, 'score')} "
            f"{'differs' if len(apart) == 1 else 'differ'} beyond noise: {listed(texts, MOST_NAMED)}.{missing}"
        )
    if not known:
        why = "no score is in both" if not found.scores else "they differ, and one seed does not say how much is noise"
        return f"It is not known whether B reproduces A: {why}.{missing}"
    rest = f" Of {counted(len(unknown), 'score')} with one seed it is not known." if unknown else ""
    who = "Of the rows that both have, B reproduces A" if missing else "B reproduces A"
    if not tested:
        return f"{who} exactly: {counted(known, 'score')} {'is' if known == 1 else 'are'} equal.{rest}{missing}"
    widths = [(one.high - one.low) / 2 / abs(one.before) for one in tested if _has_width(one)]  # type: ignore[operator]
    power = f" Half of the intervals are wider than ±{np.median(widths):.0%}." if widths else ""
    return (
        f"{who}: none of {counted(known, 'score')} differs beyond noise "
        f"(Welch's tests, corrected for their number).{power}{rest}{missing}"
    )


def holm(p_values: Sequence[float], level: float = 1 - LEVEL) -> list[bool]:
    """Which hypotheses are rejected, such that any true one is with probability `level` at most (Holm 1979)."""
    order, rejected = np.argsort(p_values, kind="stable"), [False] * len(p_values)
    for place, at in enumerate(order):
        if p_values[at] > level / (len(p_values) - place):
            break
        rejected[at] = True
    return rejected


def _has_width(one: Change) -> bool:
    return one.low is not None and one.high is not None and one.before not in (0, None) and np.isfinite(one.before)


def print_comparison(console: Console, found: Comparison, all_costs: bool = False) -> None:
    """Print what differs, the tables and the conclusion. Costs within the tolerance only with `all_costs`."""
    for line in (reproduction(found), *found.runs):
        say(console, line)
    for title, lines in (("settings", found.settings), ("environment", found.environment)):
        say(console, f"{title}: {'' if lines else 'no difference'}".rstrip())
        for line in lines:
            say(console, f"  {line}")
    lines = found.lost + found.rows
    say(console, f"rows: {found.matched} in both{', and' if lines else ''}")
    for line in lines:
        say(console, f"  {line}")
    for line in found.notes:
        say(console, line)
    name = RowNamer([one.row for one in found.scores + found.costs], found.labels)
    if found.scores:
        _print_changes(console, found.scores, name)
    costs = [one for one in found.costs if all_costs or one.verdict not in (SAME_VALUE, "within tolerance")]
    if costs:
        _print_changes(console, costs, name)
    for line in conclusion(found) if found.comparable else []:
        say(console, line)


def _print_changes(console: Console, changes: list[Change], name: RowNamer) -> None:
    """Print one line for each change, without columns that are empty in all."""
    intervals = any(one.low is not None for one in changes)
    devices, seeds = len({one.device for one in changes if one.device}) > 1, any(one.seeds != (1, 1) for one in changes)
    headings = ["row", "what", *["seeds"] * seeds, "A", "B", "change"]
    text = [True, True, *[False] * seeds, False, False, False]
    headings += [*["95 % interval of B - A"] * intervals, *["device"] * devices, ""]
    text += [True] * (len(headings) - len(text))
    for fold in (False, True):
        table = new_table(headings, text, fold)
        for one in changes:
            width = abs(one.after - one.before) if one.low is None or one.high is None else (one.high - one.low) / 2
            cells = [name(one.row), name.what(one.name)]
            cells += ["{}, {}".format(*one.seeds)] * seeds
            cells += [number(one.before, width), number(one.after, width), _change(one, width)]
            between = "" if one.low is None else f"{number(one.low, width)} to {number(one.high, width)}"
            cells += [between] * intervals + [one.device] * devices + [one.verdict]
            table.add_row(*(Text(plain(cell)) for cell in cells))
        if fold or fits(console, table):
            put(console, table)
            return


def _change(one: Change, width: float) -> str:
    """The change in per cent of the value before, or absolute if that is zero."""
    if one.verdict in (SAME_VALUE, GONE, NEW):
        return "-"
    if one.relative is None:
        return f"{'+' if one.after > one.before else ''}{number(one.after - one.before, width)}"
    return f"{one.relative:+.1%}" if abs(one.relative) >= 0.0005 else f"{one.relative:+.1e}"


def conclusion(found: Comparison) -> list[str]:
    """The conclusion on runs that can be compared, as lines of text."""
    lines = []
    if found.protocols:
        lines.append("Protocols differ: scores of the rows named above are not compared.")
    name = RowNamer([one.row for one in found.scores + found.costs], found.labels)
    worse = found.worse
    for one in worse:
        beyond = "without a value" if one.verdict == GONE else "worse"
        limit = f" by {_change(one, abs(one.after - one.before))}" if one.verdict == WORSE else ""
        lines.append(f"{beyond}: {found.labels.label(one.name).short} of {name(one.row)}{limit}")
    counts = Counter(one.verdict for one in found.scores)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    lines += [f"{len(found.scores)} scores compared: {told}."] if found.scores else []
    counts = Counter(one.verdict for one in found.costs)
    told = f"{counts[WORSE]} worse and {counts[BETTER]} better by more than {found.tolerance:.0%}"
    lines += [f"{len(found.costs)} costs compared: {told}."] if found.costs else []
    tests = sum(one.low is not None for one in found.scores)
    if tests > 1:
        lines.append(
            f"{tests} tests at 95 %: where nothing changed, {tests * (1 - LEVEL):.1f} of them are expected beyond "
            "noise."
        )
    if found.lost or worse:
        parts = [f"{len(found.lost)} rows lost"] * bool(found.lost) + [f"{len(worse)} values worse"] * bool(worse)
        return [*lines, f"Worse in B: {', '.join(parts)}."]
    unknown = sum(one.verdict.endswith("not known") for one in found.scores)
    aside = f" Of {unknown} scores it is not known: train several seeds (seed=0,1,2)." if unknown else ""
    return [*lines, f"Nothing in B is worse beyond noise.{aside}"]
