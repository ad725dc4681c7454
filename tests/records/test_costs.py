"""The spread of costs by hand, and what is said of a busy machine."""

import pytest
from scipy import stats

from distillbench.records.costs import Spread, disturbed, spread


def row(seed, **values):
    return {"training_seed": seed, "status": "ok", **values}


def test_a_cost_has_the_spread_of_its_training_seeds():
    rows = [row(0, train_seconds=107.0), row(0, train_seconds=107.0), row(1, train_seconds=239.0)]
    rows += [row(2, train_seconds=None), row(3, train_seconds=9.0) | {"status": "failed"}]
    found = spread(rows, "train_seconds")
    low, high = stats.t.interval(0.95, 1, loc=173, scale=(239 - 107) / 2)
    assert (found.mean, found.least, found.most, found.seeds) == (173, 107, 239, 2)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_one_measurement_has_no_interval_and_none_no_spread():
    assert spread([row(None, x=2.0), row(float("nan"), x=2.0)], "x") == Spread(2.0, None, None, 2.0, 2.0, 1)
    assert spread([row(0)], "x") is None


def test_rows_timed_on_a_busy_machine_say_so():
    busy = [row(0, machine_load_training=0.65, machine_load_sampling=0.02), row(1, machine_load_training=None)]
    assert disturbed(busy, 2) == "trained while other processes used 1.3 of 2 cores"
    assert disturbed(busy) == "trained while other processes used 65% of the cores"
    both = [*busy, row(2, machine_load_sampling=0.5)]
    assert disturbed(both, 2).endswith("; timed while other processes used 1.0 of 2 cores")
    assert disturbed([row(0, machine_load_training=0.05), row(1)], 2) == ""
