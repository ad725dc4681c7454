"""``distillbench tune-levels``: a search on noise of its own, and rows with the levels that it found."""

import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from distillbench import Method, Metric, UserError
from distillbench.cli import command_options, commands
from distillbench.cli.doctor_findings import Installation
from distillbench.cli.doctor_results import check_records
from distillbench.cli.terminal import print_tuning
from distillbench.diffusion.noise import Noise, stream_key
from distillbench.evaluation.evaluator import Evaluator
from distillbench.execution.run import run
from distillbench.export.run_export import find_student
from distillbench.records.records import TriedLevels
from distillbench.registry import Entry, Plugin, Registry, load_registry
from distillbench.runs import cell_training
from distillbench.runs.cell_result import describe_cell
from distillbench.runs.config import RunConfig, compose_runs
from distillbench.runs.level_tuning import SEARCH, Tuning, Wanted, check_trained, tune_levels
from distillbench.runs.plan import plan
from distillbench.runs.shared_context import restored
from distillbench.system.progress import Progress
from distillbench.system.signals import Interrupted, Stop


class Width(Metric):
    """Has no direction."""

    name, unit, direction, protocol = "width", "", "none", "width/1"

    def score(self, samples):
        return samples.x_0.std().item()


class OffTarget(Metric):
    """Needs no samples of the teacher."""

    name, unit, direction, protocol = "off_target", "", "lower", "off_target/1: of the mean of squares from .26"

    def score(self, samples):
        return abs(samples.x_0.double().square().mean().item() - 0.26)


class OnTarget(OffTarget):
    name, direction, protocol = "on_target", "higher", "on_target/1: minus off_target"

    def score(self, samples):
        return -super().score(samples)


IMAGES, STEPS = 30, 9
WORDS = [
    *("dataset=gmm", "teacher=gmm", "experiment=smoke", "device=cpu", "dataset.count=500"),
    *("budget.images=640", "batch_size=64", f"methods.cm.steps={STEPS}", "run_name=here"),
    *("evaluation.images=48", "evaluation.batch_size=32", "evaluation.nfe=[1,2]", "evaluation.timing=off"),
    "evaluation.metrics=[width,teacher_rmse,off_target,on_target]",
]


@dataclass
class Ran:
    results: Path
    registry: Registry
    config: RunConfig

    @property
    def folder(self):
        return self.results / "here"

    def search(self, **wanted):
        wanted = {"metric": "off_target", "images": IMAGES} | wanted
        return tune_levels(self.folder, Wanted(**wanted), self.registry, Progress(None))

    def command(self, *words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command_options, "load_plugins", lambda folders: self.registry)
            options = ["--method", "cm", "--metric", "off_target", "--images", str(IMAGES)]
            commands.main(["tune-levels", str(self.folder), *options, *words])

    def table(self):
        return pd.read_parquet(self.folder / "table.parquet")

    def cell(self):
        """The folder of the student of cm."""
        (weights,) = self.folder.glob("weights/cm-*.safetensors")
        return self.results / "cells" / weights.stem.rpartition("-")[2]

    def tried(self):
        """What the search has recorded."""
        (file,) = self.cell().glob("levels-*.json")
        return json.loads(file.read_bytes())["tried"]

    def planned(self, **settings):
        """The cell of cm and its teacher, planned with the run's settings and more of cm."""
        methods = {"cm": replace(self.config.methods["cm"], **settings)}
        cells = plan([replace(self.config, methods=methods, results_dir=str(self.results))], self.registry)
        return cells[-1], cells[-1].shared.load_teacher(Progress(None))

    def method(self):
        """The student."""
        return restored(*self.planned(), self.cell() / "student.safetensors")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    known, plugin = load_registry(), Plugin("targets", "stranger", "1.0")
    registry = replace(
        known, metrics=known.metrics | {cls.name: Entry(cls, plugin) for cls in (Width, OffTarget, OnTarget)}
    )
    results = tmp_path_factory.mktemp("tuned") / "results"
    configs = compose_runs([*WORDS, "methods=[boot,cm]", f'results_dir="{results}"'], registry)
    run(plan(configs, registry), configs, Progress(None), lambda rows: None)
    return Ran(results, registry, configs[0])


@pytest.fixture
def ran(first, tmp_path):
    """A copy of the finished run, in another place."""
    return Ran(Path(shutil.copytree(first.results, tmp_path / "moved")), first.registry, first.config)


def off_target(method: Method, levels, images, purpose, seed=0):
    """The score at `levels` by algorithm 1 of consistency models, written once more."""
    schedule, F, e = method.teacher.schedule, method.student, method.student.e
    noise = Noise(stream_key(purpose, seed), range(images), method.teacher.shape)
    level = lambda t: schedule.noise_level(torch.tensor(t, dtype=torch.float64)).item()
    at = lambda tau: schedule.t_of_lam(torch.full((images, 1, 1, 1), tau, dtype=torch.float64).log())
    with torch.no_grad():
        top = at(min(level(schedule.t_max), 80.0))
        x = F(schedule.sigma(top) * noise(0), top)
        for k, tau in enumerate(levels, start=1):
            x = F(schedule.alpha(at(tau)) * (x + (tau**2 - e**2) ** 0.5 * noise(k)), at(tau))
    return abs(x.clamp(-1, 1).double().square().mean().item() - 0.26)


def test_the_search_scores_candidates_on_noise_of_its_own(ran, capsys):
    before = {file: file.read_bytes() for file in ran.results.rglob("*") if file.is_file()}
    ran.command("--nfe", "3")
    said, method = capsys.readouterr().out.replace(",", ""), ran.method()
    tried = [(one["levels"], one["score"]) for one in ran.tried()]
    for levels, score in [tried[0], tried[2], tried[-1]]:
        assert score == pytest.approx(off_target(method, levels, IMAGES, SEARCH), rel=1e-3, abs=1e-7)
        assert score != pytest.approx(off_target(method, levels, IMAGES, "evaluation"), rel=1e-3, abs=1e-7)
    # the levels of the run come first, then those of the grid, and the next level below the best
    grid = method.teacher.schedule.noise_level(method.grid)
    two, three = ([levels for levels, _ in tried if len(levels) == n] for n in (1, 2))
    assert two[0] == pytest.approx(method.levels_at(2), rel=1e-3)
    assert all((grid[1:-1] / tau[-1] - 1).abs().min() < 1e-3 for tau in two + three)
    best = [min((score, levels) for levels, score in tried if len(levels) == n)[1] for n in (1, 2)]
    assert all(levels[0] == best[0][0] > levels[1] for levels in three[1:])
    # of all levels of the grid, scored one by one, the best has the lowest score
    every = {level: off_target(method, [level], IMAGES, SEARCH) for level in grid[1:-1].tolist()}
    assert best[0] == pytest.approx([min(every, key=every.__getitem__)], rel=1e-3) and len(two) < len(every)
    # what it cost: no sample of the teacher, as this score needs none
    assert [one["evaluations"] for one in ran.tried()] == [IMAGES * (len(levels) + 1) for levels, _ in tried]
    total = sum(IMAGES * (len(levels) + 1) for levels, _ in tried)
    assert f"{len(tried)} candidates of {IMAGES} images took {total} network evaluations" in said
    lists = ",".join(f"[{','.join(f'{level:g}' for level in levels)}]" for levels in best)
    assert f"'methods.cm.sampling_levels=[{lists}]'".replace(",", "") in said
    assert all(file.read_bytes() == content for file, content in before.items())  # nothing else has changed


def test_a_search_continues_where_it_was_interrupted(ran, monkeypatch):
    measure, asked = Evaluator.measure, []

    def counted(*given, **named):
        asked.append(given)
        if len(asked) == 3:
            raise Interrupted
        return measure(*given, **named)

    monkeypatch.setattr(Evaluator, "measure", counted)
    with pytest.raises(Interrupted):
        ran.search(nfe=2)
    kept = ran.tried()
    assert len(kept) == 2
    found = ran.search(nfe=2)
    assert ran.tried()[:2] == kept and len(asked) - 3 == found.fresh == len(found.tried) - 2 > 0
    again = ran.search(nfe=2)
    assert (again.fresh, again.chosen, again.tried) == (0, found.chosen, found.tried)


def test_rows_with_the_best_levels_are_added_and_nothing_is_trained(ran):
    times = lambda: {file: file.stat().st_mtime_ns for file in ran.results.rglob("train.json")}
    old, method, trained = ran.table(), ran.method(), times()
    ran.command("--nfe", "2", "--evaluate")
    assert len(list(check_records(Installation(ran.registry, ran.results, ran.results)))) == 1  # all can be read
    new, levels = ran.table(), min(ran.tried(), key=lambda one: one["score"])["levels"]
    assert times() == trained
    text = f"sampling_levels=[{levels}]"
    mine = new["settings"].str.contains(text, regex=False)
    pd.testing.assert_frame_equal(new[~mine].reset_index(drop=True), old)
    row = new[mine & (new["nfe"] == 2)].iloc[0]
    assert row["status"] == "ok" and set(new[mine]["method"]) == {"cm"}
    assert row["off_target"] == pytest.approx(off_target(method, levels, 48, "evaluation"), rel=1e-3, abs=1e-7)
    default = old[(old["method"] == "cm") & (old["nfe"] == 2)].iloc[0]
    assert row["key"] != default["key"] and row["protocol"] == default["protocol"]
    assert row["train_seconds"] == default["train_seconds"]
    summary = pd.read_parquet(ran.folder / "summary.parquet")
    assert summary["settings"].str.contains(text, regex=False).sum() == 2  # not merged with the default's
    # a command that samples the student says which of the two settings it takes
    said = io.StringIO()
    find_student(ran.folder, "cm", 0, ran.registry, Progress(Console(file=said, width=200)), nfe=2)
    assert f"the run has defaults and sampling_levels=[{levels}]; the first is used" in said.getvalue()
    # the setting that is printed finds these rows from the run's own command
    there = describe_cell(*ran.planned(sampling_levels=[levels]))
    assert there.evaluation_key == row["key"] and there.train_key == describe_cell(*ran.planned()).train_key
    assert there.train_key != describe_cell(*ran.planned(mu=0)).train_key


def test_few_candidates_are_spread_over_the_grid_and_a_higher_score_may_be_better(ran):
    lower, higher = ran.search(nfe=2, candidates=3), ran.search(nfe=2, candidates=3, metric="on_target")
    grid = ran.method().teacher.schedule.noise_level(ran.method().grid)
    assert sorted(one.levels[0] for one in lower.tried) == pytest.approx(grid[[1, 4, 7]].tolist(), rel=1e-3)
    assert [one.levels for one in higher.tried] == [one.levels for one in lower.tried]
    assert [one.score for one in higher.tried] == [-one.score for one in lower.tried]
    assert higher.chosen == lower.chosen and higher.direction == "higher"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"method": "boot"}, r"boot has no levels of sampling to choose.* that have: cm"),
        ({"method": "bot"}, r"no method 'bot' in the run 'here'. Did you mean 'boot'\? Possible: boot, cm"),
        ({"seed": 7}, r"no seed '7' of cm in the run\. Possible: 0"),
        ({"method": "cm-seed0-0123456789abcdef"}, r"no finished student cm-seed0-0123456789abcdef .*: cm-seed0-"),
        ({"metric": "fid"}, "no metric to optimise 'fid' in the run"),
        (
            {"metric": "width"},
            "no metric to optimise 'width' in the run. Possible: off_target, on_target",
        ),
        ({"metric": "teacher_rmse"}, "teacher_rmse has no value with 2 evaluations: sampling adds fresh"),
        ({"nfe": STEPS + 1}, "cm does not sample with 9, 10 evaluations"),
        ({"nfe": STEPS + 9}, "cm does not sample with 9, 10, 11, 12 and 6 more evaluations"),
    ],
)
def test_what_cannot_be_searched_is_refused(first, wanted, message):
    with pytest.raises(UserError, match=message):
        first.search(**wanted)


def test_a_folder_that_is_no_run_and_a_student_that_is_gone_are_refused(ran):
    search = lambda folder: tune_levels(folder, Wanted(), ran.registry, Progress(None))
    with pytest.raises(UserError, match="Runs in it: here"):
        search(ran.results)
    with pytest.raises(UserError, match="no run in"):
        search(ran.results / "there")
    (ran.cell() / "student.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no finished student cm"):
        ran.search()
    with pytest.raises(UserError, match=r"cm \(seed 0\) would be trained again"):
        check_trained(ran.folder, ran.registry, Progress(None))
    settings = ran.folder / "config.yaml"
    settings.write_text(settings.read_text().replace("segments: 1", "segments: 2"))
    with pytest.raises(UserError, match=r"sampling_levels must be \[\] with segments=2"):
        ran.search()


def test_more_than_one_minimum_and_samples_that_are_not_finite_are_said():
    tried = [([4.0], 2.0), ([3.0], 1.0), ([2.0], 3.0), ([1.0], 1.5), ([0.5], None)]
    scores = [TriedLevels(levels=levels, score=score, evaluations=8, seconds=1.0) for levels, score in tried]
    found = Tuning("x", "x (seed 0)", "fid", "lower", 4, [[3.0]], [[3.0]], scores, 5, [], [])
    said = io.StringIO()
    print_tuning(Console(file=said, width=200), found, evaluated=False)
    assert "2 evaluations: more than one minimum was seen" in said.getvalue() and "not finite" in said.getvalue()
    assert "the levels of the run are the best that were tried" in said.getvalue()
    assert replace(found, tried=scores[:3]).is_unimodal(2) and not found.is_unimodal(2)


def test_the_setting_has_all_digits_of_levels_that_the_user_gave(first):
    settings = replace(first.config.methods["cm"], sampling_levels=[[0.8], [0.8123456789, 1e-05]])
    tuned = [replace(first.config, methods={"cm": settings})]
    setting = Tuning("cm", "", "fid", "lower", 4, [], [], [], 0, [], tuned).setting
    assert setting == "methods.cm.sampling_levels=[[0.8],[0.8123456789,1e-05]]"
    (read,) = compose_runs([*WORDS, "methods=[cm]", setting], first.registry)
    assert read.methods["cm"].sampling_levels == settings.sampling_levels


def test_a_training_is_given_the_defaults_of_settings_of_sampling(ran, tmp_path, monkeypatch):
    """So its scores along the way, which all such settings share, do not depend on the first one that trained it."""
    seen = []
    monkeypatch.setattr(cell_training, "build", lambda cell, *given: seen.append(cell.method_config) or 1 / 0)
    cell, _ = ran.planned(sampling_levels=[[0.5]], mu=0)
    assert cell_training.train_cell(cell, {}, tmp_path, Progress(None), Stop()).status == "failed"
    assert seen == [replace(cell.method_config, sampling_levels=[])] and seen[0].mu == 0


def test_a_plan_refuses_levels_outside_the_grid(first):
    with pytest.raises(UserError, match="cm: sampling_levels must lie between the ends of its grid"):
        first.planned(sampling_levels=[[900]])
