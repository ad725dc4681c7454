"""The search: rounds, in each of which every method gets its next trials, which the executor runs as cells.

    studies -> next trials -> cells -> executor -> scores -> studies

A trial is one cell for each of ``tune.search_seeds``, with the keys, records and claims of all cells: what was trained
is found again, and of two processes that work on one search each runs what the other does not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field

from distillbench.errors import UserError
from distillbench.execution.executors import Executor
from distillbench.options import with_settings
from distillbench.runs.cell import AS_IS
from distillbench.runs.cell_result import CellResult
from distillbench.runs.shared_context import Cell
from distillbench.storage.files import key_of
from distillbench.storage.locks import wait_for_lock
from distillbench.system.progress import Progress
from distillbench.training.budget import Limit
from distillbench.tuning.prepare import JOURNALS, Tuning
from distillbench.tuning.settings import TuneConfig
from distillbench.tuning.studies import MethodStudy, promoted
from distillbench.tuning.trials import COSTS, Outcome, Trial, best_of


@dataclass
class Search:
    """The trials of all methods. After each that ends, `on_trial` is called."""

    tuning: Tuning
    studies: dict[str, MethodStudy]
    executor: Executor
    progress: Progress
    on_trial: Callable[[], None]
    trained: int = 0  # cells that were not found
    elsewhere: set[tuple[str, int]] = field(default_factory=set)  # trials that another process runs

    @property
    def tune(self) -> TuneConfig:
        return self.tuning.tune

    def trials(self, method: str) -> list[Trial]:
        return self.studies[method].trials(self.tune.trials)

    def run(self) -> None:
        """Run what is left of the search. Raises Interrupted."""
        while True:
            trials = [trial for method in self.studies for trial in self._next(method)]
            if not trials:
                return
            known = len(self.elsewhere)
            if not self._run_round(trials) and len(self.elsewhere) == known:  # other processes run all that is left
                time.sleep(self.executor.poll_seconds)

    # --- which trials are next

    def _next(self, method: str) -> list[Trial]:
        """The trials of a method that have not ended, with new ones if there are too few."""
        study, new = self.studies[method], list[Trial]()
        with self._alone():
            known = self.trials(method)
            running = [trial for trial in known if trial.outcome is None]
            mine = [trial for trial in running if (method, trial.number) not in self.elsewhere]
            while len(mine) + len(new) < self.tuning.at_once and self._may_begin([*known, *new]):
                new.append(study.ask())
        return running + new

    def _alone(self) -> AbstractContextManager[None]:
        """One process at a time decides on trials: which is next, and whether it goes on."""
        return wait_for_lock(self.tuning.folder / JOURNALS / "next trial", "the choice of a trial", self.progress)

    def _may_begin(self, trials: Sequence[Trial]) -> bool:
        """Whether a method may begin another trial after `trials`."""
        if len(trials) >= self.tune.trials:
            return False
        if self.tune.protocol != "self_tuned" or not trials:
            return True
        most = self._most(trials)
        if not most and any(trial.outcome is None for trial in trials):
            return False  # what a trial costs is not known before one has ended
        return sum(self._charged(trial, most) for trial in trials) + most <= self.tune.total.amount

    def _charged(self, trial: Trial, most: float) -> float:
        """What a trial cost, or what was at stake: with a budget of images a quarter, if it failed in that."""
        if (cost := self._cost(trial)) is not None:
            return cost
        return self.tuning.most_images(trial.outcome.share) if trial.outcome and self._counts_images else most

    @property
    def _counts_images(self) -> bool:
        return self.tune.total.limit == "images" and self.tuning.config.budget.limit is Limit.images

    def _most(self, trials: Sequence[Trial]) -> float:
        """The most that a trial cost so far. Those that failed are charged as much."""
        if self._counts_images:
            return self.tuning.most_images()
        measured = [cost for trial in trials if (cost := self._cost(trial)) is not None]
        return max(measured, default=0.0)

    def _cost(self, trial: Trial) -> float | None:
        return None if trial.outcome is None else trial.outcome.costs.get(f"train_{self.tune.total.limit}")

    @property
    def _seeds(self) -> int:
        return len(self.tune.search_seeds)

    # --- a round

    def _run_round(self, trials: Sequence[Trial]) -> bool:
        """Run `trials` as far as no other process does. Returns whether anything came of it."""
        left = {(trial.method, trial.number): trial for trial in trials}
        costs: dict[tuple[str, int], dict[str, float | None]] = {key: dict.fromkeys(COSTS, 0.0) for key in left}
        ended = False
        for share in self.tune.shares:
            outcomes: dict[tuple[str, int], Outcome] = {}
            for trial, outcome in self._run_share(list(left.values()), share):
                key = trial.method, trial.number
                costs[key] = _added(costs[key], outcome.costs)
                outcomes[key] = dataclasses.replace(outcome, costs=costs[key], share=share)
                self.elsewhere.discard(key)
                if share == 1 or outcome.status != "ok":
                    self._end(trial, outcomes[key])
                    ended = True
            self.elsewhere |= left.keys() - outcomes.keys()
            left = {key: trial for key, trial in left.items() if key in outcomes and outcomes[key].status == "ok"}
            if share < 1:
                ended |= bool(left)
                left = {key: trial for key, trial in left.items() if self._goes_on(trial, outcomes[key], share)}
        return ended

    def _goes_on(self, trial: Trial, outcome: Outcome, share: float) -> bool:
        """Whether a trial is worth the whole budget; ends it if not. The defaults always are.

        It is decided once, by the trials that came so far, and kept: what another process trains on, or this one before
        an interruption, is not ended by what came later, so all that was trained is in the cost.
        """
        study, goal = self.studies[trial.method], self.tuning.goal
        with self._alone():
            goes_on = study.decision(trial)
            if goes_on is None:
                others = [score for number, score in study.rungs().items() if number != trial.number]
                goes_on = trial.number == 0 or promoted(outcome.score, others, goal.direction)
                study.note_rung(trial, outcome.score, goes_on)
        if goes_on:
            return True
        why = f"after {share:.0%} of the budget {goal.metric} was {outcome.score:.6g}, not among the best quarter"
        self._end(trial, Outcome("pruned", None, why, outcome.costs, share))
        return False

    def _end(self, trial: Trial, outcome: Outcome) -> None:
        self.studies[trial.method].tell(trial, outcome)
        trials, goal = self.trials(trial.method), self.tuning.goal
        done = sum(one.outcome is not None for one in trials)
        most = f"of {self.tune.trials}" if self.tune.protocol == "equal_trials" else f"of at most {self.tune.trials}"
        place = f"{list(self.studies).index(trial.method) + 1} of {len(self.studies)} methods"
        came = f"{outcome.status}: {outcome.reason}"
        if outcome.score is not None:
            came = f"{goal.metric} {outcome.score:.6g}"
        best = best_of(trials, goal.direction)
        words = "" if best is None or best.outcome is None else f"; best {best.outcome.score:.6g} (trial {best.number})"
        self.progress.say(f"{trial.method} ({place}): trial {trial.number}, {done} {most} done: {came}{words}")
        self.on_trial()

    # --- trials as cells

    def _run_share(self, trials: Sequence[Trial], share: float) -> Iterator[tuple[Trial, Outcome]]:
        """The trials that end in this process, with what came of them."""
        owners: list[Trial] = []
        cells: list[Cell] = []
        for trial in trials:
            try:
                own = self.cells_of(trial, share)
            except UserError as error:  # the settings exclude each other
                yield trial, Outcome("failed", None, f"these settings are refused: {error}", dict.fromkeys(COSTS, 0.0))
                continue
            cells += own
            owners += [trial] * len(own)
        found: dict[int, list[CellResult]] = {id(trial): [] for trial in owners}
        for index, result in self._results(cells):
            trial = owners[index]
            if result is not None:
                found[id(trial)].append(result)
                if len(found[id(trial)]) == self._seeds:
                    yield trial, self._outcome(found[id(trial)])

    def cells_of(self, trial: Trial, share: float) -> list[Cell]:
        """The cells of a trial. Raises UserError if the method refuses its settings."""
        (base,) = (cell for cell in self.tuning.cells[share] if cell.name == trial.method)
        settings = with_settings(base.method_config, trial.settings)
        differs = f"trial {trial.number}" + (f" at {share:.0%}" if share < 1 else "")
        change = lambda seed: dataclasses.replace(base, method_config=settings, seed=seed, differs=differs)
        return [change(seed) for seed in self.tune.search_seeds]

    def _results(self, cells: Sequence[Cell]) -> Iterator[tuple[int, CellResult | None]]:
        """The results of cells, by their index, as they come; None: another process runs the cell."""
        if not cells:
            return
        scan = self.executor.scan(cells, AS_IS)
        yield from ((index, result) for index, result in enumerate(scan.results) if result is not None)
        todo = {i: (cells[i], scan.descriptions[i]) for i, result in enumerate(scan.results) if result is None}
        if todo:
            with closing(self.executor.run(todo, AS_IS)) as results:
                for index, result in results:
                    self.trained += result is not None
                    yield index, result

    def _outcome(self, results: Sequence[CellResult]) -> Outcome:
        """What came of a trial, from its cells."""
        goal = self.tuning.goal
        rows = [row for result in results for row in result.rows]
        first = [result.rows[0] for result in results]  # all rows of a training have its costs
        costs = {name: _sum([row.get(name) if self.tuning.trains else 0.0 for row in first]) for name in COSTS}
        bad = next((row for row in rows if row["status"] != "ok"), None)
        if bad is None:
            bad = next((row | {"status": "failed"} for row in rows if row.get(goal.metric) is None), None)
        if bad is not None:
            status = "diverged" if bad["status"] == "diverged" else "failed"
            words = bad["reason"] if bad["status"] in ("failed", "diverged") else f"{bad['status']}: {bad['reason']}"
            return Outcome(status, None, words, costs)
        limit = self.tune.total.limit
        if self.tune.protocol == "self_tuned" and costs[f"train_{limit}"] is None:
            raise UserError(f"tune.total.limit={limit}: they are not measured here ({rows[0]['reason']})")
        return Outcome("ok", sum(row[goal.metric] for row in rows) / len(rows), "", costs)


def open_studies(tuning: Tuning, executor: Executor) -> dict[str, MethodStudy]:
    """The study of each method, in the journals of the folder. Trains the teacher if there is none.

    Raises UserError if the score cannot be measured here, and for journals of other searches.
    """
    cells = [cell for group in tuning.cells.values() for cell in group]
    if why := cells[0].shared.unavailable_metrics().get(tuning.goal.metric):
        raise UserError(f"{tuning.goal.metric} cannot be measured, and the search optimises it: {why}")
    keys: dict[str, list[str]] = {}
    for cell, description in zip(cells, executor.scan(cells, AS_IS).descriptions, strict=True):
        keys.setdefault(cell.name, []).append(description.evaluation_key)
    for shared in {id(cell.shared): cell.shared for cell in cells}.values():
        shared.check_room()
    tune, studies = tuning.tune, {}
    for method, space in tuning.spaces.items():
        said = {name: repr(entry) for name, entry in space.items()}
        identity = key_of([said, tune.sampler, tune.sampler_seed, tune.pruning, tune.search_seeds, keys[method]])
        path, defaults = tuning.journal(method, identity), tuning.defaults(method)
        studies[method] = MethodStudy.open(path, method, space, defaults, tuning.goal.direction, tune, identity)
    return studies


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _added(costs: Mapping[str, float | None], more: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: _sum([cost, more[name]]) for name, cost in costs.items()}
