"""The load by other processes against processes that are known to be busy."""

import subprocess
import sys
import time

import psutil
import pytest

from distillbench.metering import load
from distillbench.metering.load import machine_load


def busy(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.fixture
def clocks(monkeypatch):
    """Set the seconds of busy cores and of this process."""
    readings = []
    monkeypatch.setattr(load, "_clocks", lambda: readings.pop(0))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    return readings


def test_it_is_the_time_of_others_over_that_of_all_cores(clocks):
    clocks += [(100.0, 7.0, 50.0), (125.0, 12.0, 60.0)]
    with machine_load() as found:
        assert found.fraction is None
    assert found.fraction == pytest.approx((25 - 5) / (4 * 10))
    clocks += [(100.0, 7.0, 50.0), (104.9, 12.0, 60.0)]  # clocks that tick coarsely
    with machine_load() as found:
        pass
    assert found.fraction == 0


def test_the_work_of_this_process_and_of_its_children_does_not_count():
    """Another process is seen while it runs; the same work as a child that has ended is this process's own."""
    clock = load._clocks()
    busy(0.15)
    own = load._clocks()[1] - clock[1]
    assert 0.02 < own < 0.3
    begin = load._clocks()
    program = "import time; end = time.process_time() + 0.15\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert load._clocks()[1] - begin[1] > 0.1
    assert load._clocks()[0] - begin[0] > 0.1  # the cores' clock has seen it as well
