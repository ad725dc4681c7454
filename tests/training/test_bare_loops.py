"""The bare loops that the harness is measured against train the same weights: they are the same mathematics.

float64 throughout. The loops use other formulas (v and angles for eps and data predictions), and the schedule's
log(tan(theta)) near t_max, where alpha is 5e-5, keeps ten digits of alpha: weights that move by 1e-2 agree to 1e-8.
"""

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from bare_loops import LOOPS  # noqa: E402
from measuring import METHODS, Pair, Ratio, tiny_mlp  # noqa: E402
from overhead import measure  # noqa: E402

pytestmark = pytest.mark.usefixtures("float64")
TOLERANCE = 1e-8
STEPS = 12  # each of the four phases of pd has at least two


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.rpartition("network.")[2]: weight for name, weight in network.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_a_bare_loop_trains_the_same_weights_as_the_harness(name, tmp_path):
    scene = tiny_mlp()
    pair = Pair(scene, name, STEPS * scene.batch - 5, "cpu", tmp_path)
    trained = pair.train()
    task = pair.task()
    assert sum(1 for _ in LOOPS[name](task)) == STEPS

    bare, harness, before = map(weights_of, (task.student, pair.method.student, pair.student))
    assert bare.keys() == harness.keys() == before.keys()
    apart = max((bare[key] - harness[key]).abs().max().item() for key in bare)
    moved = max((before[key] - harness[key]).abs().max().item() for key in bare)
    assert apart < TOLERANCE and moved > 1e-3, (apart, moved)
    assert [point.loss for point in trained.curve] == pytest.approx(task.losses, rel=TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_steps_in_a_bare_loop_train_the_same_weights(name, tmp_path):
    scene = tiny_mlp()
    pair = Pair(scene, name, STEPS * scene.batch - 5, "cpu", tmp_path)
    pair.train()
    task, steps = pair.own_steps()
    assert sum(1 for _ in steps) == STEPS
    for weight, other in zip(task.student.parameters(), pair.method.student.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("against", ["hand", "own"])
def test_the_overhead_is_over_equal_numbers_of_steps(against, tmp_path):
    ratio = measure(tiny_mlp(), "direct", 2, "cpu", tmp_path, against=against)
    assert 0 < ratio.low <= ratio.value <= ratio.high


def test_a_ratio_is_the_median_over_pairs_with_its_interval():
    slow = [1.0, 2.0, 4.0, 8.0, 16.0]  # a drift of the machine affects both
    ratio = Ratio.of([2 * value for value in slow], slow)
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert Ratio.of([1.0, 2.0, 9.0], [1.0, 1.0, 3.0]).value == 2.0
