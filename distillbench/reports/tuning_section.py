"""The section *Tuning* of an HTML report: how good the best of k trials is, what mattered, and what the search cost.

Its panels are small drawings as plain data, which ``templates/tuning.html.j2`` writes as SVG: they need no script, and
there may be a hundred of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from distillbench.errors import counted
from distillbench.records.statistics import ARROWS
from distillbench.records.tuning_statistics import FEWEST_TRIALS, best_of, sensitivity
from distillbench.reports.labels import Labels
from distillbench.reports.runs import RunData
from distillbench.reports.tuning_data import AFTER, COSTS, TRIALS, Trial, Trials, read_trials
from distillbench.reports.words import number

PROTOCOLS = {
    "equal_trials": "equal_trials: every method has the same number of trials of the same budget",
    "self_tuned": "self_tuned: every method spends the same total budget, trials included",
    "defaults": "defaults: nothing is searched",
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 232, 140, 46, 10, 10, 20  # of a panel, and around its axes
WIDE = 4.0  # largest value over smallest, from which on an axis is logarithmic
MOST_POINTS = 64  # of a curve
MOST_CHOICES = 5  # different numbers that are shown side by side, like choices
CHARACTER = 5.6  # width of a character on an axis

Point = tuple[float, float]


@dataclass(frozen=True)
class Dot:
    """A trial in a panel. `kind`: "best", "lost" (without a score, at the worst end) or ""."""

    x: float
    y: float
    title: str
    kind: str = ""


@dataclass(frozen=True)
class Panel:
    """A small drawing, in pixels from its upper left corner. `line`, `band` and `others` are points of SVG."""

    title: str
    notes: list[str]
    dots: list[Dot]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    line: str = ""
    band: str = ""
    others: list[str] = field(default_factory=list)
    alt: str = ""


@dataclass(frozen=True)
class TuningSection:
    """What the page shows of a search of one run. `settings`: by method, a panel for each of its settings.

    `trains`: False for the search of settings of sampling, which trains nothing.
    """

    id: str
    trains: bool
    run: str
    score: str
    sentences: list[str]
    problems: list[str]
    curves: list[Panel]
    settings: list[tuple[str, list[Panel]]]
    table: list[dict[str, str]]


def tuning_sections(runs: Sequence[RunData], names: Sequence[str]) -> list[TuningSection]:
    """A section for each search of which a run's folder has trials: that of training, and that after it."""
    sections: list[TuningSection] = []
    for name, run in zip(names, runs, strict=True):
        for kind in (TRIALS, AFTER):
            trials = read_trials(run.folder, run.columns, kind)
            if trials is not None:
                strangers = _strangers(run, trials) if kind == TRIALS else []
                place = f"tuning-{len(sections) + 1}"
                sections.append(_section(place, kind == TRIALS, name, _labelled(trials, run.labels), strangers))
    return sections


def _labelled(trials: Trials, labels: Labels) -> Trials:
    """The trials with the names of methods and of the score for people. Methods with one label keep their names."""
    shown = {name: labels.method_label(name).short for name in trials.methods}
    if len(set(shown.values())) < len(shown):
        shown = {name: name for name in shown}
    methods = {shown[name]: own for name, own in trials.methods.items()}
    return dataclasses.replace(trials, metric=labels.label(trials.metric).short, methods=methods)


def _strangers(run: RunData, trials: Trials) -> list[str]:
    """What the rows of the run say that does not fit the trials in its folder, such as those of an earlier search."""
    if "tuning_trials" not in run.table or not trials.methods:
        return []
    tuned = run.table[run.table["tuning_trials"].notna()]
    said = {str(name): int(count) for name, count in zip(tuned["method"], tuned["tuning_trials"], strict=True)}
    if len(run.table) and not any(said.values()):
        return ["the trials are of another search: the rows of this run were not tuned"]
    differ = [
        f"{run.labels.method_label(name).short}: {said[name]}, not {len(own)}"
        for name, own in trials.methods.items()
        if name in said and said[name] != len(own)
    ]
    return [f"the rows of this run are of other numbers of trials ({'; '.join(differ)})"] if differ else []


def _section(id_: str, trains: bool, run: str, trials: Trials, strangers: Sequence[str]) -> TuningSection:
    problems = [*trials.problems, *strangers]
    counts = {len(own) for own in trials.methods.values()}
    if trials.protocol == "equal_trials" and len(counts) > 1:
        problems.append(f"the methods have {min(counts)} to {max(counts)} trials: the search has not ended")
    directed = trials.direction in ("lower", "higher")
    if trials.methods and not directed:
        problems.append(f"it is not known whether lower or higher {trials.metric} is better: there are no curves")
    at = f" at NFE {trials.nfe}" if trials.nfe is not None else ""
    score = f"{trials.metric} {ARROWS.get(trials.direction, '')}".strip() + at
    return TuningSection(
        id=id_,
        trains=trains,
        run=run,
        score=score,
        sentences=_sentences(trials, score, trains) if trials.methods else [],
        problems=problems,
        curves=_curves(trials) if directed else [],
        settings=[(name, panels) for name, own in trials.methods.items() if (panels := _of_settings(own, trials))],
        table=[_row(name, own, trials, trains) for name, own in trials.methods.items()],
    )


def _sentences(trials: Trials, score: str, trains: bool) -> list[str]:
    every = [trial for own in trials.methods.values() for trial in own]
    lost = sum(trial.score is None for trial in every)
    without = f", {lost} of them without a score" if lost else ""
    told = (
        "The tables have new trainings of the best settings, on seeds and noise that the search did not see."
        if trains
        else "Only sampling differs in these trials: students of the first search sample, and nothing was trained. "
        "The tables have the best settings, with new trainings and noise that the search did not see."
    )
    found = [
        f"{counted(len(every), 'trial')} of {counted(len(trials.methods), 'method')}{without}, by {score}.",
        f"Settings were chosen by these scores, so the best of them flatters its method. {told}",
    ]
    return [f"Protocol {PROTOCOLS.get(trials.protocol, trials.protocol)}.", *found] if trials.protocol else found


# --- the table -------------------------------------------------------------------------------------------------------


def _row(name: str, own: Sequence[Trial], trials: Trials, trains: bool) -> dict[str, str]:
    best = _best(own, trials.direction)
    statuses = [trial.status for trial in own if trial.status != "ok"]
    row = {
        "method": name,
        "trials": f"{len(own):,}",
        "not ok": ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)),
        "first trial": number(own[0].score) if own else "",
        "best": number(best.score) if best else "",
        "of trial": str(best.number) if best else "",
    }
    for cost, heading in zip(COSTS, ("images", "seconds", "joules"), strict=True) if trains else ():
        row[heading] = _cost([trial.costs[cost] for trial in own])
    row["best settings"] = _in_words(best) if best else ""
    return row


def _cost(values: Sequence[float | None]) -> str:
    """The sum of what was measured, and for how many trials nothing was."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    missing = len(values) - len(known)
    total = sum(known)
    text = f"{total:,.0f}" if total >= 100 else number(total)
    return f"{text} (without {counted(missing, 'trial')})" if missing else text


def _best(own: Sequence[Trial], direction: str) -> Trial | None:
    """The trial with the best score, the first of equal ones."""
    scored = [trial for trial in own if trial.score is not None]
    if not scored or direction not in ("lower", "higher"):
        return None
    sign = 1 if direction == "lower" else -1
    return min(scored, key=lambda trial: (sign * (trial.score or 0.0), trial.number))


def _in_words(trial: Trial) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in trial.settings.items())


# --- the score over the number of trials -----------------------------------------------------------------------------


def _curves(trials: Trials) -> list[Panel]:
    """A panel for each method, all with the same axes: its own curve and band, and the others' curves."""
    found = {name: best_of([trial.score for trial in own], trials.direction) for name, own in trials.methods.items()}
    found = {name: curve for name, curve in found.items() if len(curve)}
    if not found:
        return []
    scores = [trial.score for own in trials.methods.values() for trial in own if trial.score is not None]
    y = _Axis.over(scores, HEIGHT - BOTTOM, TOP)
    x = _Axis(1.0, float(max(2, *(len(own) for own in trials.methods.values()))), False, LEFT, WIDTH - RIGHT)
    lines, bands = {}, {}
    for name, curve in found.items():
        kept = curve.iloc[np.unique(np.linspace(0, len(curve) - 1, min(len(curve), MOST_POINTS)).round().astype(int))]
        k = kept["trials"].tolist()
        lines[name] = _points((x.at(t), y.at(v)) for t, v in zip(k, kept["mean"], strict=True))
        ends = [*zip(k, kept["q05"], strict=True), *reversed([*zip(k, kept["q95"], strict=True)])]
        bands[name] = _points((x.at(t), y.at(v)) for t, v in ends)
    panels = []
    for name, own in trials.methods.items():
        if name not in found:
            panels.append(Panel(name, ["no trial has a score"], [], [], [], alt=f"{name}: no trial has a score"))
            continue
        said = _expected(found[name])
        dots = _dots(own, trials, lambda trial, at: x.at(at + 1.0), y)
        ticks = [(x.start, "1"), (x.end, f"{x.high:.0f}")]
        others = [line for other, line in lines.items() if other != name]
        alt = f"{name}: expected best score {said}"
        panels.append(Panel(name, [said], dots, ticks, y.ticks(), lines[name], bands[name], others, alt))
    return panels


def _expected(curve: pd.DataFrame) -> str:
    """The mean of the best after one trial, half of them and all, in words."""
    after = sorted({1, (len(curve) + 1) // 2, len(curve)})
    means = ", ".join(number(curve["mean"].iloc[k - 1]) for k in after)
    return f"{means} after {', '.join(map(str, after))} {'trial' if after == [1] else 'trials'}"


def _dots(own: Sequence[Trial], trials: Trials, x_of: Callable[[Trial, int], float], y: _Axis) -> list[Dot]:
    """A dot for each trial; those without a score at the worse end of the axis, the best one last, on top."""
    best = _best(own, trials.direction)
    worst = y.end if trials.direction != "higher" else y.start
    dots = []
    for at, trial in enumerate(own):
        text = f"trial {trial.number}: {trial.status if trial.score is None else number(trial.score)}"
        reason = f" ({trial.reason})" if trial.reason and trial.score is None else ""
        kind = "lost" if trial.score is None else "best" if trial is best else ""
        place = worst if trial.score is None else y.at(trial.score)
        dots.append(Dot(round(x_of(trial, at), 1), round(place, 1), f"{text}{reason}; {_in_words(trial)}", kind))
    return sorted(dots, key=lambda dot: dot.kind == "best")


# --- the sensitivity to settings -------------------------------------------------------------------------------------


def _of_settings(own: Sequence[Trial], trials: Trials) -> list[Panel]:
    """A panel for each setting that changed, those first on which the score depends most."""
    scores = [trial.score for trial in own if trial.score is not None]
    names = list(dict.fromkeys(name for trial in own for name in trial.settings))
    if not scores:
        return []
    y = _Axis.over(scores, HEIGHT - BOTTOM, TOP)
    found = []
    for name in names:
        having = [trial for trial in own if name in trial.settings]
        values = [trial.settings[name] for trial in having]
        if len({_text(value) for value in values}) < 2:
            continue
        share, notes = 0.0, []
        if trials.direction in ("lower", "higher"):
            part = sensitivity(values, [trial.score for trial in having], trials.direction)
            if part is not None:
                share = part.share
                notes = [f"{part.share:.0%} (by chance {part.by_chance:.0%}), p = {part.p_value:.2g}"]
            elif len(having) < FEWEST_TRIALS:
                notes = [f"fewer than {FEWEST_TRIALS} trials"]
        place, ticks = _placed(values)
        dots = _dots(having, trials, lambda trial, _, name=name, place=place: place(trial.settings[name]), y)  # type: ignore[misc]
        found.append((share, Panel(name, notes, dots, ticks, y.ticks(), alt=f"scores over {name}: {' '.join(notes)}")))
    return [panel for _, panel in sorted(found, key=lambda one: -one[0])]


def _placed(values: Sequence[Any]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """Where each value of a setting is on the horizontal axis, and its ticks; few values are side by side."""
    different = len({_text(value) for value in values})
    numbers = all(type(value) in (int, float) for value in values)
    if numbers and different > MOST_CHOICES:
        axis = _Axis.over([float(value) for value in values], LEFT + 6, WIDTH - RIGHT - 6, room=0.0)
        ends = [(axis.at(v), _short(v)) for v in (min(values), max(values))]
        return (lambda value: axis.at(float(value))), ends
    texts = sorted({_text(value) for value in values}, key=lambda text: float(text) if numbers else text)
    step = (WIDTH - RIGHT - LEFT) / len(texts)
    places = {text: LEFT + step * (i + 0.5) for i, text in enumerate(texts)}
    room = max(3, int(step / CHARACTER))
    return (lambda value: places[_text(value)]), [(at, _cut(text.strip('"'), room)) for text, at in places.items()]


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """Numbers from `low` to `high` on the pixels from `start` to `end`."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, room: float = 0.05) -> _Axis:
        """An axis over values, logarithmic where they are positive and far apart, with `room` at both ends."""
        low, high = min(values), max(values)
        log = low > 0 and high > WIDE * low
        if log:
            factor = (high / low) ** room
            return cls(low / factor, high * factor, log, start, end)
        pad = room * (high - low) or (0.0 if high > low else abs(high) / 2 or 1.0)
        return cls(low - pad, high + pad, log, start, end)

    def at(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """A low, a middle and a high value, rounded."""
        found = []
        for share in (0.08, 0.5, 0.92):
            span = self.high - self.low
            value = self.low + share * span
            if self.log:
                span = value = self.low * (self.high / self.low) ** share
            digits = 1 - math.floor(math.log10(abs(span))) if span else 0
            rounded = round(value, digits)
            if self.low <= rounded <= self.high:
                found.append((round(self.at(rounded), 1), f"{rounded:,.6g}"))
        return found


def _points(points: Any) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    return f"{value:.3g}" if type(value) is float else value if type(value) is str else _text(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
