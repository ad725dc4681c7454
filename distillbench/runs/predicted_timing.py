"""How long the measurement of sampling speed will take, by following its passes with predicted seconds of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distillbench.evaluation.sampling_speed import WATCHED_SECONDS
from distillbench.evaluation.settings import EvaluationConfig
from distillbench.evaluation.timing import LEAST_CALLS, best_throughput, repeat, warmed_up
from distillbench.runs.trials import Line

SHORTEST = 1e-4  # seconds of a call, so that there are not too many to follow


class _Predicted:
    """A timer of calls that return how long they would take."""

    def __init__(self) -> None:
        self.total = 0.0

    def seconds(self, call: Callable[[], Any]) -> float:
        seconds = max(call(), SHORTEST)
        self.total += seconds
        return seconds


def seconds_of_timing(evaluation: Line, rows: Sequence[int], config: EvaluationConfig) -> float:
    """The seconds of the passes over `rows`, numbers of evaluations, if one `evaluation` takes so long."""
    timer = _Predicted()
    for nfe in rows:

        def call(size: int, nfe: int = nfe) -> Callable[[], float]:
            return lambda: nfe * evaluation(size)

        timer.seconds(call(config.batch_size))  # memory
        repeat(call(config.batch_size), timer, 1, WATCHED_SECONDS)
        warmed_up(call(1), timer, LEAST_CALLS, config.timing_seconds)
        best_throughput(call, timer, config.largest_timed_batch, config.timing_seconds)
    return timer.total
