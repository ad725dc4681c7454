"""The first screen of a report: its sentence claims only what the comparison found; costs; axes; looks; reasons."""

from __future__ import annotations

import math

import pytest

from distillbench.records.leading import LeadingGroup, Standing
from distillbench.records.statistics import KEYS
from distillbench.records.table import FIRST, LAST
from distillbench.reports import figures
from distillbench.reports.answer import answers, improving, improving_sentence, primary
from distillbench.reports.axes import is_log, scale, side_by_side, tick
from distillbench.reports.cost_ties import cost_ties
from distillbench.reports.entries import Entry, common_reasons, without_common
from distillbench.reports.labels import Labels
from distillbench.reports.looks import SYMBOLS, looks, places
from distillbench.reports.words import brief, plus_minus

LABELS = Labels({"fd": {"label": "FD (net)", "direction": "lower", "unit": ""}})


def entry(method: str, mean: float, nfe: int = 1, **costs) -> Entry:
    row = {**dict.fromkeys(KEYS), "method": method, "nfe": nfe, "settings": "", "training_seeds": 2, "fd": mean}
    row |= {"fd_training_low": mean - 5, "fd_training_high": mean + 5} if not method.startswith("teacher:") else {}
    return Entry(row | costs, method.removeprefix("teacher:"), frozenset())


def group(leaders: list[Entry], trailing: list[Entry] = (), rule: str = "seeds", seeds: int = 2, left_out=()):
    def standings(several, apart):
        return tuple(Standing(e.label, {k: e.values[k] for k in KEYS}, e.values["fd"], apart=apart) for e in several)

    nfe = [*leaders, *trailing][0].values["nfe"] if [*leaders, *trailing] else 1
    return LeadingGroup(
        {"nfe": nfe}, "fd", "lower", standings(leaders, False), standings(trailing, True), dict(left_out), rule,
        "said", seeds, 0,
    )  # fmt: skip


def sentence(leaders, trailing=(), teachers=(), **more) -> str:
    found = answers([group(leaders, trailing, **more)], [*leaders, *trailing, *teachers], "fd", LABELS)
    return found.rows[0].sentence


@pytest.mark.parametrize(("methods", "trailing", "more", "said"), [
    (4, 0, {}, "At one evaluation, m0, m1, m2 and m3 cannot be told apart (FD 100 to 130)."),
    (7, 1, {}, "At one evaluation, m0, m1, m2 and 4 more cannot be told apart (FD 100 to 160); m7 (170) trails."),
    (1, 2, {}, "At one evaluation, m0 leads (FD 100 ± 5); m1 (110) and m2 (120) trail."),
    (1, 5, {}, "At one evaluation, m0 leads (FD 100 ± 5); the other 5 trail, from m1 (110) to m5 (150)."),
    (1, 0, {}, "At one evaluation, only m0 has this score (FD 100 ± 5)."),
    (1, 0, {"left_out": {"x": "failed"}}, "At one evaluation, only m0 can be compared (FD 100 ± 5)."),
    (0, 0, {"left_out": {"x": "failed"}},
     "At one evaluation, no method can be compared: rows failed or have no score."),
    (3, 0, {"rule": "none", "seeds": 1}, "At one evaluation, m0 has the best FD (100), then m1 (110) and m2 (120); "
     "the order is not certain: there is one training seed."),
    (2, 0, {"rule": "none", "seeds": 0}, "At one evaluation, m0 has the best FD (100), then m1 (110); "
     "the order is not certain: they have no training seed in common."),
])  # fmt: skip
def test_the_sentence_claims_what_was_found(methods, trailing, more, said):
    every = [entry(f"m{i}", 100.0 + 10 * i) for i in range(methods + trailing)]
    assert sentence(every[:methods], every[methods:], **more) == said


def test_costs_are_of_the_methods_that_lead_and_the_teacher_is_bracketed():
    cheap, dear = entry("a", 100.0, train_tflops=2.5), entry("b", 110.0, train_tflops=5.0)
    other = entry("c", 200.0, train_tflops=1.0, sample_gflops=3.0)
    teachers = [entry("teacher:ddim", value, nfe) for nfe, value in ((1, 900.0), (4, 150.0), (8, 90.0))]
    row = answers([group([cheap, dear], [other])], [cheap, dear, other, *teachers], "fd", LABELS).rows[0]
    assert row.training == "2.50 (a) to 5.00 TFLOP (b)" and row.sampling == ""
    assert row.teacher == "ddim: between 4 (150) and 8 (90.0)"
    assert [one.behind for one in row.ranked] == ["", "+10 %", "+100 %"]
    better = entry("d", 50.0)
    row = answers([group([better])], [better, *teachers], "fd", LABELS).rows[0]
    assert row.teacher == "ddim: not reached (90.0 at 8)"
    aside = group([better], left_out={"x": "failed", "y": "no score", "z": "failed"})
    assert answers([aside], [better], "fd", LABELS).rows[0].left_out == ["x and z: failed", "y: no score"]
    assert primary([group([better])], ["fd"]) == "fd" and primary([], ["fd"]) == "" == primary([], [])


def test_only_methods_that_still_improve_need_a_larger_budget():
    points = {"a": [(0.8, 120.0), (1.0, 100.0)], "b": [(0.8, 105.0), (1.0, 100.0)], "c": [(0.5, 200.0)]}
    assert improving(points, 1) == ["a"] and improving(points, -1) == []
    assert improving_sentence(["a"]).startswith("a was still improving") and improving_sentence([]) == ""


def test_points_of_equal_cost_are_apart_and_others_stay():
    moved = side_by_side([[1.0, 2.0], [1.0, 4.0], [1.0, 2.0]])
    firsts = [own[0] for own in moved]
    assert firsts == sorted(firsts) and len(set(firsts)) == 3 and 0.8 < firsts[0] < firsts[2] < 1.25
    assert moved[1][1] == 4.0 and moved[0][1] < 2.0 < moved[2][1], "series keep their order"
    assert side_by_side([[1.0, None], [3.0]]) == [[1.0, None], [3.0]]
    assert side_by_side([[5.0], [5.0]])[0][0] < 5.0 < side_by_side([[5.0], [5.0]])[1][0]


def test_axes_are_logarithmic_where_ranges_ask_for_it():
    assert is_log([[1.0, 5.0]]) and not is_log([[1.0, 3.0]]) and not is_log([[0.0, 5.0]]) and not is_log([])
    low, high = scale([[10.0, 1000.0]])["range"]
    assert low < math.log10(10) and high > math.log10(1000)
    assert [tick(v) for v in (0.25, 1000, 50_000, 2.5e6)] == ["0.25", "1,000", "50k", "2.5M"]


def test_looks_are_those_of_figures():
    names = ["boot", "teacher:ddim", "cm", "pd", "zeta"]
    found = looks({name: name for name in names}, names)
    assert found["teacher:ddim"].teacher and len({(v.colour, v.symbol) for v in found.values()}) == len(names)
    for name, i in places(names).items():
        assert found[name].colour == figures.PALETTE[i % len(figures.PALETTE)]
    assert len(SYMBOLS) == len(figures.MARKERS) and math.gcd(len(SYMBOLS), len(figures.PALETTE)) == 1
    variants = looks({"cm [lr=1]": "cm", "cm [lr=2]": "cm"}, names)
    assert len({v.colour for v in variants.values()}) == 1 and len({v.symbol for v in variants.values()}) == 2


def test_reasons_of_all_rows_are_said_once():
    rows = [{"method": m, "reason": r} for m, r in (("a", "x; y"), ("b", "y"), ("teacher:d", "z"), ("teacher:d", "z"))]
    common = common_reasons(rows)
    assert common == [(True, "z"), (False, "y")]
    assert [without_common(row, common) for row in rows] == ["x", "", "", ""]
    assert common_reasons(rows[:1]) == []


@pytest.mark.parametrize(("mean", "low", "high", "text"), [
    (866.2, 615.6, 1116.8, "866 ± 251"), (0.0800, 0.0774, 0.0826, "0.0800 ± 0.0026"), (5.0, None, None, "5"),
    (10.0, 9.0, 14.0, "10.0 [9.0 to 14.0]"), (3.0, 3.0, 3.0, "3"),
])  # fmt: skip
def test_a_mean_has_half_its_interval(mean, low, high, text):
    assert plus_minus(mean, low, high) == text


@pytest.mark.parametrize(
    ("value", "text"), [(174.2, "174"), (1525.0, "1,520"), (0.13438, "0.134"), (0.0, "0"), (-2.5, "−2.50")]
)
def test_numbers_in_sentences_have_three_digits(value, text):
    assert brief(value) == text


def timed(method: str, seconds: list[float]) -> Entry:
    found = entry(method, 100.0, train_seconds=sum(seconds) / len(seconds))
    row = dict.fromkeys([*FIRST, *LAST]) | found.values | {"status": "ok", "sampling_seed": 0}
    found.behind += [row | {"training_seed": s, "train_seconds": value} for s, value in enumerate(seconds)]
    return found


def test_measured_costs_within_their_spread_are_not_told_apart():
    fast, faster, slow = timed("a", [10.0, 12.0, 14.0]), timed("b", [13.9, 12.1, 10.2]), timed("c", [90.0, 91.0, 92.0])
    marks, said = cost_ties([fast, faster, slow], LABELS)
    assert marks["train_seconds"] == [True, True, False] and "3 common training seeds" in said
    price = answers([group([fast, faster])], [fast, faster], "fd", LABELS).rows[0].training
    assert price == "12.0 (a) to 12.1 s (b); cannot be told apart"
    every = answers([group([fast, faster, slow])], [fast, faster, slow], "fd", LABELS).rows[0]
    assert every.training == "12.0 (a) to 91.0 s (c); a and b cannot be told apart"
    assert every.ranked[0].training == "12 ± 5 s"


def test_costs_of_one_seed_have_no_mark_but_a_reason():
    one, two = timed("a", [10.0]), timed("b", [12.0])
    marks, said = cost_ties([one, two], LABELS)
    assert marks["train_seconds"] == [False, False] and said.endswith("spread is not known, none is marked")
    price = answers([group([one, two], rule="none", seeds=1)], [one, two], "fd", LABELS).rows[0].training
    assert price == "10.0 (a) to 12.0 s (b); one training seed: spread not known"
    counted = entry("a", 100.0, train_tflops=1.0)
    assert cost_ties([counted, entry("b", 100.0, train_tflops=2.0)], LABELS) == ({}, "")
