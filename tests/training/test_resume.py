"""An interrupted training continues from its last state and ends with the same weights, cost and loss curve."""

from __future__ import annotations

import random
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import distillbench.training.resume
from analytic import gaussian_teacher, make_workspace, mlp_teacher, same_weights, weights_of
from distillbench.metering.energy import Energy
from distillbench.system.signals import Interrupted
from distillbench.testing.method_bench import StopAfter
from distillbench.training.budget import BudgetConfig, Limit, Meter
from distillbench.training.checkpoints import Checkpoints
from distillbench.training.compute import ComputeConfig
from distillbench.training.loop import Loop, train
from distillbench.training.method import Method, MethodConfig, Phase
from distillbench.training.resume import Resume, State, States
from recorded_progress import RecordingProgress
from tiny_training import BATCH, FRACTIONS, IMAGES, METHODS, NFE, SILENT, Weight, averaged_method

STEPS = IMAGES // BATCH


def states(folder, keep=2) -> States:
    return States(folder / "resume", keep, RecordingProgress())


def run(method, folder, kept=None, stop_after=10**6, budget=None, seconds=1e9, precision="fp32"):
    """Train, saving states to `kept` every `seconds`; stop after `stop_after` steps."""
    generator = torch.Generator().manual_seed(7)
    read = lambda n: (torch.randn(n, 2, 1, 1, generator=generator), None)
    workspace = make_workspace(method.teacher, folder, budget or BudgetConfig(images=IMAGES))
    resume = None
    if kept is not None:
        resume = Resume(kept, seconds, {"read": generator}, stop=StopAfter(stop_after))
    checkpoints = Checkpoints(FRACTIONS, folder / "checkpoints", NFE)
    read, loop = read if method.needs_data else None, Loop(BATCH, compute=ComputeConfig(precision=precision))
    return train(method, method.config, workspace, read, loop, SILENT, checkpoints, resume)


def counted(cost):
    """A cost without its seconds."""
    return {name: value for name, value in vars(cost).items() if "seconds" not in name}


def losses(trained):
    return [(point.images, point.loss) for point in trained.curve]


def checkpoints_of(trained):
    return [(c.fraction, c.images, c.ready, c.file, c.sha256, counted(c.cost)) for c in trained.checkpoints]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        *((name, 7) for name in METHODS),
        ("pd", 1),
        ("pd", STEPS - 2),
        ("reflow", STEPS - 4),  # in its second phase, whose pairs are those of the first phase's average
        *(pytest.param(name, n, marks=pytest.mark.nightly) for name in METHODS for n in (1, STEPS - 2) if name != "pd"),
    ],
)
def test_an_interrupted_training_ends_with_the_same_weights(name, first, tmp_path):
    """Three processes are interrupted, the first after `first` steps; the fourth runs to the end."""
    whole, method, kept = averaged_method(name), averaged_method(name), states(tmp_path)
    expected = run(whole, tmp_path / "whole")
    for stop_after in (first, 1, 3):  # the last of them may end before it is interrupted
        torch.manual_seed(stop_after)  # each process has another state of the global generator
        try:
            run(averaged_method(name), tmp_path, kept, stop_after)
        except Interrupted:
            assert kept.newest() is not None
    again = run(method, tmp_path, kept)
    assert same_weights(weights_of(whole), weights_of(method))
    assert counted(again.cost) == counted(expected.cost)
    assert losses(again) == losses(expected)
    assert again.counts.state() == expected.counts.state() and again.counts.updates >= STEPS
    assert checkpoints_of(again) == checkpoints_of(expected)
    assert any(line.startswith("continuing after ") for line in kept.progress.lines)


def test_saving_states_changes_nothing(tmp_path):
    with_some, without = averaged_method("pd"), averaged_method("pd")
    kept = states(tmp_path)
    one, other = run(with_some, tmp_path / "a", kept, seconds=0.0), run(without, tmp_path / "b")
    assert same_weights(weights_of(with_some), weights_of(without)) and losses(one) == losses(other)
    assert len(list(kept.folder.iterdir())) == kept.keep


# --- other state of a training ---------------------------------------------------------------------------------------


class Odd(Method):
    """Draws from its own generator and the global ones, and trains two networks in three phases."""

    name, paper, needs_data, Config = "odd", "", False, MethodConfig

    def __init__(self, **settings) -> None:
        super().__init__(MethodConfig(**{"ema_halflife_kimg": 0.01} | settings), gaussian_teacher())
        self.student, self.other = Weight(0.5), Weight(-0.5)
        self.register_buffer("count", torch.zeros(()))

    def phases(self):
        return [Phase("one"), Phase("two", fresh=False), Phase("three")]

    def prepare(self, workspace):
        self.generator = torch.Generator().manual_seed(workspace.seed)

    def start_phase(self, index):
        self.scale = [1.0, 2.0, 4.0][index]
        if not index:
            self.offset = 0.25  # set only by the first phase

    def train_step(self, batch):
        drawn = torch.randn((), generator=self.generator) + torch.randn(()) + random.random() + np.random.rand()
        yield self.other, (self.other.w - drawn).square() + self.offset
        yield self.student, (self.student.w * self.scale - self.other.w.detach() + batch.uniform().mean()).square()

    def after_step(self):
        self.count += 1

    def sample(self, noise, nfe, c):
        raise NotImplementedError


def seed_everything() -> None:
    torch.manual_seed(1), np.random.seed(2), random.seed(3)


@pytest.mark.parametrize("stop_after", [1, 3, 6, 7, 8, 13, 14, 19])
def test_generators_phases_and_several_networks_are_restored(stop_after, tmp_path):
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        whole, method = Odd(), Odd()
        seed_everything()
        expected = run(whole, tmp_path / "whole")
        kept = states(tmp_path)
        seed_everything()
        with pytest.raises(Interrupted):
            run(Odd(), tmp_path, kept, stop_after)
        again = run(method, tmp_path, kept)
    finally:
        torch.set_rng_state(before[0]), np.random.set_state(before[1]), random.setstate(before[2])
    assert same_weights(weights_of(whole), weights_of(method))
    assert losses(again) == losses(expected)


WITH_BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "radam", "ema_start": "bias_corrected", "lr_decay": "inverse_sqrt"},
        {"optimizer": "adam", "weight_decay": 0.1, "ema_sigma_rel": 0.1, "grad_clip_by": "value"},
        {"optimizer": "radam", "ema_start": "constant", "grad_nan_to_num": True, "beta2": 0.9},
        pytest.param({"optimizer": "adamw8bit"}, marks=WITH_BITSANDBYTES),
    ],
)
def test_each_optimizer_and_average_is_restored(settings, precision, tmp_path):
    whole, method, kept = Odd(**settings), Odd(**settings), states(tmp_path)
    seed_everything()
    run(whole, tmp_path / "whole", precision=precision)
    seed_everything()
    with pytest.raises(Interrupted):
        run(Odd(**settings), tmp_path, kept, 9, precision=precision)
    run(method, tmp_path, kept, precision=precision)
    assert same_weights(weights_of(whole), weights_of(method))


def test_a_network_that_is_not_an_attribute_cannot_be_saved(tmp_path):
    class Astray(Odd):
        def prepare(self, workspace):
            super().prepare(workspace)
            self.hidden = [Weight()]

        def train_step(self, batch):
            yield self.hidden[0], self.hidden[0].w.square()

    with pytest.raises(RuntimeError, match="yields a Weight that is not an attribute of the method"):
        run(Astray(), tmp_path, states(tmp_path), 1)


# --- the cost -------------------------------------------------------------------------------------------------------


def test_cost_before_an_interruption_is_charged_once(tmp_path):
    """Cached pairs are not charged again after a restart; what was spent before counts for the budget."""
    budget = BudgetConfig(limit=Limit.nfe, nfe=400)  # 18 pairs of 4 evaluations, then 24 per step
    expected = run(averaged_method("direct"), tmp_path / "whole", budget=budget).cost
    kept = states(tmp_path)
    with pytest.raises(Interrupted):
        run(averaged_method("direct"), tmp_path, kept, 5, budget=budget)
    again = run(averaged_method("direct"), tmp_path, kept, budget=budget).cost
    assert counted(again) == counted(expected) and again.teacher_nfe == 72


def test_seconds_continue_and_restoring_is_not_charged(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("distillbench.metering.stopwatch.time.perf_counter", lambda: clock[0])
    meter = Meter(BudgetConfig(limit=Limit.seconds, seconds=10), mlp_teacher(), "cpu")
    clock[0] += 3
    meter.charge(5, 7, 2)
    cost = replace(meter.cost(), images=9, student_seconds=1.5)
    clock[0] += 90  # the process died, and another starts
    later = Meter(BudgetConfig(limit=Limit.seconds, seconds=10), mlp_teacher(), "cpu")
    later.charge(5, 7, 2)
    clock[0] += 4
    later.restart(cost, Energy(11.0))
    assert later.cost() == replace(cost, other_seconds=cost.seconds - 2 - 1.5)
    clock[0] += 1
    now = later.cost()
    assert (now.seconds, now.teacher_seconds, now.student_seconds, now.images) == (9, 2, 1.5, 9)
    assert (now.teacher_nfe, later.spent()) == (7, 9)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_state_is_restored_as_it_was_saved(tmp_path):
    kept, state = states(tmp_path), State()
    state.add("a", State({"x": torch.arange(3), "y/z": torch.tensor(1.5)}, {"n": [1, None]}))
    state.values["cost"] = {"seconds": 0.1}
    kept.save(7, state)
    found = kept.newest()
    part = found.part("a")
    assert part.values == {"n": [1, None]} and found.values["cost"] == {"seconds": 0.1}
    assert torch.equal(part.tensors["x"], torch.arange(3)) and part.tensors["y/z"].item() == 1.5
    kept.clear()
    assert kept.newest() is None and not kept.folder.exists()


def test_only_the_last_two_states_stay(tmp_path):
    kept = states(tmp_path)
    for images in (5, 100, 20):
        kept.save(images, State({}, {"images": images}))
    assert kept.newest().values["images"] == 100 and len(list(kept.folder.iterdir())) == 2


DAMAGE = {
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
}


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_renamed_and_the_previous_one_is_used(damage, tmp_path):
    kept = states(tmp_path)
    for images in (10, 20):
        kept.save(images, State({"x": torch.full((9,), images)}, {"images": images}))
    (last,) = kept.folder.glob("state-000000000020-*")
    DAMAGE[damage](last)
    assert kept.newest().values["images"] == 10
    assert kept.progress.lines == [
        f"the state {last.name} cannot be used: its checksum is wrong; it was renamed to aside-{last.name}"
    ]
    assert kept.newest().values["images"] == 10 and len(kept.progress.lines) == 1


def test_a_state_of_another_format_is_not_used(tmp_path, monkeypatch):
    kept = states(tmp_path)
    monkeypatch.setattr(distillbench.training.resume, "FORMAT", 0)
    kept.save(10, State({}, {}))
    monkeypatch.undo()
    assert kept.newest() is None
    assert "its format is 0, this version reads format 2; it was renamed" in kept.progress.lines[0]


def test_a_file_that_is_not_a_state_is_renamed(tmp_path):
    kept = states(tmp_path)
    kept.folder.mkdir(parents=True)
    path = kept.folder / "state-000000000001-0.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    named = path.with_name(f"state-000000000001-{distillbench.training.resume.sha256_file(path)[:16]}.safetensors")
    path.rename(named)
    assert kept.newest() is None and "its format is None" in kept.progress.lines[0]
    assert load_file(kept.folder / f"aside-{named.name}")


def test_a_full_disk_loses_the_state_but_not_the_training(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    kept = states(tmp_path)
    monkeypatch.setattr(distillbench.training.resume, "save_file", full)
    whole, method = averaged_method("cm"), averaged_method("cm")
    run(whole, tmp_path / "whole")
    run(method, tmp_path, kept, seconds=0.0)
    assert same_weights(weights_of(whole), weights_of(method))
    assert "could not be saved: [Errno 28] No space left on device" in kept.progress.lines[0]
    assert not list(kept.folder.iterdir())
