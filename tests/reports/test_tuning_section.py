"""The report of a search for settings: its file, and what the page shows of it."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from distillbench.records.table import make_along, make_table, write_table
from distillbench.records.tuning_statistics import best_of, sensitivity
from distillbench.reports.html import html_report
from distillbench.reports.runs import RunData
from distillbench.reports.tuning_data import read_trials
from distillbench.reports.tuning_section import tuning_sections

METRIC = "fd_pixels"
DECLARED = {METRIC: {"unit": "", "direction": "lower", "network": "pixels", "needs": "real", "protocol": "frechet/2"}}
LRS = [1e-3, 1e-2, 2e-4, 3e-3, 5e-4, 2e-3]


def trial(method, number, score, lr=1e-3, metric_choice="l2", **more):
    status = "ok" if score is not None else "diverged"
    costs = {"train_images": 1000, "train_seconds": 2.5, "train_joules": None}
    settings = {"setting:lr": json.dumps(lr), "setting:metric": json.dumps(metric_choice)}
    row = {"method": method, "trial": number, "status": status, "score": score, "metric": METRIC, "nfe": 1}
    return {**row, **costs, **settings, "reason": "" if score is not None else "the loss is not finite", **more}


def search(method="boot", scores=(30.0, None, 90.0, 12.0, 41.0, 20.0)):
    return [
        trial(method, i, score, lr, "l1" if i % 2 else "l2")
        for i, (score, lr) in enumerate(zip(scores, LRS, strict=True))
    ]


TWO = [*search("boot"), *search("cm", (300.0, 500.0, 250.0, None, 260.0, 400.0))]


def run_in(folder, rows, protocol="equal_trials", direction="lower", columns=DECLARED):
    """A run without finished rows, with the trials `rows` in its folder."""
    folder.mkdir(exist_ok=True)
    write_table(pd.DataFrame(rows), folder, "trials")
    (folder / "tuning.json").write_text(json.dumps({"tune": {"protocol": protocol}, "goal": {"direction": direction}}))
    table = make_table([], [METRIC])
    return RunData(folder, table, table, make_along([], [METRIC]), columns, [], {})


@pytest.fixture
def section(tmp_path):
    (found,) = tuning_sections([run_in(tmp_path / "run", TWO)], ["run"])
    return found


# --- the file --------------------------------------------------------------------------------------------------------


def test_both_forms_of_the_file_are_read_alike(tmp_path):
    folder = run_in(tmp_path / "run", TWO[::-1]).folder
    first = read_trials(folder, DECLARED)
    (folder / "trials.parquet").unlink()
    assert read_trials(folder, DECLARED) == first
    assert (first.metric, first.nfe, first.direction, first.protocol) == (METRIC, 1, "lower", "equal_trials")
    boot = first.methods["boot"]
    assert [one.number for one in boot] == [0, 1, 2, 3, 4, 5] and boot[1].score is None
    assert boot[3].settings == {"lr": 3e-3, "metric": "l1"}
    assert boot[3].costs == {"train_images": 1000, "train_seconds": 2.5, "train_joules": None}


def test_the_score_of_a_trial_that_is_not_ok_does_not_count(tmp_path):
    rows = [trial("boot", 0, 5.0, status="pruned"), trial("boot", 1, 7.0), trial("boot", 2, math.inf)]
    found = read_trials(run_in(tmp_path / "run", rows).folder, DECLARED)
    assert [one.score for one in found.methods["boot"]] == [None, 7.0, None]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: (f / "trials.parquet").write_bytes(b"x"), "trials.parquet is damaged"),
        (lambda f: (f / "tuning.json").write_text("{"), "tuning.json is damaged"),
        (lambda f: write_table(pd.DataFrame({"method": ["a"]}), f, "trials"), "trials has no columns trial, status"),
        (
            lambda f: write_table(pd.DataFrame([*TWO, TWO[0]]), f, "trials"),
            "a trial of boot without a number of its own",
        ),
        (
            lambda f: write_table(pd.DataFrame([*TWO, trial("pd", 0, 1.0, metric="kid")]), f, "trials"),
            "trials of 2 scores: only those of fd_pixels are shown",
        ),
        (
            lambda f: write_table(pd.DataFrame(TWO[:-1]), f, "trials"),
            "the methods have 5 to 6 trials: the search has not ended",
        ),
    ],
)
def test_what_is_damaged_is_a_problem_and_the_rest_is_shown(tmp_path, damage, problem):
    run = run_in(tmp_path / "run", TWO)
    damage(run.folder)
    (found,) = tuning_sections([run], ["run"])
    assert any(problem in line for line in found.problems)


def test_without_trials_there_is_no_section(tmp_path, monkeypatch):
    run = run_in(tmp_path / "run", TWO)
    for file in run.folder.iterdir():
        file.unlink()
    assert tuning_sections([run], ["run"]) == []
    assert "Tuning" not in text_of(html_report([run]))


def test_a_score_of_unknown_direction_has_no_curves(tmp_path):
    (found,) = tuning_sections([run_in(tmp_path / "run", TWO, direction="", columns={})], ["run"])
    assert any("whether lower or higher fd_pixels is better" in line for line in found.problems)
    assert not found.curves and found.table[0]["best"] == "" and found.settings


def test_the_search_after_training_has_a_section_of_its_own(tmp_path):
    run = run_in(tmp_path / "run", TWO, protocol="self_tuned")
    scores = [5.0, 2.0, 4.0]
    rows = [trial("boot", i, score, nfe=2, train_images=0, train_seconds=0.0) for i, score in enumerate(scores)]
    write_table(pd.DataFrame(rows), run.folder, "sampling_trials")
    first, after = tuning_sections([run], ["run"])
    assert (first.id, first.trains, after.id, after.trains) == ("tuning-1", True, "tuning-2", False)
    assert after.score.endswith("at NFE 2") and "nothing was trained" in after.sentences[-1] and not after.problems
    (row,) = after.table
    assert (row["trials"], row["best"], row["of trial"]) == ("3", "2", "1") and "images" not in row
    assert after.curves[0].notes == ["3.667, 2.667, 2 after 1, 2, 3 trials"]  # means over all subsets
    assert "Tuning of sampling" in text_of(html_report([run]))


# --- the section -----------------------------------------------------------------------------------------------------


def test_the_table_has_the_cost_and_the_best_trial(section):
    boot, _ = section.table
    expected = {
        "method": "boot", "trials": "6", "not ok": "1 diverged", "first trial": "30", "best": "12", "of trial": "3",
        "images": "6,000", "seconds": "15", "joules": "", "best settings": "lr=0.003, metric=l1",
    }  # fmt: skip
    assert boot == expected
    assert "12 trials of 2 methods, 2 of them without a score" in section.sentences[1]
    assert section.sentences[0].startswith("Protocol equal_trials: every method has the same number of trials")


def test_the_cost_says_for_how_many_trials_it_is_unknown(tmp_path):
    rows = [*search(), trial("boot", 6, None, train_seconds=None)]
    (found,) = tuning_sections([run_in(tmp_path / "run", rows)], ["run"])
    assert found.table[0]["seconds"] == "15 (without 1 trial)" and found.table[0]["images"] == "7,000"


def test_the_curves_are_the_expected_best(section):
    """Read back from the drawing: a logarithmic axis, the same for both methods."""
    boot, cm = section.curves
    curve = best_of([30.0, None, 90.0, 12.0, 41.0, 20.0], "lower")
    assert f"{curve['mean'].iloc[0]:.4g}".rstrip("0") in boot.notes[0] and boot.notes[0].endswith(
        "after 1, 3, 6 trials"
    )
    drawn, of_cm = points(boot.line), points(cm.line)
    assert [x for x, _ in drawn] == pytest.approx([46 + 176 * k / 5 for k in range(6)], abs=0.1)
    means = [*curve["mean"], best_of([300.0, 500.0, 250.0, None, 260.0, 400.0], "lower")["mean"].iloc[-1]]
    heights = [y for _, y in drawn] + [of_cm[-1][1]]
    for i in range(1, len(means)):  # heights are linear in the logarithm: higher scores are further up
        ratio = (heights[i] - heights[0]) / (heights[-1] - heights[0])
        assert ratio == pytest.approx(math.log(means[i] / means[0]) / math.log(means[-1] / means[0]), abs=0.01)
    assert heights[-1] < heights[0] and boot.others == [cm.line]
    pixels = (heights[-1] - heights[0]) / math.log(means[-1] / means[0])
    for quantile, ends in (("q05", points(boot.band)[:6]), ("q95", points(boot.band)[:5:-1])):
        expected = [heights[0] + pixels * math.log(value / means[0]) for value in curve[quantile]]
        assert [y for _, y in ends] == pytest.approx(expected, abs=0.2) and [x for x, _ in ends] == [
            x for x, _ in drawn
        ]


def test_dots_are_the_trials_with_lost_ones_at_the_worse_end(section):
    boot, _ = section.curves
    kinds = {dot.title.split(":")[0]: dot for dot in boot.dots}
    assert [dot.kind for dot in boot.dots] == ["", "lost", "", "", "", "best"]
    lost, best = kinds["trial 1"], kinds["trial 3"]
    assert lost.y == min(dot.y for dot in boot.dots) == 10 and best.y == max(dot.y for dot in boot.dots)
    assert "diverged (the loss is not finite); lr=0.01, metric=l1" in lost.title


def test_higher_is_better_turns_the_worse_end_around(tmp_path):
    columns = {METRIC: DECLARED[METRIC] | {"direction": "higher"}}
    (found,) = tuning_sections([run_in(tmp_path / "run", search(), columns=columns)], ["run"])
    lost = next(dot for dot in found.curves[0].dots if dot.kind == "lost")
    assert lost.y == max(dot.y for dot in found.curves[0].dots) == 120
    assert found.table[0]["best"] == "90"


def test_settings_are_ordered_by_how_much_they_explain(section):
    name, panels = section.settings[0]
    scores = [30.0, None, 90.0, 12.0, 41.0, 20.0]
    by_hand = {"lr": sensitivity(LRS, scores, "lower"), "metric": sensitivity(["l2", "l1"] * 3, scores, "lower")}
    assert name == "boot" and [p.title for p in panels] == sorted(by_hand, key=lambda s: -by_hand[s].share)
    lr = next(p for p in panels if p.title == "lr")
    share, by_chance = (round(100 * v) for v in (by_hand["lr"].share, by_hand["lr"].by_chance))
    assert lr.notes[0].startswith(f"{share}% (by chance {by_chance}%), p = ")
    assert [text for _, text in lr.x_ticks] == ["0.0002", "0.01"]
    assert sorted(LRS) == [LRS[i] for i in sorted(range(6), key=lambda i: place(lr, i))]
    assert [text for _, text in next(p for p in panels if p.title == "metric").x_ticks] == ["l1", "l2"]


def test_few_trials_and_a_setting_that_never_changed(tmp_path):
    rows = [trial("boot", i, 10.0 + i, lr) for i, lr in enumerate([1e-3, 2e-3])]
    (found,) = tuning_sections([run_in(tmp_path / "run", rows)], ["run"])
    ((_, panels),) = found.settings
    assert [(p.title, p.notes) for p in panels] == [("lr", ["fewer than 5 trials"])]


def test_a_method_without_any_score(tmp_path):
    rows = [*search(), *(trial("cm", i, None) for i in range(6))]
    (found,) = tuning_sections([run_in(tmp_path / "run", rows)], ["run"])
    assert found.curves[1].notes == ["no trial has a score"] and [name for name, _ in found.settings] == ["boot"]


# --- the page --------------------------------------------------------------------------------------------------------


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.parts, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.parts.append(data)


def parsed(page):
    """The page's main part."""
    reader = Text()
    reader.feed(page[page.index("<body") : page.index("</main>")])
    return reader


def text_of(page):
    return " ".join(" ".join(parsed(page).parts).split())


def points(text):
    return [tuple(map(float, point.split(","))) for point in text.split()]


def place(panel, number):
    return next(dot.x for dot in panel.dots if dot.title.startswith(f"trial {number}:"))


def test_the_page_draws_every_trial(tmp_path):
    run = run_in(tmp_path / "run", TWO)
    (run.folder / "tuning.json").write_text("{")
    page = parsed(html_report([run]))
    assert "tuning.json is damaged" in page.parts
    classes = [attrs.get("class") for tag, attrs in page.tags if tag in ("circle", "path", "polyline", "polygon")]
    panels = 2 + 2 * 2  # two curves, two settings of each method
    assert [tag for tag, _ in page.tags].count("svg") == panels
    circles = sum(tag == "circle" for tag, _ in page.tags)
    assert circles + classes.count("lost") == 12 * 3 and classes.count("best") == panels and classes.count("band") == 2


def test_texts_of_the_file_are_escaped(tmp_path):
    bad = "<script>alert(1)</script>\"' onload='x"
    rows = [trial(bad, i, None if i == 2 else 10.0 + i, lr, bad if i else "l2") for i, lr in enumerate(LRS)]
    rows[2] |= {"reason": bad, "status": bad}
    for row in rows:
        row[f"setting:{bad}"] = json.dumps([bad, row["trial"]])
    page = html_report([run_in(tmp_path / "run", rows)])
    start = page.index('<section id="tuning-1"')
    section = page[start : page.index("</section>", start)]
    assert "<script" not in section and "&lt;script&gt;" in section
    assert not [attrs for _, attrs in parsed(page).tags if "onload" in attrs]
    assert re.search(r"onload=.x", text_of(page))


def test_two_runs_have_a_section_each(tmp_path):
    runs = [run_in(tmp_path / name, search()) for name in ("first", "second")]
    found = tuning_sections(runs, ["first", "second"])
    assert [(one.id, one.run) for one in found] == [("tuning-1", "first"), ("tuning-2", "second")]


def test_methods_and_the_score_have_their_labels(tmp_path):
    run = run_in(tmp_path / "run", TWO, columns={METRIC: {**DECLARED[METRIC], "label": "FD (pixels)"}})
    run.methods.update(boot={"label": "BOOT"}, cm={"label": "CM"})
    (found,) = tuning_sections([run], ["run"])
    assert [row["method"] for row in found.table] == [panel.title for panel in found.curves] == ["BOOT", "CM"]
    assert found.score.startswith("FD (pixels)") and METRIC not in " ".join(found.sentences)


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ((None, None), "of another search: the rows of this run were not tuned"),
        ((4, 6), "of other numbers of trials (boot: 4, not 6)"),
        ((6, 6), ""),
    ],
)
def test_trials_that_are_not_those_of_the_rows_are_a_problem(tmp_path, counts, problem):
    run = run_in(tmp_path / "run", TWO)
    rows = [{"method": name, "tuning_trials": count} for name, count in zip(("boot", "cm"), counts, strict=True)]
    (found,) = tuning_sections([dataclasses.replace(run, table=make_table(rows, [METRIC]))], ["run"])
    assert problem in " ".join(found.problems) and bool(problem) == bool(found.problems)
