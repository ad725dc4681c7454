"""Every shipped method on a simulated GPU: weights bit-identical to the CPU's, no waits in steps, and resuming."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from by_day import by_day
from shipped import METHODS
from simulated import Results, results_of

pytestmark = pytest.mark.slow
BY_DAY = ("cm",)
LABELS = ("unconditional", "guidance drawn", "classes", "guided")
DAY_CASES = [f"{name}/unconditional" for name in BY_DAY]
CASES = by_day([f"{name}/{label}" for label in LABELS for name in METHODS], DAY_CASES)
RESUMED = by_day([f"{name}/{label}" for label in LABELS[:2] for name in METHODS], DAY_CASES)
ResultsOf = Callable[[bool], Results]


@pytest.fixture(scope="module")
def results() -> ResultsOf:
    """Results of some methods without conditions, or of all methods in every way; each is one process."""

    @functools.cache
    def found(few: bool) -> Results:
        if few:
            return results_of("simulated_methods.py", METHODS=",".join(BY_DAY), CONDITIONINGS="unconditional")
        return results_of("simulated_methods.py", seconds=1800, CONDITIONINGS=",".join(LABELS))

    return found


def value(results: ResultsOf, check: str, case: str):
    """A result; skips the test if the method does not support guidance."""
    name, _, label = case.partition("/")
    found = results(name in BY_DAY and label not in LABELS[1:])[check][case]
    if found is None:
        assert name == "ct", f"{case} is not supported"
        pytest.skip("not supported")
    assert not (isinstance(found, dict) and "error" in found), found["error"]
    return found


@pytest.mark.nightly
def test_every_shipped_method_is_covered(results):
    assert {case.partition("/")[0] for case in results(False)["weights"]} == set(METHODS)


@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_identical_to_the_cpu(results, case):
    assert value(results, "weights", case) == []


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(results, case):
    """Except for steps that read the loss. One .item() or one copy from pageable memory would fail it."""
    waits, steps = value(results, "waits", case)
    assert steps >= 3 and waits == {}


@pytest.mark.parametrize("name", by_day(METHODS, BY_DAY))
def test_checkpoints_equal_the_cpu(results, name):
    cpu, gpu = value(results, "checkpoints", name)
    assert len(cpu) == 1 and cpu == gpu


@pytest.mark.parametrize("case", CASES)
def test_samples_equal_the_cpu_with_and_without_cuda_graphs(results, case):
    found = value(results, "samples", case)
    assert found and all(plain and first and again for plain, first, again in found.values()), found


@pytest.mark.parametrize("case", RESUMED)
def test_an_interrupted_training_on_a_gpu_ends_with_the_same_weights(results, case):
    assert value(results, "restored", case) == []


@pytest.mark.parametrize("way", ["bf16", "bf16 and recompute", "fp16", "channels_last"])
@pytest.mark.parametrize("name", by_day(METHODS, BY_DAY))
def test_no_step_waits_in_other_precisions_and_in_parts(results, name, way):
    assert value(results, "computed", f"{name}/{way}") == {}


def test_no_step_waits_for_prefetched_images(results):
    found = results(True)["read_ahead"]
    assert len(found) == 2 and all(waits == {} for waits in found.values()), found
