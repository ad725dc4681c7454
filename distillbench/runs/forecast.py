"""The time of a run before it begins: from trials, or for a short run from the steps of its plan alone."""

from __future__ import annotations

from collections.abc import Sequence

from distillbench.evaluation.features import FeatureNetwork
from distillbench.evaluation.metric import Metric
from distillbench.runs.cell import Policy
from distillbench.runs.method_trials import WITH_GRADIENTS, MethodTimes, times_by_plan
from distillbench.runs.remains import Remains, remains_by_records
from distillbench.runs.score_trials import NetworkTimes
from distillbench.runs.shared_context import Cell, SharedContext
from distillbench.runs.speeds import estimate_by_trials
from distillbench.runs.time_estimate import estimate
from distillbench.runs.time_plan import TimePlan
from distillbench.runs.trials import Line
from distillbench.teachers.teacher import TeacherPlan

SHORT_SECONDS = 120.0  # a run that is shorter begins without trials, which take some seconds
MOST_SHARE = 0.02  # of a run's time: what trials before it may take
UNKNOWN_SECONDS = 1.0  # of a network evaluation, where the plan has taken no steps
FEATURE_SECONDS = 0.003  # of an image, for the decision whether a run is short: EfficientNet-Lite0 on one core


def why_none(cells: Sequence[Cell]) -> str:
    """Why there is no estimate of the time of `cells`; empty if there is one."""
    config = cells[0].shared.config
    if not config.estimate_seconds:
        return "estimate_seconds=0"
    if config.executor.elsewhere:
        return f"with executor={config.executor.kind} cells run on other machines"
    if cells[0].shared.ranks.count > 1:
        return "with several processes none is made"
    return ""


def forecast(cells: Sequence[Cell], policy: Policy) -> TimePlan | None:
    """The time of what is left of `cells`, from trials; None if there is no estimate."""
    if why_none(cells):
        return None
    return estimate_by_trials(cells, remains_by_records(cells, policy), cells[0].shared.config.estimate_seconds)


def forecast_of_run(cells: Sequence[Cell], remains: Sequence[Remains]) -> TimePlan | None:
    """The same right before a run, in at most a small share of its time; None also if it is short."""
    if why_none(cells):
        return None
    seconds = estimate(cells, remains, lambda shared, _: _PlanSpeeds(shared, cells)).seconds
    if seconds < SHORT_SECONDS:
        return None
    return estimate_by_trials(cells, remains, min(cells[0].shared.config.estimate_seconds, MOST_SHARE * seconds))


class _PlanSpeeds:
    """Speeds by the steps of the plan, in which networks ran for the first time: rather too slow than too fast."""

    def __init__(self, shared: SharedContext, cells: Sequence[Cell]) -> None:
        speeds = [cell.plan_speed.evaluation for cell in cells if cell.plan_speed.evaluation]
        self.evaluation = sum(speeds) / len(speeds) if speeds else UNKNOWN_SECONDS
        self.teacher = shared.source.untrained().conditioned(shared.conditioning)
        self.notes, self.scaled = list[str](), list[str]()

    def method(self, cell: Cell) -> MethodTimes | None:
        return None if cell.cost_error else times_by_plan(cell)

    def teacher_training(self, plan: TeacherPlan) -> float:
        return WITH_GRADIENTS * self.evaluation * plan.images if plan.seconds is None else plan.seconds

    def teacher_evaluation(self) -> Line:
        return Line(0.0, self.evaluation)

    def network(self, network: type[FeatureNetwork]) -> NetworkTimes:
        return NetworkTimes(0.0, Line(0.0, FEATURE_SECONDS), network.batch)

    def metric(self, metric: type[Metric], samples: int, real: int) -> float:
        return 0.0
