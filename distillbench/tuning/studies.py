"""The search of one method: an Optuna study in a file, which several processes may share.

The trials are in a journal (``tuning/NAME.journal`` in the run's folder): what was tried, what came of it, its cost.
Optuna chooses the next settings, and nothing else: cells are run by the executors like all others.

Each setting of trial n has random numbers of its own, made from ``tune.sampler_seed``, its name and n. So a search that
goes on after an interruption chooses what it would have chosen without one, and all methods get the same numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from distillbench.diffusion.noise import stream_key
from distillbench.errors import UserError
from distillbench.options import Among, Between
from distillbench.tuning.settings import TuneConfig
from distillbench.tuning.trials import Outcome, Trial

STARTUP_TRIALS = 5  # random ones before TPE has something to learn from; Optuna's 10 are most of a usual search
DIGITS = 4  # significant ones, of the numbers that are tried
SEARCH, SETTINGS, OUTCOME, RUNG = "search", "settings", "outcome", "score at a quarter"  # attributes in the journal


class SeededSampler(BaseSampler):
    """Optuna's sampler, made anew for each setting of a trial, with a seed that belongs to both.

    So a choice depends on the trials that have ended and on nothing that a process remembers.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}  # each setting is chosen on its own

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        seed = stream_key(f"{param_name} of trial {trial.number}", self.seed) % 2**32
        inner: BaseSampler = RandomSampler(seed)
        if self.kind == "tpe":
            inner = TPESampler(n_startup_trials=STARTUP_TRIALS, multivariate=False, constant_liar=True, seed=seed)
        return inner.sample_independent(study, trial, param_name, param_distribution)


@dataclass
class MethodStudy:
    """The trials of a method, in the journal of its study."""

    method: str
    space: dict[str, Between | Among]
    defaults: dict[str, Any]  # the values with which a search begins, by the names in the space
    study: Study
    storage: JournalStorage

    @staticmethod
    def open(
        path: Path, method: str, space: dict[str, Between | Among], defaults: dict[str, Any], direction: str,
        tune: TuneConfig, identity: str,
    ) -> MethodStudy:  # fmt: skip
        """The study in the journal at `path`, made if there is none.

        `identity`: what all its trials share, such as the plugin's source and the budget. Raises UserError if the
        journal has trials of another one.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(path)))
        sampler = SeededSampler(tune.sampler, tune.sampler_seed)
        study = optuna.create_study(
            storage=storage, study_name=method, load_if_exists=True, sampler=sampler,
            direction="maximize" if direction == "higher" else "minimize",
        )  # fmt: skip
        known = study.user_attrs.get(SEARCH)
        if known is None:
            study.set_user_attr(SEARCH, identity)
        elif known != identity:
            raise UserError(
                f"the search of {method} in {str(path.parent.parent)!r} was begun with other settings, or with another "
                "version of the plugin, the data, the teacher or distillbench. Give this one another run_name"
            )
        return MethodStudy(method, space, defaults, study, storage)

    def trials(self, most: int) -> list[Trial]:
        """The first `most` trials that were begun, in order."""
        begun = (one for one in self.study.get_trials(deepcopy=False) if SETTINGS in one.user_attrs)
        return [self._trial(one) for one in begun if one.number < most]

    def _trial(self, frozen: FrozenTrial) -> Trial:
        kept = frozen.user_attrs
        outcome = Outcome(**kept[OUTCOME]) if frozen.state.is_finished() else None
        return Trial(self.method, frozen.number, json.loads(kept[SETTINGS]), outcome)

    def ask(self) -> Trial:
        """The next trial. Call it in one process at a time."""
        inside = {name: value for name, value in self.defaults.items() if value in self.space[name]}
        known = self.study.get_trials(deepcopy=False)
        if not known:
            self.study.enqueue_trial({name: _encoded(self.space[name], value) for name, value in inside.items()})
        running = (one for one in known if one.state == TrialState.RUNNING)
        half = next((one for one in running if SETTINGS not in one.user_attrs), None)  # its process was killed here
        trial = self.study.ask() if half is None else optuna.Trial(self.study, self._id(half.number))
        if trial.number == 0:
            for name in inside:  # the sampler learns from it; what lies outside of the space it cannot know
                _suggest(trial, name, self.space[name])
            settings = dict(self.defaults)
        else:
            chosen = {name: _suggest(trial, name, entry) for name, entry in self.space.items()}
            settings = {name: _decoded(self.space[name], value) for name, value in chosen.items()}
        self._keep(trial.number, SETTINGS, json.dumps(settings))
        return Trial(self.method, trial.number, settings)

    def rungs(self) -> dict[int, float | None]:
        """By trial: its score at the first share of the budget; None if it had none."""
        found = self.study.get_trials(deepcopy=False)
        return {one.number: one.user_attrs[RUNG] for one in found if RUNG in one.user_attrs}

    def note_rung(self, trial: Trial, score: float | None) -> None:
        """Keep the score of a trial at the first share of the budget."""
        self._keep(trial.number, RUNG, score)
        if score is not None:
            self.storage.set_trial_intermediate_value(self._id(trial.number), 1, score)

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        """Record how a trial ended, unless another process has.

        One that failed has the worst value there is: Optuna's samplers do not learn from its own state FAIL.
        """
        if self.study.get_trials(deepcopy=False)[trial.number].state.is_finished():
            return
        self._keep(trial.number, OUTCOME, dataclasses.asdict(outcome))
        if outcome.status == "pruned":
            self.study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)
            return
        worst = -math.inf if self.study.direction == optuna.study.StudyDirection.MAXIMIZE else math.inf
        self.study.tell(trial.number, worst if outcome.score is None else outcome.score, skip_if_finished=True)

    def _keep(self, number: int, name: str, value: Any) -> None:
        self.storage.set_trial_user_attr(self._id(number), name, value)

    def _id(self, number: int) -> int:
        study = self.storage.get_study_id_from_name(self.method)
        return self.storage.get_trial_id_from_study_id_trial_number(study, number)


def promoted(score: float | None, others: Sequence[float | None], direction: str, factor: int = 4) -> bool:
    """Whether a trial goes on after the first share: it is among the best 1/`factor` of all trials that came so far.

    `others`: the scores of those, without this one; None: no score. The best so far always goes on. This is the rule of
    asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) with one rung.
    """
    if score is None:
        return False
    sign = -1 if direction == "higher" else 1
    better = sum(other is not None and sign * other < sign * score for other in others)
    return better < max(1, (len(others) + 1) // factor)


# --- settings and Optuna's values ------------------------------------------------------------------------------------


def _suggest(trial: optuna.Trial, name: str, entry: Between | Among) -> Any:
    if isinstance(entry, Among):
        return trial.suggest_categorical(name, [json.dumps(value) for value in entry.values])
    if entry.whole:
        return trial.suggest_int(name, int(entry.low), int(entry.high), log=entry.log, step=int(entry.step or 1))
    return trial.suggest_float(name, entry.low, entry.high, log=entry.log, step=entry.step)


def _encoded(entry: Between | Among, value: Any) -> Any:
    return json.dumps(value) if isinstance(entry, Among) else value


def _decoded(entry: Between | Among, value: Any) -> Any:
    """The value of a setting. Numbers have few digits, so that they can be written down."""
    if isinstance(entry, Among):
        return json.loads(value)
    return value if entry.whole else min(max(float(f"{value:.{DIGITS}g}"), entry.low), entry.high)
