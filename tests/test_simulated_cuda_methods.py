"""Every method that ships on a simulated GPU: the CPU's weights to the bit, no wait in a step, saved and restored."""

from __future__ import annotations

import pytest

from simulated import Results, results_of

pytestmark = pytest.mark.slow
GUIDED = ("guided", "guidance drawn")
METHODS = ("boot", "cm", "ct", "direct", "pd", "sid", "tract")
CASES = [f"{name}/{label}" for name in METHODS for label in ("unconditional", "classes", *GUIDED)]


@pytest.fixture(scope="module")
def results() -> Results:
    return results_of("simulated_methods.py")


def value(results: Results, check: str, case: str):
    """A result; skips where the method refuses to be guided."""
    found = results[check][case]
    if found is None:
        assert case.partition("/")[0] == "ct", f"{case} is refused"
        pytest.skip("refused")
    assert not (isinstance(found, dict) and "error" in found), found["error"]
    return found


def test_every_shipped_method_is_covered(results):
    assert set(results["weights"]) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_identical_to_the_cpu(results, case):
    assert value(results, "weights", case) == []


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(results, case):
    """But for those whose loss is read. This is exact: one .item() or one copy from pageable memory fails it."""
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


@pytest.mark.parametrize("case", [f"{name}/{label}" for name in METHODS for label in ("unconditional", GUIDED[1])])
def test_an_interrupted_training_on_a_gpu_ends_with_the_same_weights(results, case):
    assert value(results, "restored", case) == []


@pytest.mark.parametrize("way", ["bf16", "bf16 and recompute", "fp16", "channels_last"])
@pytest.mark.parametrize("name", METHODS)
def test_no_step_waits_in_other_precisions_and_in_parts(results, name, way):
    assert value(results, "computed", f"{name}/{way}") == {}


def test_no_step_waits_for_prefetched_images(results):
    assert len(results["read_ahead"]) >= 8
    assert all(waits == {} for waits in results["read_ahead"].values()), results["read_ahead"]
