"""Every shipped method on a simulated GPU: weights bit-identical to the CPU's, no waits in steps, and resuming."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from simulated import Results, results_of

pytestmark = pytest.mark.slow
METHODS = ("boot", "cm", "ct", "direct", "meanflow", "pd", "scm", "sid", "tract")
LABELS, NIGHTLY_LABELS = ("unconditional",), ("guidance drawn", "classes", "guided")
FEW_CASES = [f"{name}/{label}" for name in METHODS for label in LABELS]
NIGHTLY_CASES = [f"{name}/{label}" for name in METHODS for label in NIGHTLY_LABELS]
CASES = [*FEW_CASES, *(pytest.param(case, marks=pytest.mark.nightly) for case in NIGHTLY_CASES)]
ResultsOf = Callable[[tuple[str, ...]], Results]


@pytest.fixture(scope="module")
def results() -> ResultsOf:
    """Results for some conditionings; each set of them is one process."""

    @functools.cache
    def found(labels: tuple[str, ...]) -> Results:
        checks = ("weights", "waits", "samples") if labels == NIGHTLY_LABELS else ()
        return results_of("simulated_methods.py", *checks, CONDITIONINGS=",".join(labels))

    return found


def value(results: ResultsOf, check: str, case: str):
    """A result; skips the test if the method does not support guidance."""
    labels = NIGHTLY_LABELS if case in NIGHTLY_CASES else LABELS
    found = results(labels)[check][case]
    if found is None:
        assert case.partition("/")[0] == "ct", f"{case} is not supported"
        pytest.skip("not supported")
    assert not (isinstance(found, dict) and "error" in found), found["error"]
    return found


def test_every_shipped_method_is_covered(results):
    assert set(results(LABELS)["weights"]) == set(FEW_CASES)


@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_identical_to_the_cpu(results, case):
    assert value(results, "weights", case) == []


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(results, case):
    """Except for steps that read the loss. One .item() or one copy from pageable memory would fail it."""
    waits, steps = value(results, "waits", case)
    assert steps >= 3 and waits == {}


@pytest.mark.parametrize("name", METHODS)
def test_checkpoints_equal_the_cpu(results, name):
    cpu, gpu = value(results, "checkpoints", name)
    assert len(cpu) == 1 and cpu == gpu


@pytest.mark.parametrize("case", CASES)
def test_samples_equal_the_cpu_with_and_without_cuda_graphs(results, case):
    found = value(results, "samples", case)
    assert found and all(plain and first and again for plain, first, again in found.values()), found


@pytest.mark.parametrize("case", FEW_CASES)
def test_an_interrupted_training_on_a_gpu_ends_with_the_same_weights(results, case):
    assert value(results, "restored", case) == []


@pytest.mark.parametrize("way", ["bf16", "bf16 and recompute", "fp16", "channels_last"])
@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_in_other_precisions_and_in_parts(results, name, way):
    assert value(results, "computed", f"{name}/{way}") == {}


def test_no_step_waits_for_prefetched_images(results):
    found = results(LABELS)["read_ahead"]
    assert len(found) >= 8 and all(waits == {} for waits in found.values()), found
