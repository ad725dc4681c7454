"""The parts of the harness on a simulated GPU: the same results as on the CPU, without waits."""

from __future__ import annotations

import pytest

from simulated import Results, results_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results() -> Results:
    return results_of("simulated_parts.py")


@pytest.mark.parametrize("way", ["computed", "cached", "imported"])
def test_scores_equal_the_cpu_for_every_kind_of_reference(results, way):
    """Fréchet and kernel distances, precision, recall, density, coverage, distances to the teacher."""
    expected, _ = results["scores"]["cpu/computed"]
    scores, missing = results["scores"][f"cuda:0/{way}"]
    assert not missing and len(scores) == 11
    assert scores == pytest.approx(expected, rel=1e-9)


def test_sampling_waits_only_for_copies_to_the_host(results):
    """Four batches: one wait for each, when its copy is read."""
    found = results["sampled"]
    assert found["equal"] == [True, True]
    assert found["plain"] == found["graphs"] == ["event.synchronize"] * 4


@pytest.mark.parametrize("name", ["mlp", "unet", "dit", "song", "dhariwal"])
def test_a_network_does_not_wait_and_replays_equal_plain_calls(results, name):
    same, waits = results["networks"][name]
    assert same == [True] * 3 and waits == []


def test_each_new_network_is_captured(results):
    assert results["graphs_one_after_the_other"] == [True] * 3


@pytest.mark.parametrize("name", ["classes", "guided", "drawn", "texts"])
def test_conditions_equal_the_cpu_and_do_not_wait(results, name):
    equal, devices, waits = results["conditions"][name]
    assert equal and devices == ["cuda:0"] and waits == []


def test_latents_equal_the_cpu(results):
    assert results["latents"] == {"equal": True, "device": "cpu"}


@pytest.mark.parametrize("way", ["held", "read ahead"])
def test_real_images_are_in_the_same_order_without_waits(results, way):
    equal, device, waits = results["stream"][way]
    assert equal and device == "cuda:0" and waits == []


@pytest.mark.parametrize("kind", ["adamw", "adam", "radam"])
def test_an_optimizer_does_not_wait_and_resumes(results, kind):
    waits, same, difference = results["optimizers"][kind]
    assert waits == [] and same == [True, True] and difference < 1e-6


def test_the_cost_of_sampling_is_measured(results):
    assert all(value is not None and value > 0 for value in results["timing"]["values"].values()), results["timing"]
