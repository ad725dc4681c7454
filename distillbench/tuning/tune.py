"""A tuning: search of each method's settings -> best trial -> final trainings on seeds and noise that it never saw."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pandas as pd

from distillbench.errors import UserError, counted
from distillbench.execution.executors import executor_of
from distillbench.execution.run import run
from distillbench.execution.run_folder import Outcome
from distillbench.metering.memory import release_memory
from distillbench.options import declares_search_space, default_of, plain_settings, with_settings
from distillbench.registry import Registry
from distillbench.reports.tuning_data import AFTER, SETTINGS_FILE, TRIALS
from distillbench.runs.cell import AS_IS, Policy
from distillbench.runs.plan import plan
from distillbench.runs.time_plan import about
from distillbench.storage.files import write_text
from distillbench.system.progress import Progress
from distillbench.system.signals import Stop
from distillbench.training.budget import Limit
from distillbench.tuning.prepare import Tuning, after_training, sampling_spaces
from distillbench.tuning.search import Search, open_studies
from distillbench.tuning.trials import Trial, best_of, spent, write_trials

NOT_OK = ("pruned", "diverged", "failed")


@dataclass(frozen=True)
class Tuned:
    """A finished tuning. `trained`: cells of search and final trainings that were not found."""

    outcome: Outcome
    trials: dict[str, list[Trial]]  # by method
    trained: int

    def lines(self, tuning: Tuning) -> list[str]:
        """What the search of each method came to."""
        return [_summary(name, trials, tuning) for name, trials in self.trials.items()]


def tune(
    tuning: Tuning, registry: Registry, progress: Progress, on_rows: Callable[[pd.DataFrame], None], stop: Stop,
    policy: Policy = AS_IS,
) -> Tuned:  # fmt: skip
    """Search, then train the best anew. On a request to stop it raises Interrupted; the same call goes on.

    `policy` is that of the final trainings: a trial is made once. Raises UserError where the folder has trials of a
    search and this tuning searches nothing: they are not of its rows.
    """
    if not tuning.tune.searches and (tuning.folder / f"{TRIALS}.csv").is_file():
        raise UserError(f"{str(tuning.folder)!r} has the trials of a search: give this tuning another run_name")
    for line in introduction(tuning, registry):
        progress.say(line)
    trials, trained = _search(tuning, progress, stop) if tuning.tune.searches else ({}, 0)
    best = {name: best_of(trials.get(name, []), tuning.goal.direction) for name in tuning.config.methods}
    _say_best(best, progress)
    methods, later = _with_best(tuning.config.methods, best), dict[str, Trial | None]()
    evaluations: dict[str, int] = {}
    if tuning.tune.after:
        good = {name: methods[name] for name, trial in best.items() if trial is not None}
        after = after_training(tuning, good, registry)
        found, more = _search(after, progress, stop) if after.spaces else ({}, 0)
        trained += more
        evaluations = {name: sampling_evaluations(after, of_method) for name, of_method in found.items()}
        later = {name: best_of(of_method, after.goal.direction) for name, of_method in found.items()}
        _say_best(later, progress)
        methods = _with_best(methods, later)
    _write_settings(tuning, best, later)
    configs = [dataclasses.replace(config, methods=methods) for config in tuning.final]
    cells = plan(configs, registry)
    columns = {name: search_cost(tuning, trials.get(name, []), best[name], evaluations.get(name, 0)) for name in best}
    outcome = run(cells, configs, progress, on_rows, policy, stop, tuning=columns)
    return Tuned(outcome, trials, trained + outcome.fresh)


def introduction(tuning: Tuning, registry: Registry) -> list[str]:
    """What will be searched, and which methods declare no settings for it."""
    tune, goal = tuning.tune, tuning.goal
    methods = counted(len(tuning.config.methods), "method")
    seeds = ", ".join(map(str, tune.final_seeds))
    if not tune.searches:
        return [f"{methods} with their defaults, trained with seeds {seeds}: nothing is searched"]
    each = f"{tune.trials} trials" if tune.protocol == "equal_trials" else f"at most {tune.total.in_words}"
    lines = [
        f"search: {each} for each of {methods}, by {goal.metric} with {goal.nfe} NFE, on noise of its own; then the "
        f"best of each is trained with seeds {seeds}"
    ]
    lines += _begins(tuning, registry)
    if tune.after:
        lines.append(_after_introduction(tuning, registry))
    names = [name for name in tuning.spaces if not declares_search_space(registry.get("methods", name).cls.Config)]
    if names:
        lines.append(f"no search space of their own, so only what every method has is searched: {', '.join(names)}")
    return lines


def _begins(tuning: Tuning, registry: Registry) -> list[str]:
    """What the settings that were given mean where they are searched, too."""
    lines = []
    for name, space in tuning.spaces.items():
        kind = registry.get("methods", name).cls.Config
        own = tuning.defaults(name)
        given = [f"{setting}={own[setting]}" for setting in space if own[setting] != default_of(kind, setting)]
        if given:
            lines.append(f"{name}: trial 0 has {', '.join(given)} as given, and the others search these settings, too")
    return lines


def _after_introduction(tuning: Tuning, registry: Registry) -> str:
    """What will be searched after training, and for which methods."""
    tune, config = tuning.tune, tuning.config.evaluation
    evaluations = tune.after_trials * len(tune.search_seeds) * tune.after_nfe * config.images * len(config.seeds)
    return (
        f"after training: {tune.after_trials} trials of {', '.join(tune.after)} with {tune.after_nfe} NFE, "
        f"{evaluations:,} evaluations of the student, for each of: {', '.join(sampling_spaces(tuning, registry))}"
    )


def _search(tuning: Tuning, progress: Progress, stop: Stop) -> tuple[dict[str, list[Trial]], int]:
    """All trials by method, and how many cells were trained."""
    release_memory()  # of the plan: worker processes need the GPU
    goal = tuning.goal
    with closing(executor_of(tuning.config, progress, stop)) as executor:
        studies = open_studies(tuning, executor)

        def write() -> None:
            every = [trial for name in studies for trial in search.trials(name)]
            write_trials(every, goal.metric, goal.nfe, tuning.folder, TRIALS if tuning.trains else AFTER)

        search = Search(tuning, studies, executor, progress, write)
        search.run()
        write()
        return {name: search.trials(name) for name in studies}, search.trained if tuning.trains else 0


def _with_best(methods: Mapping[str, Any], best: Mapping[str, Trial | None]) -> dict[str, Any]:
    """The settings of all methods with those of their best trials; a method without one keeps its own."""
    chosen = {name: trial.settings for name, trial in best.items() if trial is not None}
    return {name: with_settings(config, chosen.get(name, {})) for name, config in methods.items()}


def _say_best(best: Mapping[str, Trial | None], progress: Progress) -> None:
    for name, trial in best.items():
        if trial is not None:
            settings = ", ".join(f"{setting}={value}" for setting, value in trial.settings.items())
            progress.say(f"{name}: best is trial {trial.number}, {settings}")


def search_cost(tuning: Tuning, trials: Sequence[Trial], best: Trial | None, sampling_nfe: int = 0) -> dict[str, Any]:
    """The columns of a method's final rows that say how its settings were found and what that cost.

    `sampling_nfe`: evaluations of the student in the search after training.
    """
    columns: dict[str, Any] = {"tuning": tuning.tune.protocol, "tuning_trials": len(trials)}
    why: list[str] = []
    for unit in ("images", "seconds", "joules"):
        total, how = charged(tuning, trials, unit)
        columns[f"tuning_{unit}"] = round(total) if unit == "images" and total is not None else total
        why += [f"tuning_{unit} {how}"] if how else []
    columns["tuning_sampling_nfe"] = sampling_nfe
    if trials and best is None:
        why.append("no trial is ok, so these are the defaults")
    return columns | ({"reason": "; ".join(why)} if why else {})


def charged(tuning: Tuning, trials: Sequence[Trial], unit: str) -> tuple[float | None, str]:
    """What all trials of a method cost in images, seconds or joules, and how failed ones are charged, in words.

    What a failed training took is not measured. It is charged with all images of its budget (of a quarter, if it failed
    in that), or as much as the most expensive trial took that ended there: never too little. None if a trial that is ok
    was not measured either, or if none was.
    """
    total, unmeasured = spent(trials, f"train_{unit}")
    failed = [trial.outcome for trial in unmeasured if trial.outcome is not None and trial.outcome.status != "ok"]
    if not unmeasured:
        return total, ""
    many = counted(len(unmeasured), "failed trial")
    if unit == "images" and tuning.config.budget.limit is Limit.images:
        early = sum(outcome.share < 1 for outcome in failed)
        note = f" ({early} of them: a quarter)" if early else ""
        at_stake = sum(tuning.most_images(trial.outcome.share) for trial in unmeasured if trial.outcome is not None)
        return total + at_stake, f"with the whole budget for {many}{note}"
    ended = [trial.outcome for trial in trials if trial.outcome is not None]
    measured = [(one.share, cost) for one in ended if (cost := one.costs.get(f"train_{unit}"))]
    if len(failed) < len(unmeasured) or not measured:
        return None, f"empty: not measured in {counted(len(unmeasured), 'trial')}"
    for outcome in failed:
        alike = [cost for share, cost in measured if share == outcome.share]
        total += max(alike or [cost for _, cost in measured])
    return total, f"with that of the most expensive trial for {many}"


def sampling_evaluations(tuning: Tuning, trials: Sequence[Trial]) -> int:
    """Evaluations of the student in the trials of a search after training; those that failed count in full."""
    evaluation = tuning.config.evaluation
    each = tuning.goal.nfe * evaluation.images * len(evaluation.seeds) * len(tuning.tune.search_seeds)
    return each * sum(trial.outcome is not None for trial in trials)


def _summary(method: str, trials: Sequence[Trial], tuning: Tuning) -> str:
    ended = [trial.outcome for trial in trials if trial.outcome is not None]
    counts = {status: sum(outcome.status == status for outcome in ended) for status in ("ok", *NOT_OK)}
    others = "".join(f", {count} {status}" for status, count in counts.items() if count and status != "ok")
    images, seconds = (charged(tuning, trials, unit)[0] for unit in ("images", "seconds"))
    saved = ""
    if counts["pruned"]:
        full = len(tuning.tune.search_seeds) * tuning.cells[1.0][0].shared.config.budget.images
        trained = sum(outcome.costs["train_images"] != 0 for outcome in ended)  # all but those that were refused
        saved = f"; without halving {trained * full:,} images"
    best = best_of(trials, tuning.goal.direction)
    chosen = "no trial is ok" if best is None else f"trial {best.number} was best"
    counted_images = "an unknown number of" if images is None else f"{images:,.0f}"
    cost = f"{counted_images} training images{'' if seconds is None else f' and {about(seconds)}'}{saved}"
    return f"search of {method}: {counted(len(ended), 'trial')}{others}, {cost}; {chosen}"


def _write_settings(
    tuning: Tuning, best: Mapping[str, Trial | None], later: Mapping[str, Trial | None]
) -> None:  # fmt: skip
    """tuning.json: the settings tune.*, and what was chosen, before and after training."""
    found = [
        (kind, name, trial)
        for kind, trials in (("training", best), ("sampling", later))
        for name, trial in trials.items()
    ]
    chosen: dict[str, Any] = {name: {} for name in best}
    for kind, name, trial in found:
        if trial is not None:
            chosen[name][kind] = {"trial": trial.number, "settings": trial.settings}
    goal = dataclasses.asdict(tuning.goal)
    plain = {"tune": plain_settings(tuning.tune), "goal": goal, "chosen": chosen}
    write_text(tuning.folder / SETTINGS_FILE, json.dumps(plain, indent=2) + "\n")
