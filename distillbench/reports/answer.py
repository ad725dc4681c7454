"""What a reader asks first: which methods lead at each number of evaluations, by how much, and at what cost.

Everything here follows from the leading groups of :mod:`distillbench.records.leading` and from means over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distillbench.records.costs import spread
from distillbench.records.leading import LeadingGroup, Standing
from distillbench.reports.cost_ties import MEASURED, cost_groups
from distillbench.reports.entries import Entry, key_of
from distillbench.reports.labels import Labels
from distillbench.reports.words import brief, listed, plus_minus

TRAINING = ("train_tflops", "train_seconds", "train_teacher_nfe", "train_images")  # the first that is known is shown
SAMPLING = ("sample_latency_p50_ms", "sample_gflops")
MOST_NAMED = 5  # methods that a sentence names of one kind


@dataclass(frozen=True)
class Ranked:
    """A method at one number of evaluations. `place`: leading or trailing."""

    label: str
    place: str
    value: float
    text: str  # mean ± half its interval
    behind: str  # its distance to the best
    seeds: int
    training: str
    sampling: str
    method: str = ""  # its name in files


@dataclass(frozen=True)
class Answer:
    """What is known at one number of evaluations on one score."""

    nfe: int
    score: str
    sentence: str
    ranked: list[Ranked]  # the best first
    training: str  # the cost of those that lead
    sampling: str
    teacher: str  # how many evaluations the teacher needs for the same
    said: str  # what the comparison consists of
    left_out: list[str] = field(default_factory=list)

    @property
    def leading(self) -> list[Ranked]:
        return [one for one in self.ranked if one.place == "leading"]


@dataclass(frozen=True)
class Answers:
    """All numbers of evaluations on one score, with the headings of the costs."""

    score: str
    heading: str
    training: str
    sampling: str
    rows: list[Answer]

    @property
    def leading(self) -> set[str]:
        """The labels of the methods that lead somewhere."""
        return {one.label for row in self.rows for one in row.leading}

    @property
    def said(self) -> str:
        """What the comparisons consist of, if it is the same for all that there are; else ""."""
        found = {row.said for row in self.rows if len(row.ranked) > 1}
        return found.pop() if len(found) == 1 else ""


def answers(
    groups: Sequence[LeadingGroup], entries: Sequence[Entry], score: str, labels: Labels
) -> Answers | None:  # fmt: skip
    """The answers on `score`; None if no student has it. `groups` are the leading groups of the section's rows."""
    mine = sorted((one for one in groups if one.score == score), key=lambda one: int(one.group["nfe"]))
    if not mine:
        return None
    of = {key_of(entry.values): entry for entry in entries}
    students = [entry for entry in entries if not entry.is_teacher]
    training, sampling = (_first_known(students, costs) for costs in (TRAINING, SAMPLING))
    rows = [_answer(one, of, entries, labels, training, sampling) for one in mine]
    name = labels.label(score)
    spent, speed = ("" if not cost else labels.label(cost).short for cost in (training, sampling))
    return Answers(score, f"{name.short} {name.arrow}".strip(), spent, speed, rows)


def primary(groups: Sequence[LeadingGroup], scores: Sequence[str]) -> str:
    """The score that most methods have; the first of several. "" without a score."""
    counts = {score: 0 for score in scores}
    for one in groups:
        counts[one.score] += len(one.leaders) + len(one.trailing)
    return max(counts, key=lambda score: counts[score]) if any(counts.values()) else ""


def _first_known(entries: Sequence[Entry], costs: Sequence[str]) -> str:
    return next((cost for cost in costs if any(e.values.get(cost) is not None for e in entries)), "")


def _answer(
    group: LeadingGroup, of: Mapping[tuple, Entry], entries: Sequence[Entry], labels: Labels, training: str,
    sampling: str,
) -> Answer:  # fmt: skip
    ranked = [
        _ranked(one, of[key_of(one.row)], place, group, labels, training, sampling)
        for place, several in (("leading", group.leaders), ("trailing", group.trailing))
        for one in several
        if key_of(one.row) in of
    ]
    leading = [one for one in ranked if one.place == "leading"]
    noun = labels.label(group.score).short.split(" (")[0]
    nfe = int(group.group["nfe"])
    return Answer(
        nfe,
        group.score,
        sentence(nfe, noun, ranked, group),
        ranked,
        _cost(leading, of, group, training, labels),
        _cost(leading, of, group, sampling, labels),
        _teachers_need(group, entries, labels),
        group.said,
        _left_out(group, labels),
    )


def _left_out(group: LeadingGroup, labels: Labels) -> list[str]:
    """The methods that were not compared, by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, why in group.left_out.items():
        by_reason.setdefault(why, []).append(labels.method_label(name).short)
    return [f"{listed(names)}: {why}" for why, names in by_reason.items()]


def _ranked(
    one: Standing, entry: Entry, place: str, group: LeadingGroup, labels: Labels, training: str, sampling: str
) -> Ranked:
    low, high, _ = entry.interval(group.score)
    return Ranked(
        entry.label,
        place,
        one.mean,
        plus_minus(one.mean, low, high),
        _behind(one.mean, group.best.mean),
        int(entry.values["training_seeds"] or 0),
        _with_unit(entry, training, labels),
        _with_unit(entry, sampling, labels),
        str(entry.values["method"]),
    )


def _behind(mean: float, best: float) -> str:
    """The difference to the best, in percent of it: "+75 %"."""
    if mean == best:
        return ""
    if best == 0:
        return f"{mean - best:+.3g}".replace("-", "−")
    part = 100 * (mean - best) / abs(best)
    return f"{part:+,.0f} %".replace("-", "−") if abs(part) >= 1 else f"{part:+.1f} %".replace("-", "−")


def _with_unit(entry: Entry, cost: str, labels: Labels) -> str:
    """The cost with its unit; a measured one with half its interval over training seeds."""
    value = entry.values.get(cost) if cost else None
    if value is None:
        return ""
    of = spread(entry.behind, cost) if cost in MEASURED else None
    text = brief(float(value)) if of is None or of.low is None else plus_minus(of.mean, of.low, of.high)
    return f"{text} {labels.label(cost).unit}".strip()


def sentence(nfe: int, noun: str, ranked: Sequence[Ranked], group: LeadingGroup) -> str:
    """The comparison in one sentence. It claims a difference only where `group` found one."""
    at = "At one evaluation" if nfe == 1 else f"At {nfe} evaluations"
    leading, trailing = ([one for one in ranked if one.place == place] for place in ("leading", "trailing"))
    if not leading:
        return f"{at}, no method can be compared: rows failed or have no score."
    if len(ranked) == 1:
        what = "can be compared" if group.left_out else "has this score"
        return f"{at}, only {ranked[0].label} {what} ({noun} {ranked[0].text})."
    if group.rule == "none":
        first = f"{leading[0].label} has the best {noun} ({brief(leading[0].value)})"
        then = listed(f"{one.label} ({brief(one.value)})" for one in leading[1:3])
        seeds = {0: "they have no training seed in common", 1: "there is one training seed"}
        why = seeds.get(group.training_seeds, "they could not be compared")
        return f"{at}, {first}, then {then}; the order is not certain: {why}."
    parts = [_lead(leading, noun), *([_trail(trailing)] if trailing else [])]
    return f"{at}, {'; '.join(parts)}."


def _lead(leading: Sequence[Ranked], noun: str) -> str:
    if len(leading) == 1:
        return f"{leading[0].label} leads ({noun} {leading[0].text})"
    names = listed((one.label for one in leading), len(leading) if len(leading) <= MOST_NAMED else 3)
    values = brief(leading[0].value), brief(leading[-1].value)
    return f"{names} cannot be told apart ({noun} {' to '.join(dict.fromkeys(values))})"


def _trail(trailing: Sequence[Ranked]) -> str:
    texts = [f"{one.label} ({brief(one.value)})" for one in trailing]
    if len(trailing) <= 3:
        return f"{listed(texts)} {'trails' if len(trailing) == 1 else 'trail'}"
    return f"the other {len(trailing)} trail, from {texts[0]} to {texts[-1]}"


def _cost(leading: Sequence[Ranked], of: Mapping[tuple, Entry], group: LeadingGroup, cost: str, labels: Labels) -> str:
    """The cost of the methods that lead: one number, or the smallest and the largest with their methods.

    Of measured costs it says where these differ by no more than their spread.
    """
    names = {one.label for one in leading}
    entries = [of[key_of(one.row)] for one in group.leaders if key_of(one.row) in of]
    known = [(float(e.values[cost]), e.label) for e in entries if cost and e.label in names and _has(e, cost)]
    if not known:
        return ""
    (low, cheap), (high, dear) = min(known), max(known)
    unit = labels.label(cost).unit
    if brief(low) == brief(high):
        return f"{brief(low)} {unit}".strip()
    text = f"{brief(low)} ({cheap}) to {brief(high)} {unit} ({dear})".replace("  ", " ")
    return f"{text}{_how_sure(entries, cost, labels)}"


def _how_sure(entries: Sequence[Entry], cost: str, labels: Labels) -> str:
    """Which of the measured costs of `entries` cannot be told apart; "" for counted ones."""
    groups = cost_groups(entries, [cost], labels) if cost in MEASURED else []
    if len(groups) != 1:
        return ""
    (group,) = groups
    if group.rule == "none":
        return "; one training seed: spread not known" if group.training_seeds == 1 else "; not compared"
    if not group.trailing:
        return "; cannot be told apart"
    if len(group.leaders) == 1:
        return ""
    of = {key_of(entry.values): entry.label for entry in entries}
    return f"; {listed((of[key_of(one.row)] for one in group.leaders), MOST_NAMED)} cannot be told apart"


def _has(entry: Entry, cost: str) -> bool:
    return entry.values.get(cost) is not None


def _teachers_need(group: LeadingGroup, entries: Sequence[Entry], labels: Labels) -> str:
    """Between which numbers of evaluations the teacher reaches the best method's score, for each of its samplers."""
    if not group.leaders:
        return ""
    sign, best = (1 if group.direction == "lower" else -1), group.best.mean
    samplers: dict[str, list[tuple[int, float]]] = {}
    for entry in entries:
        value = entry.values.get(group.score)
        if entry.is_teacher and value is not None and entry.values["nfe"] is not None:
            samplers.setdefault(entry.label, []).append((int(entry.values["nfe"]), float(value)))
    texts = []
    for name, points in samplers.items():
        sampler = name.removeprefix("teacher, ").removeprefix("teacher:")
        points.sort()
        reached = next((at for at, (_, value) in enumerate(points) if sign * value <= sign * best), None)
        if reached is None:
            nfe, value = min(points, key=lambda point: sign * point[1])
            texts.append(f"{sampler}: not reached ({brief(value)} at {nfe})")
        elif reached == 0:
            texts.append(f"{sampler}: at most {points[0][0]} ({brief(points[0][1])})")
        else:
            (below, worse), (above, better) = points[reached - 1], points[reached]
            texts.append(f"{sampler}: between {below} ({brief(worse)}) and {above} ({brief(better)})")
    return "; ".join(texts)


def improving(curves: Mapping[str, Sequence[tuple[float, float]]], sign: int, by: float = 0.1) -> list[str]:
    """Methods whose score still improved by more than `by` of itself over the last fifth or so of their training.

    `curves`: (fraction of the budget, mean score) of each method, in order.
    """
    found = []
    for name, points in curves.items():
        if len(points) < 2 or points[-1][0] < 1:
            continue
        (_, before), (_, last) = points[-2], points[-1]
        if sign * (before - last) > by * abs(last):
            found.append(name)
    return found


def improving_sentence(names: Sequence[str]) -> str:
    """What :func:`improving` found, as a sentence; "" for none."""
    if not names:
        return ""
    were = "was" if len(names) == 1 else "were"
    return f"{listed(names, 8)} {were} still improving when training ended: a larger budget may change the order."
