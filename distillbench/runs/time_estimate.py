"""How long the cells of a run will take on this device: the arithmetic, from speeds that are measured elsewhere.

Rows cost their evaluations and their scores, a training its images; what caches and records hold costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from distillbench.evaluation.evaluator import features_kept, most_nfe, teacher_samples_recipe
from distillbench.evaluation.features import FeatureNetwork, Networks
from distillbench.evaluation.metric import Metric, Need
from distillbench.evaluation.reference_statistics import RealImages
from distillbench.runs.method_trials import MethodTimes
from distillbench.runs.predicted_timing import seconds_of_timing
from distillbench.runs.remains import Remains
from distillbench.runs.sampling_settings import training_settings
from distillbench.runs.score_trials import NetworkTimes
from distillbench.runs.shared_context import Cell, SharedContext, plain_settings
from distillbench.runs.time_plan import Lever, Part, TimePlan, summed
from distillbench.runs.trials import Line
from distillbench.storage.array_cache import array_file
from distillbench.storage.files import canonical_json
from distillbench.teachers.teacher import Teacher, TeacherPlan
from distillbench.training.budget import Limit
from distillbench.training.monitor import MOST
from distillbench.training.pairs import BATCH

NOT_OF_TRAINING = ("methods", "seed", "evaluation", "executor", "results_dir", "run_name")
PROCESS_SECONDS = 3.0  # to start a process for a cell or for a timing, and to import what it needs


class Speeds(Protocol):
    """How fast this device is with one dataset, teacher and settings.

    `notes` say what is left out because it cannot be timed, `scaled` what was timed with fewer images than the run has.
    """

    teacher: Teacher
    notes: list[str]
    scaled: list[str]

    def method(self, cell: Cell) -> MethodTimes | None:
        """Of the method of a cell; None if it cannot be timed."""

    def teacher_training(self, plan: TeacherPlan) -> float:
        """Seconds of the training of the teacher."""

    def teacher_evaluation(self) -> Line:
        """Seconds of a network evaluation of the teacher where it is sampled from."""

    def network(self, network: type[FeatureNetwork]) -> NetworkTimes:
        """Of a feature network."""

    def metric(self, metric: type[Metric], samples: int, real: int) -> float:
        """Seconds of a score of so many samples and real images, whose features are there."""


def estimate(
    cells: Sequence[Cell], remains: Sequence[Remains], speeds_of: Callable[[SharedContext, str], Speeds]
) -> TimePlan:
    """The time of a run of `cells`, of which `remains` are left.

    `speeds_of` gives the speeds of a context whose teacher has a SHA-256 (empty: not known).
    """
    contexts: dict[int, _Context] = {}
    once = _Once()
    for cell, what in zip(cells, remains, strict=True):
        if what.any and id(cell.shared) not in contexts:
            contexts[id(cell.shared)] = _Context(cell.shared, speeds_of(cell.shared, what.teacher_sha256), once)
    pairs = list(zip(cells, remains, strict=True))
    for cell, what in pairs:  # before networks are loaded for scores, which may use up the time that there is
        if what.any and cell.entry is not None:
            contexts[id(cell.shared)].speeds.method(cell)
    times = [contexts[id(cell.shared)].of_cell(cell, what) if what.any else {} for cell, what in pairs]
    evaluated = {id(cell.shared) for cell, what in pairs if what.evaluation}
    before: dict[Part, float] = {}
    for key, context in contexts.items():
        for part, seconds in context.before(key in evaluated).items():
            before[part] = before.get(part, 0.0) + seconds
    levers = summed(lever for context in contexts.values() for lever in context.levers)
    notes = [note for context in contexts.values() for note in (*context.speeds.notes, *context.left_out())]
    scaled = [note for context in contexts.values() for note in context.speeds.scaled]
    at_once = cells[0].shared.config.executor.count
    return TimePlan(times, before, at_once, levers, list(dict.fromkeys(notes)), list(dict.fromkeys(scaled)))


class _Once:
    """What cells and contexts share is done once: by the first of them."""

    def __init__(self) -> None:
        self.done: set[Hashable] = set()

    def is_first(self, *what: Hashable) -> bool:
        """Whether nobody has asked for it before."""
        known = what in self.done
        self.done.add(what)
        return not known


class _Context:
    """The times of the cells that share settings, dataset and teacher, and the settings that they depend on."""

    def __init__(self, shared: SharedContext, speeds: Speeds, once: _Once) -> None:
        self.shared, self.speeds, self.once = shared, speeds, once
        config = shared.config
        self.teacher = canonical_json(plain_settings([config.dataset, config.teacher, config.conditional]))
        self.config, self.evaluation = shared.config, shared.config.evaluation
        plain = {name: value for name, value in plain_settings(config).items() if name not in NOT_OF_TRAINING}
        self.trained = canonical_json([plain, config.evaluation.checkpoints])
        self.levers: list[Lever] = []
        self._timings: dict[tuple[Line, tuple[int, ...]], float] = {}
        missing = shared.unavailable_metrics()
        self.metrics = [cls for name, cls in shared.metrics.items() if name not in missing]
        self.networks = list(dict.fromkeys(cls.network for cls in self.metrics if cls.network is not None))

    # --- cells

    def of_cell(self, cell: Cell, what: Remains) -> dict[Part, float]:
        """The seconds of what is left of a cell."""
        times = None if cell.entry is None else self.speeds.method(cell)
        if cell.entry is not None and times is None:
            return {}
        line = self.speeds.teacher_evaluation() if times is None else times.evaluation
        found: dict[Part, float] = {}
        if what.training and times is not None and self.once.is_first(Part.training, *self._trained(cell)):
            found |= self._training(cell, times)
        if what.evaluation:
            found |= self._evaluation(cell, line)
        if what.speed:
            found[Part.speed] = self._timing(line, tuple(cell.nfe))
            self._depends(f"evaluation.timing={self.evaluation.timing}", found[Part.speed])
        processes = self.config.isolate + (what.speed and self.evaluation.timing == "process")
        return found | {Part.starting: processes * PROCESS_SECONDS}

    def _trained(self, cell: Cell) -> tuple[Hashable, ...]:
        """Equal for cells that share a student: they differ in how it is sampled and scored."""
        assert cell.method_config is not None
        return cell.name, canonical_json(training_settings(cell.method_config)), cell.seed, self.trained

    def _timing(self, line: Line, rows: tuple[int, ...]) -> float:
        """Seconds of the timing of rows, the same for all seeds."""
        if (line, rows) not in self._timings:
            self._timings[line, rows] = seconds_of_timing(line, rows, self.evaluation)
        return self._timings[line, rows]

    def _training(self, cell: Cell, times: MethodTimes) -> dict[Part, float]:
        """Preparation, steps, and looks at samples; a budget in seconds includes the preparation."""
        budget, cost = self.config.budget, cell.cost
        if budget.limit == Limit.seconds:
            preparation, training = 0.0, budget.seconds
        else:
            missing = (n for name, n in times.pairs if self.once.is_first(Part.preparation, name, cell.seed))
            preparation = sum(missing) * self.speeds.teacher_evaluation()(BATCH) / BATCH
            training = cost.images / self.config.batch_size * times.step
            if self.evaluation.progress_every:
                looks = math.ceil(1 / self.evaluation.progress_every) * self.evaluation.progress_images
                seen = min(looks * min(cell.nfe), MOST * (cost.teacher_nfe + cost.student_nfe))
                training += seen * times.evaluation(self.config.batch_size) / self.config.batch_size
        self._depends(f"budget.{budget.limit.value}={_plain(budget.amount)}", training)
        self._depends(f"methods.{cell.name}.* (pairs)", preparation)
        return {Part.preparation: preparation, Part.training: training}

    def _evaluation(self, cell: Cell, line: Line) -> dict[Part, float]:
        """Sampling and scoring of all rows."""
        rows = len(self.evaluation.seeds) * (1 + (self.evaluation.checkpoints if cell.entry is not None else 0))
        sampling = rows * sum(self._samples(line, nfe) for nfe in cell.nfe)
        scoring = rows * len(cell.nfe) * self._row() + (self._loading() if self.config.isolate else 0.0)
        if cell.entry is None:
            self._depends(self._steps, sampling)
        self._depends(self._images, sampling + scoring)
        return {Part.sampling: sampling, Part.scoring: scoring}

    def _samples(self, line: Line, nfe: int) -> float:
        """Seconds to sample the images of a row."""
        full, rest = divmod(self.evaluation.images, self.evaluation.batch_size)
        return nfe * (full * line(self.evaluation.batch_size) + (line(rest) if rest else 0.0))

    def _row(self) -> float:
        """Seconds of all scores of a row."""
        images, real = self.evaluation.images, len(self.shared.dataset)
        real = min(real, self.evaluation.real_features or real)
        metrics = sum(self.speeds.metric(cls, images, real) for cls in self.metrics)
        return metrics + sum(self.speeds.network(network)(images) for network in self.networks)

    def _loading(self) -> float:
        """Seconds of what a process does once: it loads networks, and runs them on the teacher's samples if needed."""
        seconds = 0.0
        for network in self.networks:
            times = self.speeds.network(network)
            mine = [cls for cls in self.metrics if cls.network is network]
            seconds += times.loading + (times(self.evaluation.images) if _compares_with_teacher(mine) else 0.0)
        return seconds

    # --- once for all cells

    def before(self, evaluates: bool) -> dict[Part, float]:
        """The seconds of what is done once; `evaluates`: for rows that are left."""
        found: dict[Part, float] = {}
        plan = self.shared.source.plan()
        if plan.images and self.once.is_first(Part.teacher, self.teacher):
            found[Part.teacher] = self.speeds.teacher_training(plan)
            amount = plan.images if plan.seconds is None else plan.seconds
            self._depends(f"{plan.setting}={_plain(amount)}" if plan.setting else "the teacher", found[Part.teacher])
        if not evaluates:
            return found
        missing = [seed for seed in self.evaluation.seeds if self._lacks_answers(seed)]
        nfe = most_nfe(self.evaluation, self.speeds.teacher)
        found[Part.reference] = len(missing) * self._samples(self.speeds.teacher_evaluation(), nfe)
        self._depends(self._steps, found[Part.reference])
        self._depends(self._images, found[Part.reference])
        loads = not self.config.isolate and self.once.is_first(Part.scoring)
        found[Part.scoring] = self._loading() if loads else 0.0
        found[Part.real] = sum(self._of_real_images(network) for network in self.networks)
        self._depends(f"dataset={self.shared.dataset.name}", found[Part.real])
        return found

    def _lacks_answers(self, seed: int) -> bool:
        """Whether the many-step samples of a sampling seed are not there, and not made for other cells either."""
        shared, teacher = self.shared, self.speeds.teacher
        given = self.evaluation, teacher, teacher.sha256, shared.dataset.sha256, shared.device, seed
        file = array_file(shared.folder.cache("answers"), teacher_samples_recipe(*given))
        return not file.with_suffix(".json").is_file() and self.once.is_first(Part.reference, self.teacher, file.name)

    def _of_real_images(self, network: type[FeatureNetwork]) -> float:
        """Seconds of the features of all real images, if they are needed and not there."""
        shared, needs = self.shared, {Need.real, Need.real_images}
        if not any(cls.network is network and cls.needs & needs for cls in self.metrics):
            return 0.0
        networks, cache = Networks(shared.weights, shared.device), shared.folder.cache("references")
        kept, drawn = features_kept(shared.metrics), self.evaluation.real_features
        real = RealImages(shared.dataset, networks, cache, shared.references, kept, drawn)
        sets = [real, *([real.drawn] if real.drawn is not None and network in kept else [])]
        first = lambda one: self.once.is_first(Part.real, network, shared.dataset.sha256, one.count)
        return sum(self.speeds.network(network)(one.count) for one in sets if not one.has(network) and first(one))

    # --- what it depends on, and what is left out

    @property
    def _images(self) -> str:
        return f"evaluation.images={self.evaluation.images}"

    @property
    def _steps(self) -> str:
        return f"evaluation.teacher_steps=[{','.join(map(str, self.evaluation.teacher_steps))}]"

    def _depends(self, setting: str, seconds: float) -> None:
        if seconds > 0:
            self.levers.append(Lever(setting, seconds))

    def left_out(self) -> list[str]:
        """What the speeds do not include, in words."""
        compute, teacher = self.config.compute, self.speeds.teacher
        asked = {
            f"torch's compiler (compute.compile={compute.compile}), which first takes time and then saves some": (
                compute.compile != "off"
            ),
            "what CUDA graphs save (evaluation.cuda_graphs=true)": self.evaluation.cuda_graphs,
            "encoding texts, and encoding and decoding latents": (
                teacher.decode is not None or teacher.conditioning.texts is not None
            ),
            "scores of texts": any(Need.prompts in cls.needs for cls in self.metrics),
        }
        return [words for words, applies in asked.items() if applies]


def _plain(amount: float) -> str:
    """A number as it is written on the command line."""
    return f"{amount:.0f}" if amount == int(amount) else f"{amount:g}"


def _compares_with_teacher(metrics: Sequence[type[Metric]]) -> bool:
    """Whether some of these metrics, which share a network, seem to look at the teacher's samples."""
    return any(not cls.needs & {Need.real, Need.real_images, Need.prompts} for cls in metrics)
