"""``distillbench tune``: equal trials, on seeds and noise that the final rows never see, and their cost."""

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch
from rich.console import Console

from distillbench import Method, MethodConfig, Metric, UserError, option
from distillbench.cli import command_options, commands
from distillbench.diffusion.noise import Noise, stream_key
from distillbench.execution.run import run
from distillbench.execution.workers import Scan
from distillbench.options import Among, Between
from distillbench.registry import Entry, Plugin, load_registry
from distillbench.runs import cell as cell_module
from distillbench.runs.cell_result import CellDescription, CellResult
from distillbench.runs.config import compose_runs
from distillbench.runs.executor_config import LocalConfig, RayConfig, SubmititConfig
from distillbench.runs.plan import plan
from distillbench.runs.shared_context import SharedContext
from distillbench.system.progress import Progress
from distillbench.system.signals import Interrupted, Stop
from distillbench.tuning.prepare import SEARCH, prepare, read_settings
from distillbench.tuning.search import Search, open_studies
from distillbench.tuning.settings import TotalConfig, TuneConfig
from distillbench.tuning.studies import SeededSampler, promoted
from distillbench.tuning.trials import Outcome, Trial, best_of, write_trials
from distillbench.tuning.tune import introduction, search_cost, tune

TARGET, SPREAD, IMAGES, BUDGET = 0.3, 0.05, 20, 96


@dataclass
class KnobConfig(MethodConfig):
    gain: float = option(0.8, "the mean of its samples", search=Between(0.01, 1.0, log=True))
    shift: float = option(0.0, "added with two evaluations", sampling=True, search=Between(-0.5, 0.5))
    ends: str = option("well", "how it ends", search=Among(["well", "fails", "diverges", "is refused"]))

    def __post_init__(self):
        super().__post_init__()
        if self.ends == "is refused":
            raise UserError("ends must not be refused")


class Knob(Method):
    """Its samples are `gain` and a little noise: its score is known without training."""

    name, paper, needs_data = "knob", "none", False
    Config = KnobConfig

    def at_T(self, eps):
        return torch.full((len(eps), 1, 1, 1), self.teacher.schedule.t_max, dtype=torch.float64)

    def train_step(self, batch):
        if self.config.ends == "fails":
            raise RuntimeError("as asked")
        eps = batch.noise()
        loss = (self.student(eps, self.at_T(eps)) - eps).square().mean()
        yield self.student, loss * (float("nan") if self.config.ends == "diverges" else 1.0)

    def supports(self, nfe):
        return nfe <= 2

    def sample(self, noise, nfe, c):
        mean = self.config.gain + (self.config.shift if nfe == 2 else 0.0)
        nothing = sum(0 * self.student(noise(0), self.at_T(noise(0))) for _ in range(nfe))
        return nothing + mean + SPREAD * noise(0)


class Dial(Knob):
    """The same, under another name."""

    name = "dial"


class OffTarget(Metric):
    name, unit, direction, protocol = "off_target", "", "lower", "off_target/1"

    def score(self, samples):
        return abs(samples.x_0.double().mean().item() - TARGET)


class OnTarget(OffTarget):
    name, direction, protocol = "on_target", "higher", "on_target/1"

    def score(self, samples):
        return -super().score(samples)


WORDS = [
    *("dataset=gmm", "teacher=gmm", "experiment=smoke", "device=cpu", "dataset.count=200", "estimate_seconds=0"),
    *(f"budget.images={BUDGET}", "batch_size=32", f"evaluation.images={IMAGES}", "evaluation.timing=off"),
    *("evaluation.metrics=[off_target,on_target]", "evaluation.teacher_steps=[1,2]", "evaluation.progress_every=0"),
]


@pytest.fixture(scope="module")
def registry():
    known, plugin = load_registry(), Plugin("knobs", "stranger", "1.0")
    metrics = known.metrics | {cls.name: Entry(cls, plugin) for cls in (OffTarget, OnTarget)}
    return replace(
        known, methods=known.methods | {cls.name: Entry(cls, plugin) for cls in (Knob, Dial)}, metrics=metrics
    )


@pytest.fixture(scope="module")
def ready(registry, tmp_path_factory):
    """A function of words that prepares the tuning of them."""

    def prepared(results, *words, methods="knob"):
        words = [*WORDS, f"methods=[{methods}]", *words, f'results_dir="{results}"']
        return prepare(*read_settings(words, registry), registry)

    return prepared


def score(gain, purpose, seed=0):
    """The mean of the samples, from their noise."""
    eps = Noise(stream_key(purpose, seed), range(IMAGES), (2, 1, 1))(0)
    return abs((gain + SPREAD * eps).clamp(-1, 1).double().mean().item() - TARGET)


# --- whole tunings ---------------------------------------------------------------------------------------------------


@dataclass
class Tuned:
    folder: Path
    table: pd.DataFrame
    trained: list  # (method, training seed, gain) of each training
    streams: dict  # of noise, before and after the search
    said: str

    @property
    def trials(self):
        trials = pd.read_parquet(self.folder / "trials.parquet")
        assert list(trials) == list(pd.read_csv(self.folder / "trials.csv"))
        return trials

    def rows(self, method):
        return self.table[self.table["method"] == method]


def go(tuning, registry):
    """The tuning, with all that it trained, and the streams of all noise that it drew."""
    log, trained, streams = io.StringIO(), [], {"search": set(), "final": set()}
    train, init, searched = cell_module.train_cell, Noise.__init__, Search.run
    now = "search"

    def counted(cell, *given, **named):
        trained.append((cell.name, cell.seed, cell.method_config.gain))
        return train(cell, *given, **named)

    def noted(self, stream, *others, **named):
        streams[now].add(stream)
        init(self, stream, *others, **named)

    def then_final(self):
        nonlocal now
        now = "search"
        searched(self)
        now = "final"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell_module, "train_cell", counted)
        patch.setattr(Noise, "__init__", noted)
        patch.setattr(Search, "run", then_final)
        done = tune(tuning, registry, Progress(Console(file=log, width=300)), lambda rows: None, Stop())
    assert (done.trained == 0) == (not trained)
    return Tuned(done.outcome.folder, done.outcome.table, trained, streams, log.getvalue())


WHOLE = ["tune.trials=4", "run_name=here", "tune.search_seeds=[7]", "tune.final_seeds=[3,4]", "evaluation.seeds=[0,1]"]
WHOLE += ["tune.sampler_seed=50", "tune.after=[shift]", "tune.after_trials=3"]


@pytest.fixture(scope="module")
def tuned(ready, registry, tmp_path_factory):
    """Two methods with four trials each."""
    return go(ready(tmp_path_factory.mktemp("tuned"), *WHOLE, methods="knob,dial"), registry)


def mean_score(gain, purpose):
    return sum(score(gain, purpose, seed) for seed in (0, 1)) / 2


def test_each_method_gets_as_many_trials_and_failed_ones_count(tuned):
    trials = tuned.trials
    for method in ("knob", "dial"):
        own = trials[trials["method"] == method]
        assert own["trial"].tolist() == list(range(4))
        assert json.loads(own["setting:gain"].iloc[0]) == KnobConfig().gain  # first the defaults
        ends = own["setting:ends"].map(json.loads)
        wanted = ends.map({"well": "ok", "fails": "failed", "diverges": "diverged", "is refused": "failed"})
        assert own["status"].tolist() == wanted.tolist() and set(ends) >= {"well", "fails", "diverges"}
        assert own["score"].isna().tolist() == (own["status"] != "ok").tolist()
        assert own["reason"].fillna("").str.contains("as asked").tolist() == (ends == "fails").tolist()
        assert (own["reason"].fillna("") != "").tolist() == (own["status"] != "ok").tolist()
    # the methods have the same settings: they get the same random numbers, so the same trials and scores
    same = [trials[trials["method"] == name].drop(columns=["method", "train_seconds"]) for name in ("knob", "dial")]
    assert same[0].reset_index(drop=True).equals(same[1].reset_index(drop=True))
    assert set(trials["metric"]) == {"off_target"} and set(trials["nfe"]) == {1}
    assert "knob (1 of 2 methods): trial 0, 1 of 4 done: off_target" in tuned.said


def test_the_final_rows_are_of_the_best_trial_on_seeds_and_noise_that_the_search_never_saw(tuned):
    trials = tuned.trials[tuned.trials["method"] == "knob"]
    ok = trials[trials["status"] == "ok"]
    for own in ok.to_dict("records"):
        assert own["score"] == pytest.approx(mean_score(json.loads(own["setting:gain"]), SEARCH), abs=1e-6)
    best = ok.loc[ok["score"].idxmin()]
    gain = json.loads(best["setting:gain"])
    assert best["trial"] > 0
    rows = tuned.rows("knob")
    rows = rows[rows["nfe"] == 1].to_dict("records")
    assert [(row["training_seed"], row["sampling_seed"]) for row in rows] == [(3, 0), (3, 1), (4, 0), (4, 1)]
    for row in rows:
        assert row["off_target"] == pytest.approx(score(gain, "evaluation", row["sampling_seed"]), abs=1e-6)
        assert f"gain={gain}" in row["settings"]
    finals = [one for one in tuned.trained if one[1] != 7]
    assert sorted(finals) == sorted((name, seed, gain) for name in ("knob", "dial") for seed in (3, 4))


def test_settings_of_sampling_are_searched_after_training_which_trains_nothing(tuned):
    trials = pd.read_parquet(tuned.folder / "sampling_trials.parquet")
    assert trials["method"].tolist() == ["knob"] * 3 + ["dial"] * 3 and set(trials["nfe"]) == {2}
    assert set(trials["train_images"]) == {0} and "setting:shift" not in tuned.trials
    own, searched = trials[trials["method"] == "knob"], tuned.trials
    searched = searched[searched["status"] == "ok"]
    gain = json.loads(searched.loc[searched["score"].idxmin(), "setting:gain"])
    for one in own.to_dict("records"):
        shift = json.loads(one["setting:shift"])
        assert one["score"] == pytest.approx(mean_score(gain + shift, SEARCH), abs=1e-6)
    shift = json.loads(own.loc[own["score"].idxmin(), "setting:shift"])
    assert shift != 0
    rows = tuned.rows("knob")
    for row in rows[rows["nfe"] == 2].to_dict("records"):
        assert row["off_target"] == pytest.approx(score(gain + shift, "evaluation", row["sampling_seed"]), abs=1e-6)
        assert f"shift={shift}" in row["settings"]
    assert len([one for one in tuned.trained if one[1] == 7]) == 8  # four trials of two methods
    chosen = json.loads((tuned.folder / "tuning.json").read_text())["chosen"]["knob"]
    assert chosen["sampling"]["settings"] == {"shift": shift} and chosen["training"]["settings"]["gain"] == gain


def test_no_noise_of_the_search_is_in_the_final_samples(tuned):
    search, final = tuned.streams["search"], tuned.streams["final"]
    assert {stream_key(SEARCH, seed) for seed in (0, 1)} <= search and not search & final
    assert {stream_key("evaluation", seed) for seed in (0, 1)} <= final
    # the scores that are reported are none of the search's
    assert not set(tuned.trials["score"].dropna()) & set(tuned.table["off_target"].dropna())


def test_the_rows_name_the_protocol_and_the_cost(tuned):
    trials = tuned.trials[tuned.trials["method"] == "knob"]
    row = tuned.rows("knob").to_dict("records")[0]
    assert (row["tuning"], row["tuning_trials"]) == ("equal_trials", 4)
    ok, refused = trials["status"] == "ok", trials["setting:ends"] == '"is refused"'
    failed = int((~ok & ~refused).sum())
    assert trials["train_images"][ok].tolist() == [BUDGET] * int(ok.sum())
    assert trials["train_images"][refused].tolist() == [0] * int(refused.sum())
    assert row["tuning_images"] == BUDGET * (int(ok.sum()) + failed)
    assert f"tuning_images with the whole budget for {failed} failed trials" in row["reason"]
    seconds = trials["train_seconds"]  # failed ones are charged as much as the most expensive
    assert row["tuning_seconds"] == pytest.approx(seconds.sum() + failed * seconds.max())
    assert f"tuning_seconds with that of the most expensive trial for {failed} failed trials" in row["reason"]
    assert pd.isna(row["tuning_joules"]) and "tuning_joules empty" in row["reason"]
    assert row["tuning_sampling_nfe"] == 3 * 2 * IMAGES * 2  # trials, evaluations, images, sampling seeds
    teacher = tuned.rows("teacher:ddim")
    assert teacher["tuning"].fillna("").tolist() == [""] * len(teacher) and teacher["tuning_trials"].isna().all()


@pytest.mark.nightly
def test_defaults_are_those_of_a_run(ready, registry, tmp_path):
    done = go(ready(tmp_path / "tuned", "tune.protocol=defaults"), registry)
    assert not (done.folder / "trials.csv").exists()
    configs = compose_runs([*WORDS, "methods=[knob]", "seed=0,1", f'results_dir="{tmp_path / "run"}"'], registry)
    usual = run(plan(configs, registry), configs, Progress(None), lambda rows: None).table
    same = ["method", "training_seed", "nfe", "off_target", "on_target", "settings", "key"]
    assert done.table[same].equals(usual[same])
    row = done.rows("knob").iloc[0]
    assert (row["tuning"], row["tuning_trials"], row["tuning_images"], row["tuning_joules"]) == ("defaults", 0, 0, 0)
    assert usual["tuning"].fillna("").eq("").all()


# --- the search, with cells that take no time ------------------------------------------------------------------------


class Pretend:
    """An executor whose trainings take no time. What is in `done` is found again; `claimed`: others run these."""

    poll_seconds = 0.0

    def __init__(self, version=""):
        self.version, self.done, self.trained, self.claimed, self.end_after = version, {}, [], set(), None

    def key(self, cell):
        return (cell.name, cell.seed, cell.method_config.gain, cell.method_config.ends, self.budget(cell))

    def budget(self, cell):
        return cell.shared.config.budget.images

    def scan(self, cells, policy):
        described = [
            CellDescription("", {}, [], Path(), {}, {"": f"{self.key(cell)} {self.version}"}) for cell in cells
        ]
        return Scan(described, [self.done.get(self.key(cell)) for cell in cells], {})

    def run(self, todo, policy):
        for index, (cell, description) in todo.items():
            if self.key(cell) in self.claimed:
                yield index, None
                continue
            if len(self.trained) == self.end_after:
                raise Interrupted("SIGINT")
            self.trained.append(self.key(cell))
            own = cell.method_config
            ok = own.ends == "well"
            off = abs(own.gain - TARGET) * (1 if self.budget(cell) == BUDGET else 2)
            row = {"status": "ok" if ok else "failed", "reason": "" if ok else "as asked"}
            row |= {"off_target": off if ok else None, "on_target": -off if ok else None}
            row |= {
                "train_images": self.budget(cell) if ok else None,
                "train_seconds": 2.0 if ok else None,
            }
            self.done[self.key(cell)] = CellResult(description, [row])
            yield index, self.done[self.key(cell)]


@pytest.fixture(scope="module")
def bases(ready, tmp_path_factory):
    """Prepared tunings, by pruning."""
    results = tmp_path_factory.mktemp("bases")
    words = ["tune.trials=4", "batch_size=8"]
    return {how: ready(results, *words, f"tune.pruning={how}", methods="knob,dial") for how in ("none", "halving")}


@pytest.fixture
def tuning(bases, tmp_path, monkeypatch):
    """A function of settings tune.* that gives a tuning in a folder of its own, whose journals are not flushed."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def changed(place="here", methods=("knob",), pruning="none", ends=None, **settings):
        base = bases[pruning]
        spaces = {name: dict(base.spaces[name]) for name in methods}
        for space in spaces.values():
            space["ends"] = Among(ends) if ends else space["ends"]
        config = replace(
            base.config, results_dir=str(tmp_path), run_name=place, methods={m: base.config.methods[m] for m in methods}
        )
        cells = {share: [cell for cell in own if cell.name in methods] for share, own in base.cells.items()}
        changes = {"final": [config], "cells": cells, "spaces": spaces}
        goal = replace(base.goal, metric="on_target", direction="higher") if settings.pop("high", False) else base.goal
        return replace(base, tune=replace(base.tune, **settings), goal=goal, **changes)

    return changed


def searched(tuning, executor):
    """The trials of the first method after a search."""
    studies = open_studies(tuning, executor)
    search = Search(tuning, studies, executor, Progress(None), lambda: None)
    search.run()
    return [trial for name in studies for trial in search.trials(name)]


def test_a_search_that_was_cut_off_goes_on_as_if_it_had_not_been(tuning):
    both, whole = {"methods": ("knob", "dial"), "trials": 8}, Pretend()
    trials = searched(tuning("whole", **both), whole)
    assert len(trials) == 16
    parts = Pretend()
    for parts.end_after in (0, 3, 4):
        with pytest.raises(Interrupted):
            searched(tuning("parts", **both), parts)
    parts.end_after = None
    assert searched(tuning("parts", **both), parts) == trials
    assert sorted(parts.trained) == sorted(whole.trained)  # each once


def test_more_trials_go_on_from_those_that_are_there(tuning):
    whole, fewer = searched(tuning("whole", trials=9), Pretend()), searched(tuning("parts", trials=4), Pretend())
    more = Pretend()
    assert fewer == whole[:4] and searched(tuning("parts", trials=9), more) == whole
    assert len(more.trained) <= 5


def test_a_trial_that_another_process_runs_is_left_to_it(tuning, monkeypatch):
    """The search goes on with the next trials, and waits at its end."""
    mine, executor = tuning(trials=4, search_seeds=[7, 8]), Pretend()
    defaults = Trial("knob", 0, {"gain": KnobConfig().gain})
    first = [executor.key(cell) for cell in Search(mine, {}, executor, Progress(None), print).cells_of(defaults, 1.0)]
    executor.claimed = {first[1]}
    waited = []

    def until_it_is_free(seconds):
        waited.append(len(executor.trained))
        executor.claimed = set()

    monkeypatch.setattr(time, "sleep", until_it_is_free)
    trials = searched(mine, executor)
    assert [trial.number for trial in trials] == [0, 1, 2, 3] and all(trial.outcome for trial in trials)
    assert executor.trained[-1] == first[1] and waited == [len(executor.trained) - 1]  # the other three were done
    assert trials[0].outcome.score == pytest.approx(0.5) and trials[0].outcome.costs["train_images"] == 2 * BUDGET


def test_a_trial_that_another_process_ended_is_as_it_ended(tuning):
    mine, executor = tuning(trials=1), Pretend()
    study = open_studies(mine, executor)["knob"]
    trial = study.ask()
    study.tell(trial, Outcome("ok", 0.25))
    study.tell(trial, Outcome("failed", None, "too late"))
    assert [one.outcome.score for one in study.trials(1)] == [0.25] and searched(mine, executor) == study.trials(1)
    assert not executor.trained


def test_a_journal_whose_last_entry_was_cut_off_goes_on(tuning):
    """As if its process had been killed while it wrote."""
    whole = searched(tuning("whole", trials=4), Pretend())
    searched(tuning("parts", trials=3), Pretend())
    journal = tuning("parts").folder / "tuning" / "knob.journal"
    text = journal.read_bytes()
    for cut in range(1, len(text) - text[:-1].rfind(b"\n"), 7):
        journal.write_bytes(text[:-cut])
        assert searched(tuning("parts", trials=4), Pretend()) == whole


def test_a_damaged_journal_is_refused(tuning):
    searched(tuning(trials=2), Pretend())
    journal = tuning().folder / "tuning" / "knob.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    for damaged in ([*lines[:3], b"{\n", *lines[3:]], [b"\0" * 99 + b"\n"]):
        journal.write_bytes(b"".join(damaged))
        with pytest.raises(UserError, match=r"the journal '.*knob.journal' is damaged: .*finds what it has trained"):
            searched(tuning(trials=2), Pretend())


@pytest.mark.parametrize("number", [0, 2])
def test_a_process_that_was_killed_while_it_chose_a_trial_loses_none(tuning, number):
    whole = searched(tuning("whole", trials=4), Pretend())
    if number:
        searched(tuning("parts", trials=number), Pretend())
    study = open_studies(tuning("parts", trials=4), Pretend())["knob"]
    if not number:
        study.study.enqueue_trial({"gain": KnobConfig().gain, "ends": json.dumps("well"), "lr": KnobConfig().lr})
    study.study.ask().suggest_float("lr", study.space["lr"].low, study.space["lr"].high, log=True)
    assert len(study.trials(4)) == number
    assert searched(tuning("parts", trials=4), Pretend()) == whole


def test_a_score_that_cannot_be_measured_is_refused(tuning, monkeypatch):
    monkeypatch.setattr(SharedContext, "unavailable_metrics", lambda self: {"off_target": "no weights"})
    with pytest.raises(UserError, match="off_target cannot be measured, and the search optimises it: no weights"):
        open_studies(tuning(), Pretend())


def test_other_settings_do_not_go_on_with_a_search(tuning):
    searched(tuning(trials=1), Pretend())
    others = [({"sampler_seed": 1}, ""), ({"sampler": "random"}, ""), ({"ends": ["well"]}, ""), ({}, "2")]
    for settings, version in others:
        with pytest.raises(UserError, match=r"search of knob in .*here' was begun with other settings, or .*run_name"):
            searched(tuning(trials=1, **settings), Pretend(version=version))


@pytest.mark.parametrize(("limit", "each"), [("images", BUDGET), ("seconds", 2)])
def test_a_total_budget_pays_for_trials_failed_ones_too(tuning, limit, each):
    """They are charged as much as the most expensive."""
    for total, count in [(5 * each, 5), (6 * each - 1, 5), (each // 2, 1)]:
        total = TotalConfig(limit=limit, **{limit: total})
        mine = tuning(f"{count} {total.amount}", protocol="self_tuned", total=total, trials=50, ends=["well", "fails"])
        assert len(searched(mine, Pretend())) == count
    total = TotalConfig(limit=limit, **{limit: 100 * each})
    assert len(searched(tuning("most", protocol="self_tuned", total=total, trials=3), Pretend())) == 3


def test_trials_that_are_chosen_together_keep_to_a_total_budget(tuning):
    """Of which nothing is known before the first trial has ended."""
    total = TotalConfig(limit="seconds", seconds=2 * 2)
    mine = tuning(protocol="self_tuned", total=total, trials=50, at_once=8, ends=["well", "fails"])
    assert len(searched(mine, Pretend())) == 2


def test_what_is_limited_must_be_measured(tuning):
    total = TotalConfig(limit="joules", joules=10)
    with pytest.raises(UserError, match=r"tune.total.limit=joules: they are not measured here"):
        searched(tuning(protocol="self_tuned", total=total), Pretend())


def test_the_score_may_be_one_that_is_best_when_high(tuning):
    trials = searched(tuning(trials=12, high=True), Pretend())
    best = best_of(trials, "higher")
    ok = [trial for trial in trials if trial.outcome.status == "ok"]
    assert best.outcome.score == max(trial.outcome.score for trial in ok) > ok[0].outcome.score
    assert abs(best.settings["gain"] - TARGET) == min(abs(trial.settings["gain"] - TARGET) for trial in ok)


@pytest.mark.nightly
def test_the_sampler_learns_which_trials_fail(tuning):
    """One of four ways to end is good. Random settings find it in a quarter of the trials."""
    trials = searched(tuning(trials=40), Pretend())
    assert sum(trial.settings["ends"] == "well" for trial in trials[20:]) >= 12
    gains = [trial.settings["gain"] for trial in trials if trial.outcome.status == "ok"]
    assert min(abs(gain - TARGET) for gain in gains) < 0.03
    assert all(float(f"{gain:.4g}") == gain for gain in gains)


def test_trials_may_be_chosen_together(tuning):
    """The next are chosen when all of them have ended."""
    rounds = []

    class Counted(Pretend):
        def run(self, todo, policy):
            rounds.append(len(todo))
            yield from super().run(todo, policy)

    mine = tuning(trials=7, at_once=3, ends=["well", "fails"])
    assert len(searched(mine, Counted())) == 7 and rounds == [3, 3, 1]
    workers = replace(mine.config, executor=LocalConfig(kind="local", workers=5), isolate=True)
    at_once = lambda config, **tune: replace(mine, tune=TuneConfig(**tune), final=[config]).at_once
    assert at_once(workers) == 5 and at_once(replace(workers, methods={1: 1, 2: 2})) == 3
    assert at_once(workers, at_once=2) == 2


@pytest.mark.parametrize("cluster", [SubmititConfig("submitit"), RayConfig("ray")])
def test_on_a_cluster_trials_are_chosen_one_after_the_other_unless_asked(tuning, cluster):
    """How many jobs run there at a time is not known."""
    mine = tuning()
    mine = replace(mine, final=[replace(mine.config, executor=cluster, isolate=True)])
    assert mine.at_once == 1 and replace(mine, tune=TuneConfig(at_once=4)).at_once == 4


# --- halving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["lower", "higher"])
def test_trials_that_go_on_are_those_of_optunas_successive_halving(direction):
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=4, min_early_stopping_rate=0)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction={"lower": "minimize", "higher": "maximize"}[direction], pruner=pruner)
    generator, scores = torch.Generator().manual_seed(0), []
    for _ in range(60):
        value = torch.rand((), generator=generator).item()
        trial = study.ask()
        trial.report(value, 1)
        assert promoted(value, scores, direction) == (not trial.should_prune())
        study.tell(trial, value)
        scores.append(value)
    assert not promoted(None, scores, direction)


def test_halving_ends_trials_after_a_quarter_and_counts_what_it_saves(tuning):
    halving = {"trials": 20, "pruning": "halving"}
    mine, executor = tuning("whole", **halving), Pretend()
    trials = searched(mine, executor)
    quarter = BUDGET // 4
    assert {cells[0].shared.config.budget.images for cells in mine.cells.values()} == {quarter, BUDGET}
    by_status = {
        status: [one for one in trials if one.outcome.status == status] for status in ("ok", "pruned", "failed")
    }
    ok, pruned = by_status["ok"], by_status["pruned"]
    assert trials[0] in ok and len(pruned) > 3 and len(ok) + len(pruned) + len(by_status["failed"]) == 20
    assert {one.outcome.costs["train_images"] for one in ok} == {quarter + BUDGET}
    assert {one.outcome.costs["train_images"] for one in pruned} == {quarter}
    assert {one.outcome.score for one in pruned} == {None}
    assert all("after 25% of the budget off_target was" in one.outcome.reason for one in pruned)
    assert sum(images == BUDGET for *_, images in executor.trained) == len({str(one.settings) for one in ok})
    # the cost of the method is what was trained: the saving is in it
    failed = [one.outcome for one in trials if one.outcome.costs["train_images"] is None]
    assert failed and {one.share for one in failed} == {0.25}  # they end at once: only a quarter was at stake
    columns = search_cost(mine, trials, ok[0])
    trained = len(ok) * (quarter + BUDGET) + len(pruned) * quarter
    assert columns["tuning_images"] == trained + len(failed) * quarter
    assert f"for {len(failed)} failed trials ({len(failed)} of them: a quarter)" in columns["reason"]
    assert columns["tuning_seconds"] == 4.0 * len(ok) + 2.0 * (len(pruned) + len(failed))
    late = replace(trials[0], outcome=Outcome("failed"))
    assert search_cost(mine, [trials[0], late], trials[0])["tuning_images"] == 2 * (quarter + BUDGET)
    # cut off between the quarter and the whole budget, it ends in the same way
    parts = Pretend()
    for parts.end_after in range(1, 9):
        with pytest.raises(Interrupted):
            searched(tuning("parts", **halving), parts)
    parts.end_after = None
    assert searched(tuning("parts", **halving), parts) == trials


def test_what_goes_on_after_a_quarter_is_decided_once(tuning):
    """By the trials that came before, also where another process looks at it later."""
    mine = tuning(trials=2, pruning="halving", ends=["well", "fails"])
    study = open_studies(mine, Pretend())["knob"]
    first, second = study.ask(), study.ask()
    search = Search(mine, {"knob": study}, Pretend(), Progress(None), lambda: None)
    assert search._goes_on(first, Outcome("ok", 0.9), 0.25) and search._goes_on(second, Outcome("ok", 0.5), 0.25)
    third, best = study.ask(), study.ask()
    assert not search._goes_on(third, Outcome("ok", 0.7), 0.25) and search._goes_on(best, Outcome("ok", 0.1), 0.25)
    other = Search(mine, open_studies(mine, Pretend()), Pretend(), Progress(None), lambda: None)
    assert other._goes_on(second, Outcome("ok", 0.5), 0.25)  # though it is not the best by now
    assert [one.outcome and one.outcome.status for one in study.trials(4)] == [None, None, "pruned", None]


# --- the sampler -----------------------------------------------------------------------------------------------------


def test_a_trial_has_random_numbers_of_its_own_number():
    """Not of how many trials this process has asked for: so a search can go on anywhere."""

    def chosen(numbers, seed=0):
        study, found = optuna.create_study(sampler=SeededSampler("random", seed)), {}
        for number in range(max(numbers) + 1):
            if number not in numbers:  # as if another process had asked for it
                study.add_trial(optuna.create_trial(value=1.0))
                continue
            trial = study.ask()
            found[trial.number] = trial.suggest_float("lr", 1e-5, 1, log=True), trial.suggest_int("steps", 1, 99)
        return found

    all_of_them = chosen(range(4))
    assert len(set(all_of_them.values())) == 4
    assert chosen([2]) == {2: all_of_them[2]} and chosen([2], seed=1)[2] != all_of_them[2]


# --- the command -----------------------------------------------------------------------------------------------------


def command(registry, results, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_options, "load_plugins", lambda folders: registry)
        try:
            commands.main(["tune", *WORDS, f'results_dir="{results}"', *words])
        except SystemExit as done:
            return done.code
    return 0


def test_a_finished_tuning_is_printed_again_and_nothing_is_trained(registry, tuned, capsys, monkeypatch):
    monkeypatch.setattr(cell_module, "train_cell", None)
    files = ["trials.parquet", "sampling_trials.parquet", "table.parquet", "tuning.json"]
    before = [(tuned.folder / name).read_bytes() for name in files]
    assert command(registry, tuned.folder.parent, "methods=[knob,dial]", *WHOLE) == 0
    said = capsys.readouterr().out
    assert "nothing was trained: all trials and final trainings were found" in said
    assert f"search of knob: 4 trials, 1 diverged, 1 failed, {4 * BUDGET} training images" in said
    assert [(tuned.folder / name).read_bytes() for name in files] == before


def test_final_trainings_that_failed_are_done_again_when_asked(registry, tmp_path, monkeypatch):
    train, trained = cell_module.train_cell, []

    def fails_at_first(cell, *given):
        trained.append(cell.name)
        ends = "fails" if len(trained) == 1 else "well"
        return train(replace(cell, method_config=replace(cell.method_config, ends=ends)), *given)

    monkeypatch.setattr(cell_module, "train_cell", fails_at_first)
    words = ["methods=[knob]", "tune.protocol=defaults", "tune.final_seeds=[0]"]
    assert [command(registry, tmp_path, *words) for _ in range(2)] == [1, 1] and len(trained) == 1
    assert command(registry, tmp_path, *words, "--retry-failed") == 0 and len(trained) == 2


def test_the_cost_is_said_before(registry, tmp_path, capsys):
    words = ["methods=[knob]", "tune.trials=5", "tune.search_seeds=[7,8]", "tune.after=[shift]", "tune.after_trials=3"]
    assert command(registry, tmp_path, *words, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"search of knob: 10 trainings, {10 * BUDGET} images, 0 evaluations of the teacher" in said
    assert f"{10 * IMAGES} in sampling" in said and "dry run: nothing was run" in said
    assert f"{3 * 2 * 2 * IMAGES} evaluations of the student, for each of: knob" in said
    assert not any(tmp_path.iterdir())
    assert command(registry, tmp_path, *words, "--show-config") == 0
    assert "search_seeds:\n  - 7\n  - 8" in capsys.readouterr().out


def test_values_that_are_given_are_those_of_trial_0_and_that_is_said(ready, registry, tmp_path):
    begun = ready(tmp_path, "methods.knob.gain=0.5", "methods.knob.shift=0.25", "tune.after=[shift]")
    assert begun.defaults("knob")["gain"] == 0.5
    line = "knob: trial 0 has gain=0.5 as given, and the others search these settings, too"
    assert line in introduction(begun, registry)
    assert not any("as given" in line for line in introduction(ready(tmp_path), registry))


def test_rows_without_a_search_are_not_put_beside_the_trials_of_one(ready, registry, tmp_path):
    begun = ready(tmp_path, "run_name=here", "tune.protocol=defaults")
    write_trials([Trial("knob", 0, {}, Outcome("ok", 0.5))], "off_target", 1, begun.folder)
    with pytest.raises(UserError, match=r"here' has the trials of a search: give this tuning another run_name"):
        go(begun, registry)


WRONG = {
    "tune.trails=3": "no setting 'trails' in 'tune'. Did you mean 'trials'?",
    "tune.protocol=self": "tune.protocol must be one of equal_trials, self_tuned, defaults, got 'self'",
    "tune.protocol=self_tuned": "protocol self_tuned needs tune.total.images=N",
    "tune.final_seeds=[1,1000]": "tune.final_seeds must not be among search_seeds",
    "tune.search_seeds=[]": "tune.search_seeds must list different numbers",
    "tune.trials=1,2": "tune.* takes one value of each setting",
    "tune.after_trials=0": "tune.after_trials must lie between",
    "tune.total.limit=joule": "Did you mean 'joules'?",
    "seed=0,1": "tune has seeds of its own, tune.search_seeds and tune.final_seeds",
    "budget.images=64,96": "these span 2 runs",
    "tune.metric=fidd": "no metric to optimise 'fidd'",
    "tune.nfe=3": "tune.nfe=3 must be a row of each method",
    "tune.after=[shif]": "no method has one of these settings of sampling and a row with tune.after_nfe=2",
    "evaluation.metrics=[spread]": "no score can be optimised",
}


@pytest.mark.parametrize("word", WRONG)
def test_wrong_settings_have_one_message(ready, tmp_path, word):
    with pytest.raises(UserError) as error:
        ready(tmp_path, word)
    assert WRONG[word] in str(error.value) and "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_the_command_refuses_ranks_and_prints_errors(registry, tmp_path, capsys, monkeypatch):
    assert command(registry, tmp_path, "methods=[knob]", "tune.trials=0") == 2
    assert capsys.readouterr().err == "error: tune.trials must lie between 1 and 100000, got 0\n"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(registry, tmp_path, "methods=[knob]") == 2
    assert "tune uses one process: start it without torchrun" in capsys.readouterr().err


# --- real processes --------------------------------------------------------------------------------------------------

REAL = ["methods=[boot,cm]", "tune.trials=4", "run_name=here", "tune.final_seeds=[0]", "evaluation.nfe=[1]"]
REAL += ["evaluation.metrics=[teacher_rmse]"]


def started(results, *words):
    line = [sys.executable, "-m", "distillbench", "tune", *WORDS, *REAL, f'results_dir="{results}"', *words]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def table_of(results, name):
    table = pd.read_csv(results / "here" / f"{name}.csv")
    return table[[column for column in table if "seconds" not in column and "mib" not in column]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    results = tmp_path_factory.mktemp("alone")
    process = started(results)
    assert process.wait() == 0, process.stdout.read()
    return results


@pytest.mark.nightly
def test_a_killed_search_goes_on_with_other_workers_to_the_same_end(alone, tmp_path):
    process = started(tmp_path)
    while not (tmp_path / "here" / "trials.csv").is_file():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert len(pd.read_csv(tmp_path / "here" / "trials.csv")) < 8
    process = started(tmp_path, "executor.workers=2", "isolate=true")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    for name in ("trials", "table"):
        assert table_of(tmp_path, name).equals(table_of(alone, name))


@pytest.mark.nightly
def test_two_processes_share_a_search(tmp_path):
    processes = [started(tmp_path), started(tmp_path)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    trials = pd.read_csv(tmp_path / "here" / "trials.csv")
    assert trials["trial"].tolist() == [0, 1, 2, 3] * 2 and set(trials["status"]) == {"ok"}
    records = [json.loads(file.read_bytes()) for file in tmp_path.glob("cells/*/train.json")]
    assert sum(record["inputs"]["seed"] == 1000 for record in records) == 8
    counts = [one.count("of 4 done") for one in said]
    assert sum(counts) >= 8 and min(counts) > 0  # a trial that both saw is said twice, and was trained once
