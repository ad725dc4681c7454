"""The training loop, with toy methods whose weights have a closed form.

The gradient of a toy's loss is constant, so Adam moves its weight by exactly lr x factor per step.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from torch import nn

import distillbench.metering.stopwatch
from analytic import (
    gaussian_images,
    make_batch,
    make_workspace,
    mlp_teacher,
    same_weights,
    time,
    weights_of,
)
from distillbench.datasets.dataset import Dataset, to_float
from distillbench.diffusion.conditioning import Conditioning
from distillbench.errors import DivergedError, UserError
from distillbench.system.progress import Progress
from distillbench.teachers.latents import Posteriors
from distillbench.training import data_stream
from distillbench.training.budget import BudgetConfig, Limit
from distillbench.training.compute import ComputeConfig
from distillbench.training.data_parallel import SINGLE_RANK
from distillbench.training.data_stream import DataStream
from distillbench.training.loop import Loop, Trained, TrialSteps, _Curve, train
from distillbench.training.method import Phase
from distillbench.training.optimizers import Average, learning_rate_factor
from distillbench.training.share import Share
from tiny_training import METHODS, SILENT, Ramp, Weight, optimizer

pytestmark = pytest.mark.usefixtures("float64")


def run(method, folder, images=400, batch_size=10, budget=None, read=None, seed=0, **changes) -> Trained:
    workspace = make_workspace(method.teacher, folder, budget or BudgetConfig(images=images), seed)
    return train(method, optimizer(**changes), workspace, read, Loop(batch_size), SILENT)


# --- the budget ------------------------------------------------------------------------------------------------------


def test_a_budget_in_images_is_met_exactly(tmp_path):
    method = Ramp()
    trained = run(method, tmp_path, images=1000, batch_size=64)
    assert method.sizes == [64] * 15 + [40]
    assert trained.cost.images == 1000


def test_a_batch_knows_its_step_within_the_phase(tmp_path):
    class Steps(Ramp):
        def train_step(self, batch):
            self.diary.append((batch.step, [part.step for part in batch.parts(2)]))
            yield from super().train_step(batch)

    method = Steps(phases=[Phase(), Phase(fresh=False)])
    trained = run(method, tmp_path, images=65)
    assert [entry for entry in method.diary if isinstance(entry, tuple)] == [(k, [k, k]) for k in (0, 1, 2, 3, 0, 1, 2)]
    assert trained.cost.images == 65  # each row of each batch


class Costly(Ramp):
    """Two evaluations of the teacher and one of a student for each image."""

    def train_step(self, batch):
        eps, t = batch.noise(), time([0.5] * batch.size)
        self.teacher.denoise(self.teacher.denoise(eps, t), t)
        self.teacher.student()(eps, t)
        yield from super().train_step(batch)


def test_a_budget_in_evaluations_stops_with_the_step_that_reaches_it(tmp_path):
    method = Costly()
    trained = run(method, tmp_path, batch_size=32, budget=BudgetConfig(limit=Limit.nfe, nfe=1000))
    assert method.sizes == [32] * 11  # 10 x 96 < 1000 <= 11 x 96
    assert (trained.cost.teacher_nfe, trained.cost.student_nfe) == (704, 352)


def test_a_budget_in_seconds_stops_with_the_step_that_reaches_it(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(distillbench.metering.stopwatch, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Slow(Ramp):
        def prepare(self, workspace):
            clock.now += 2

        def train_step(self, batch):
            clock.now += 3
            yield from super().train_step(batch)

    method = Slow()
    trained = run(method, tmp_path, budget=BudgetConfig(limit=Limit.seconds, seconds=10.0))
    assert len(method.sizes) == 3  # after 2, 5, 8 and then 11 seconds
    assert trained.cost.seconds == 11.0 and trained.cost.images == 30


def test_a_budget_used_up_by_prepare_is_an_error(tmp_path):
    class Greedy(Ramp):
        def prepare(self, workspace):
            workspace.meter.charge(0.0, 5000)

    method = Greedy()
    with pytest.raises(RuntimeError, match="budget of 1000 nfe"):
        run(method, tmp_path, budget=BudgetConfig(limit=Limit.nfe, nfe=1000))
    assert not method.sizes


class Dear:
    """Texts that took 7 s each to encode."""

    def seconds(self, count: int) -> float:
        return 7.0 * count


def test_encoding_of_training_prompts_is_charged(tmp_path):
    """Three of five, 21 s, are charged as other_seconds and count for a budget in seconds."""
    method = Ramp()
    asked = Conditioning(5, texts=Dear(), evaluated=range(3, 5))
    method.__dict__["teacher"] = dataclasses.replace(method.teacher, conditioning=asked)
    cost = run(method, tmp_path, images=100).cost
    assert 21 < cost.seconds < 28 and cost.other_seconds > 21
    with pytest.raises(RuntimeError, match="budget of 20 seconds"):
        run(method, tmp_path, budget=BudgetConfig(limit=Limit.seconds, seconds=20.0))


def test_restored_losses_are_on_the_device_of_the_next_ones():
    """The meta device stands for a GPU."""
    here, there = (_Curve(SimpleNamespace(device=device), None, SINGLE_RANK) for device in ("cpu", "meta"))
    here.add(torch.tensor(1.0))
    there.restore(here.state())
    there.add(torch.ones((), device="meta"))
    assert torch.stack(there.losses).device.type == "meta"


# --- phases ----------------------------------------------------------------------------------------------------------


def test_phases_share_the_budget_and_are_called_in_order(tmp_path):
    method = Ramp([Phase("a", 1.0), Phase("b", 2.0), Phase("c", 0.5)])
    run(method, tmp_path, images=70)
    steps = lambda n: ["step", "after"] * n
    expected = ["prepare", "start 0", *steps(2), "end 0", "start 1", *steps(4), "end 1", "start 2", *steps(1), "end 2"]
    assert method.diary == expected


class Preparing(Costly):
    """Its second phase is prepared by 300 evaluations; the weight is written down."""

    def prepare_phase(self, index, workspace):
        self.diary.append((index, self.student.w.item()))
        workspace.meter.charge(0.0, 300 * index)


def test_a_phase_is_prepared_with_the_networks_as_trained_so_far(tmp_path):
    """Linear decay over ten steps, and then over the ten that 300 evaluations leave of twenty."""
    method = Preparing([Phase("a", 1.0), Phase("b", 2.0)])
    run(method, tmp_path, budget=BudgetConfig(limit=Limit.nfe, nfe=900), lr_decay="linear")
    assert [entry for entry in method.diary if isinstance(entry, tuple)] == [(0, 0.0), (1, method.path[9])]
    assert method.diary[method.diary.index("start 1") + 1] == (1, method.path[9])
    assert method.moves == pytest.approx(2 * [0.5 * (1 - k / 10) for k in range(10)], rel=1e-6, abs=1e-12)


def test_a_phase_whose_preparation_uses_up_its_budget_is_an_error(tmp_path):
    method = Preparing([Phase("a", 1.0), Phase("b", 1.0), Phase("c", 1.0)])
    with pytest.raises(RuntimeError, match=r"budget of phase 'b', which ends at 67% of 900 nfe"):
        run(method, tmp_path, budget=BudgetConfig(limit=Limit.nfe, nfe=900))
    assert len(method.sizes) == 10


def test_the_learning_rate_starts_anew_in_a_fresh_phase(tmp_path):
    """Linear decay over 4 and then 8 steps: lr (1 - k / n)."""
    method = Ramp([Phase("a", 1.0), Phase("b", 2.0)])
    run(method, tmp_path, images=120, lr_decay="linear")
    expected = [0.5 * (1 - k / 4) for k in range(4)] + [0.5 * (1 - k / 8) for k in range(8)]
    assert method.moves == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_learning_rate_goes_on_in_a_phase_that_is_not_fresh(tmp_path):
    """One linear decay over a and b; then c, which is fresh, has its own."""
    method = Ramp([Phase("a", 1.0), Phase("b", 2.0, fresh=False), Phase("c", 1.0)])
    run(method, tmp_path, images=160, lr_decay="linear")
    expected = [0.5 * (1 - k / 12) for k in range(12)] + [0.5 * (1 - k / 4) for k in range(4)]
    assert method.moves == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("fresh", [True, False])
def test_adam_starts_anew_in_a_fresh_phase_only(tmp_path, fresh):
    """The gradient's sign changes with the phase: the first move shows whether Adam's momentum was kept."""
    method = Ramp([Phase("a", 1.0), Phase("b", 1.0, fresh=fresh)], sign=lambda step: 1.0 if step < 5 else -1.0)
    run(method, tmp_path, images=100, beta1=0.9, beta2=0.999)
    remembered = (0.9 * (1 - 0.9**5) - 0.1) / (1 - 0.9**6)  # Adam's bias-corrected mean of five +1 and one -1
    assert method.moves[5] == pytest.approx(-0.5 if fresh else 0.5 * remembered, rel=1e-6)


def test_the_learning_rate_schedule_begins_after_prepare(tmp_path):
    """prepare() uses half of the budget, and ten steps are left. Linear decay over those ten: lr (1 - k / 10)."""

    class Prepared(Costly):
        def prepare(self, workspace):
            workspace.meter.charge(0.0, 300)

    budget = BudgetConfig(limit=Limit.nfe, nfe=600)
    method = Prepared()
    run(method, tmp_path, budget=budget, lr_decay="linear")
    assert method.moves == pytest.approx([0.5 * (1 - k / 10) for k in range(10)], rel=1e-6, abs=1e-12)


# --- learning rate, Adam ---------------------------------------------------------------------------------------------


def test_learning_rate_factor():
    """Linear to 1 at the end of the warm-up, then decay to 0 at 1 (values from the definition)."""
    points = {0.0: 0.0, 0.1: 0.5, 0.2: 1.0}
    after = {
        "constant": {0.4: 1.0, 0.6: 1.0, 1.0: 1.0},
        "linear": {0.4: 0.75, 0.6: 0.5, 1.0: 0.0},
        "cosine": {0.4: (1 + math.sqrt(0.5)) / 2, 0.6: 0.5, 1.0: 0.0},
    }
    for decay, more in after.items():
        config = optimizer(lr_warmup=0.2, lr_decay=decay)
        for progress, factor in {**points, **more}.items():
            assert learning_rate_factor(config, progress) == pytest.approx(factor, abs=1e-12), (decay, progress)
    assert learning_rate_factor(optimizer(lr_decay="cosine"), 0.0) == 1.0
    assert learning_rate_factor(optimizer(lr_warmup=1.0, lr_decay="linear"), 0.25) == 0.25


def test_the_factor_reaches_the_weights(tmp_path):
    """20 steps: 4 of warm-up (0, 1/4, 1/2, 3/4), then a cosine over 16."""
    method = Ramp()
    run(method, tmp_path, images=200, lr_warmup=0.2, lr_decay="cosine")
    factors = [k / 4 for k in range(4)] + [(1 + math.cos(math.pi * k / 16)) / 2 for k in range(16)]
    assert method.moves == pytest.approx([0.5 * factor for factor in factors], rel=1e-6, abs=1e-12)


def test_gradients_are_clipped_to_their_norm(tmp_path):
    """Gradients 1000, 1, 1, ... are all clipped to 1: every move is lr. Unclipped, Adam's v would remember 1000."""
    method = Ramp(sign=lambda step: 1000.0 if step == 0 else 1.0)
    run(method, tmp_path, images=50, grad_clip=1.0)
    assert method.moves == pytest.approx([0.5] * 5, rel=1e-5)


def test_weight_decay_is_decoupled(tmp_path):
    """Without a gradient, w shrinks by 1 - lr decay per step (Loshchilov & Hutter 2019)."""
    method = Ramp(sign=lambda step: 0.0)
    nn.init.constant_(method.student.w, 2.0)
    run(method, tmp_path, images=50, weight_decay=0.2)
    assert method.student.w.item() == pytest.approx(2.0 * (1 - 0.5 * 0.2) ** 5, rel=1e-12)


# --- the average -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 4, 100])
def test_the_average_has_moved_half_way_after_one_half_life(batches):
    """Weight 0 for long, then 1: after `halflife` more images the average is 1/2, for any batch size."""
    network = Weight(0.0)
    average = Average(network, optimizer(ema_halflife_kimg=2.0))
    average.update(100_000)
    network.w.data.fill_(1.0)
    for k in range(2 * batches):
        average.update(2000 // batches)
        if k + 1 == batches:
            assert average.module.w.item() == pytest.approx(0.5, abs=1e-12)
    assert average.module.w.item() == pytest.approx(0.75, abs=1e-12)


def test_the_average_forgets_its_start():
    """At the start the half-life is 5 % of the images seen, so after one batch 2^-20 of the initial weight is left."""
    network = Weight(1.0)
    average = Average(network, optimizer(ema_halflife_kimg=1e9))
    network.w.data.fill_(0.0)
    average.update(64)
    assert average.module.w.item() == pytest.approx(2.0**-20, rel=1e-6)


def averaged(path: list[float], batch: int, halflife: float) -> float:
    """The moving average of the weights after each step, by its definition."""
    value, images = 0.0, 0
    for w in path:
        images += batch
        keep = 2.0 ** (-batch / min(halflife, 0.05 * images))
        value = keep * value + (1 - keep) * w
    return value


@pytest.mark.parametrize("fresh", [True, False])
def test_training_ends_with_the_average_in_the_student(tmp_path, fresh):
    """The closed form over the toy's path; in a fresh phase the images seen, and the average, start anew."""
    method = Ramp([Phase("a", 1.0), Phase("b", 1.0, fresh=fresh)])
    run(method, tmp_path, images=400, ema_halflife_kimg=0.008)
    first, both = averaged(method.path[:20], 10, 8.0), averaged(method.path, 10, 8.0)
    again = averaged([w - method.path[19] for w in method.path[20:]], 10, 8.0) + method.path[19]
    assert method.path == pytest.approx([0.5 * (k + 1) for k in range(40)], rel=1e-6)
    expected = [first, again if fresh else both]
    assert [value for _, value in method.averages] == pytest.approx(expected, rel=1e-12)
    assert method.student.w.item() == pytest.approx(expected[1], rel=1e-12)


def test_without_a_half_life_the_average_is_the_student(tmp_path):
    method = Ramp()
    run(method, tmp_path)
    assert method.averages == [(True, method.path[-1])] and method.student.w.item() == method.path[-1]


def test_the_average_is_frozen_and_copies_buffers():
    network = nn.BatchNorm1d(2).train()
    average = Average(network, optimizer(ema_halflife_kimg=1.0))
    network(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    average.update(8)
    assert torch.equal(average.module.running_mean, network.running_mean)
    assert network.running_mean.abs().min() > 0 and network.training
    assert not average.module.training and not any(p.requires_grad for p in average.module.parameters())


# --- divergence and the curve ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 17, 75, 119])
def test_a_loss_that_is_not_finite_stops_training(tmp_path, bad, at):
    method = Ramp(extra_loss=lambda step: bad if step == at else 0.0)
    with pytest.raises(DivergedError, match=r"nan|inf"):
        run(method, tmp_path, images=1200)
    assert at < len(method.sizes) <= at + 50


def test_the_curve_has_the_mean_loss_since_the_point_before(tmp_path):
    """loss_k = k, w apart (sign 0): means of arithmetic sequences."""
    method = Ramp(sign=lambda step: 0.0, extra_loss=float)
    trained = run(method, tmp_path, images=1200)
    ends = [point.images // 10 for point in trained.curve]
    assert ends[-1] == 120 and ends == sorted(set(ends))
    for begin, end, point in zip([0, *ends], ends, trained.curve, strict=False):
        assert point.loss == pytest.approx((begin + end - 1) / 2, rel=1e-12)
    assert all(a.seconds <= b.seconds for a, b in zip(trained.curve, trained.curve[1:], strict=False))


# --- which networks change -------------------------------------------------------------------------------------------


class Two(Ramp):
    """The first loss has a gradient in two networks, the second in one; a third network is never trained."""

    def __init__(self, yields=("student", "critic")) -> None:
        super().__init__()
        self.critic, self.bystander, self.yields = Weight(1.0), Weight(1.0), yields

    def train_step(self, batch):
        losses = {
            "student": lambda: -self.student.w + 5 * self.critic.w + self.bystander.w,
            "critic": lambda: -self.critic.w,
        }
        for name in self.yields:
            yield getattr(self, name), losses[name]()


def test_only_the_yielded_network_changes(tmp_path):
    method = Two(yields=("student",))
    run(method, tmp_path, images=50)
    assert method.student.w.item() == pytest.approx(2.5, rel=1e-6)
    assert method.critic.w.item() == method.bystander.w.item() == 1.0


def test_a_loss_leaves_no_gradient_in_other_networks(tmp_path):
    """The gradient +5 that the student's loss leaves in the critic must not outweigh the critic's own -1."""
    method = Two()
    run(method, tmp_path, images=50)
    assert method.critic.w.item() == pytest.approx(1 + 5 * 0.5, rel=1e-6)
    assert method.student.w.item() == pytest.approx(2.5, rel=1e-6)
    assert method.bystander.w.item() == 1.0


def test_the_network_is_updated_before_train_step_continues(tmp_path):
    seen = []

    class Looks(Ramp):
        def train_step(self, batch):
            before = self.student.w.item()
            yield self.student, -self.student.w
            seen.append(self.student.w.item() - before)

    run(Looks(), tmp_path, images=30)
    assert seen == pytest.approx([0.5] * 3, rel=1e-6)


# --- reproducibility -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_one_seed_gives_the_same_weights_bit_for_bit(tmp_path, name):
    torch.set_default_dtype(torch.float32)
    cls, settings = METHODS[name]

    def weights(seed: int, folder: str):
        teacher = mlp_teacher()
        teachers_weights = weights_of(teacher.denoiser)
        torch.manual_seed(seed)  # new layers, such as BOOT's embedding, are drawn from the global generator
        method = cls(cls.Config(**settings), teacher)
        images = gaussian_images(seed)
        read = (lambda n: (images(n)[0].float(), None)) if cls.needs_data else None
        workspace = make_workspace(teacher, tmp_path / folder, BudgetConfig(images=300), seed)
        train(method, method.config, workspace, read, Loop(32), SILENT)
        assert same_weights(weights_of(teacher.denoiser), teachers_weights)  # the teacher does not change
        return weights_of(method)

    first = weights(0, "a")
    assert same_weights(first, weights(0, "b"))
    assert not same_weights(first, weights(1, "c"))


@pytest.mark.parametrize("name", METHODS)
def test_trial_steps_repeat_a_cycle_and_leave_the_weights_alone(tmp_path, name):
    """As many evaluations each time as those of any training: what is timed for an estimate is what a training does."""
    torch.set_default_dtype(torch.float32)
    cls, settings = METHODS[name]
    torch.manual_seed(0)
    method = cls(cls.Config(**settings), mlp_teacher())
    images, workspace = gaussian_images(), make_workspace(method.teacher, tmp_path, dry=True)
    read = (lambda n: (images(n)[0].float(), None)) if cls.needs_data else None
    method.prepare(workspace)
    trial = TrialSteps(method, method.config, workspace, read, Loop(8))
    for index, phase in enumerate(method.phases()):
        trial.begin(index)
        before, counts = weights_of(method.student), []
        for _ in range(2):
            begin = workspace.meter.evaluations
            trial.take(phase.cost_steps, 8)
            counts.append(workspace.meter.evaluations - begin)
        assert counts[0] > 0 and (counts[0] == counts[1] or phase.cost_varies)
        assert same_weights(weights_of(method.student), before)
        trial.end(index)
    assert workspace.meter.images == 0


# --- inputs of a step ------------------------------------------------------------------------------------------------


def test_batch_draws_have_the_promised_shapes_and_ranges():
    batch = make_batch(4000)
    u, i = batch.uniform(0.2, 0.5), batch.integers(3, 6)
    assert u.shape == i.shape == (4000, 1, 1, 1) and u.dtype is torch.float64 and i.dtype is torch.int64
    assert 0.2 <= u.min() < 0.201 and 0.499 < u.max() < 0.5
    assert i.unique().tolist() == [3, 4, 5]
    assert batch.noise().shape == (4000, 2, 1, 1) and batch.noise().dtype is torch.float64
    assert abs(batch.noise().mean()) < 5 / math.sqrt(8000) and abs(batch.noise().var() - 1) < 0.1
    assert torch.equal(make_batch(4).noise(), make_batch(4).noise())


def test_real_images_are_read_when_asked_for_and_once():
    reads = []

    def read(size):
        reads.append(size)
        return torch.zeros(size, 2, 1, 1), None

    batch = make_batch(5, read=read)
    batch.noise()
    assert not reads
    assert batch.x_0 is batch.x_0 and reads == [5]


def test_real_images_are_refused_to_a_method_that_needs_none(tmp_path):
    class Peeks(Ramp):
        def train_step(self, batch):
            yield self.student, self.student.w * batch.x_0.sum()

    with pytest.raises(RuntimeError, match="needs_data"):
        run(Peeks(), tmp_path)


class Numbers(Dataset):
    """Image i has the value i everywhere."""

    def __init__(self, config=None) -> None:
        self.shape = (1, 2, 2)

    def __len__(self) -> int:
        return 200

    def read(self, indices):
        return indices.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_data_stream_draws_uniformly_in_the_same_order_for_all():
    stream = DataStream(Numbers(), 0, "cpu")
    images = torch.cat([stream.read(size)[0] for size in (30, 70)])
    again = DataStream(Numbers(), 0, "cpu")
    assert torch.equal(images[:30], again.read(30)[0]) and torch.equal(images[30:], again.read(70)[0])
    assert not torch.equal(images[:30], DataStream(Numbers(), 1, "cpu").read(30)[0])
    values = DataStream(Numbers(), 0, "cpu").read(20_000)[0][:, 0, 0, 0]
    counts = torch.bincount(((values + 1) * 127.5).round().long(), minlength=200)
    assert len(counts) == 200 and (counts - 100).abs().max() < 5.5 * 10


@pytest.fixture
def large(monkeypatch):
    """No dataset is small enough to stay on the device."""
    monkeypatch.setattr(data_stream, "HELD_BYTES", 0)


SIZES = (30, 30, 30, 7, 30, 30)  # the smaller batch was not prefetched


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetching_changes_no_image(large, monkeypatch, ahead):
    read = [DataStream(Numbers(), 0, "cpu", ahead).read, DataStream(Numbers(), 0, "cpu").read]
    assert all(torch.equal(read[0](size)[0], read[1](size)[0]) for size in SIZES)
    monkeypatch.setattr(data_stream, "HELD_BYTES", 2**20)
    held, streamed = DataStream(Numbers(), 0, "cpu"), DataStream(Numbers(), 0, "cpu")
    monkeypatch.setattr(data_stream, "HELD_BYTES", 0)
    assert held._holds and torch.equal(held.read(9)[0], streamed.read(9)[0])


@pytest.mark.parametrize("after", range(len(SIZES)))
def test_a_stream_is_restored_whatever_was_prefetched(large, after):
    whole, cut = DataStream(Numbers(), 0, "cpu"), DataStream(Numbers(), 0, "cpu", 2)
    expected = [whole.read(size)[0] for size in SIZES]
    for size in SIZES[:after]:
        cut.read(size)
    state = cut.get_state().clone()
    cut.close()
    restored = DataStream(Numbers(), 5, "cpu", 2)
    restored.read(11)
    restored.set_state(state)
    for size, images in zip(SIZES[after:], expected[after:], strict=True):
        assert torch.equal(restored.read(size)[0], images)


def test_errors_while_prefetching_are_raised(large):
    class Damaged(Numbers):
        def read(self, indices):
            raise UserError("image 3 is cut off")

    with pytest.raises(UserError, match="cut off"):
        DataStream(Damaged(), 0, "cpu", 2).read(4)


@pytest.mark.parametrize("rounded", [True, False])
def test_a_preloaded_dataset_gives_the_same_batches(large, monkeypatch, rounded):
    """8-bit images as uint8, latents as float32. Beyond the limits the dataset is streamed."""

    class Latents(Numbers):
        def read(self, indices):
            return super().read(indices).float() / 7

    dataset = Numbers() if rounded else Latents()
    monkeypatch.setattr(data_stream, "fits_on", lambda device, size: size <= 200 * 4 * 4)
    monkeypatch.setattr(data_stream, "PRELOAD_BATCH", 64)
    held, plain = DataStream(dataset, 3, "cpu", 2), DataStream(dataset, 3, "cpu", 2)
    held.preload(Progress(None))
    assert held._held.shape == (200, 1, 2, 2) and held._held.dtype is (torch.uint8 if rounded else torch.float32)
    assert all(torch.equal(held.read(size)[0], plain.read(size)[0]) for size in SIZES)
    assert torch.equal(held.get_state(), plain.get_state())
    for limit in ("HELD_BYTES_ON_GPU", "fits_on"):
        with monkeypatch.context() as patched:
            patched.setattr(data_stream, limit, 799 if limit == "HELD_BYTES_ON_GPU" else lambda device, size: False)
            streamed = DataStream(dataset, 3, "cpu", 2)
            streamed.preload(Progress(None))
            assert streamed._held is None


def test_each_rank_reads_its_share_of_images(large):
    shares = [DataStream(Numbers(), 0, "cpu", 1, Share(index, 3)) for index in range(3)]
    whole = DataStream(Numbers(), 0, "cpu").read(10)[0]
    for index, stream in enumerate(shares):
        assert torch.equal(stream.read(10)[0], whole[index::3])


def test_each_rank_reads_whole_groups_of_images(large):
    shares = [DataStream(Numbers(), 0, "cpu", 1, Share(index, 2, 3)) for index in range(2)]
    whole = DataStream(Numbers(), 0, "cpu").read(12)[0]
    for rows, stream in zip(([0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]), shares, strict=True):
        assert torch.equal(stream.read(12)[0], whole[rows])


class Sided(Numbers):
    """Image i has the value i on the left and 255 - i on the right, and class i mod 3."""

    classes = 3

    def read(self, indices):
        left = super().read(indices)[..., :1]
        return torch.cat([left, 255 - left], dim=3)

    def labels(self, indices):
        return indices % 3


def batches(stream, sizes=(30, 30, 7, 30)):
    """Images and classes of some batches."""
    images, classes = zip(*(stream.read(size) for size in sizes), strict=True)
    stream.close()
    return torch.cat(images), torch.cat(classes)


def test_flips_mirror_half_of_the_same_images():
    """Those at the same places for every method: they belong to the seed and not to how images are read."""
    (images, classes), (plain, same) = (
        batches(DataStream(Sided(), 0, "cpu", flip=flip), [2000]) for flip in (True, False)
    )
    mirrored = (images == plain.flip(3)).flatten(1).all(dim=1)
    assert ((images == plain).flatten(1).all(dim=1) ^ mirrored).all() and torch.equal(classes, same)
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / 2000**0.5
    other = (batches(DataStream(Sided(), 1, "cpu", flip=flip), [2000])[0] for flip in (True, False))
    assert not torch.equal(mirrored, torch.eq(*other).flatten(1).all(dim=1).logical_not())


def posteriors() -> Posteriors:
    """Of a dataset's images: mean i in two channels, and standard deviations 1 + i / 100 and 2 + i / 100."""
    images = Sided()
    images.licence = images.sha256 = images.prompts = images.evaluated = None
    i = np.arange(len(images), dtype=np.float32)[:, None, None, None]
    return Posteriors(images, np.concatenate([i, i, 1 + i / 100, 2 + i / 100], axis=1) * np.ones((1, 1, 3, 2), "f4"))


def test_latents_are_drawn_anew_at_each_use_of_an_image():
    """(x - mean) / std is standard normal, and of its own at each use; images and classes are those of the means."""
    data, (images, classes) = posteriors(), batches(DataStream(Sided(), 0, "cpu"), [2000])
    assert data.shape == (2, 3, 2) and len(data) == len(Sided())
    x, same = batches(DataStream(data, 0, "cpu"), [2000])
    assert torch.equal(classes, same) and x.shape == (2000, 2, 3, 2)
    index = ((images[:, :, :1, :1] + 1) * 127.5).round()
    z = (x - index) / (torch.tensor([1.0, 2.0]).view(2, 1, 1) + index / 100)
    assert kstest(z.flatten().numpy(), norm.cdf).pvalue > 0.01
    assert len(z.flatten().unique()) > 0.99 * z.numel()
    other = batches(DataStream(data, 1, "cpu"), [2000])[0]
    assert not torch.equal(other, x) and torch.equal(batches(DataStream(data, 0, "cpu"), [2000])[0], x)
    with pytest.raises(ValueError, match="latents cannot be flipped"):
        DataStream(data, 0, "cpu", flip=True)


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("data", [Sided, posteriors], ids=["flips", "latents"])
def test_flips_and_latents_are_the_same_however_images_are_read(large, monkeypatch, ahead, data):
    """Prefetched, held, preloaded, in shares of ranks, after an interruption."""
    flip = data is Sided
    stream = lambda share=data_stream.WHOLE, seed=0: DataStream(data(), seed, "cpu", ahead, share, flip=flip)
    with monkeypatch.context() as patched:
        patched.setattr(data_stream, "HELD_BYTES", 2**20)
        expected, _ = batches(stream())
    assert torch.equal(batches(stream())[0], expected)
    with monkeypatch.context() as patched:
        patched.setattr(data_stream, "fits_on", lambda device, size: True)
        (preloaded := stream()).preload(Progress(None))
        assert preloaded._held is not None and torch.equal(batches(preloaded)[0], expected)
    for index in range(3):
        assert torch.equal(batches(stream(Share(index, 3)), [30])[0], expected[:30][index::3])
    cut, other = stream(), stream(seed=5)
    cut.read(30), other.read(11)
    other.set_state(cut.get_state().clone())
    cut.close()
    assert torch.equal(batches(other, (30, 7, 30))[0], expected[30:])


def test_uint8_becomes_minus_one_to_one():
    assert to_float(torch.tensor([0, 255, 51], dtype=torch.uint8)).tolist() == pytest.approx([-1, 1, -0.6])


@pytest.mark.parametrize("growth", [1e7, 1e300])
def test_an_exploding_loss_is_found_at_the_next_check(growth, tmp_path):
    """Within 50 steps, while it is still finite."""
    method = Ramp(extra_loss=lambda step: growth if step >= 60 else 1.0)
    with pytest.raises(DivergedError, match=r"the loss exploded from .* after 1000 images \(training\)"):
        run(method, tmp_path, images=4000, lr=1e-9)
    assert len(method.sizes) == 100


def test_a_loss_may_grow_below_the_limit(tmp_path):
    method = Ramp(extra_loss=lambda step: 1e5 if step >= 60 else 1.0)
    assert run(method, tmp_path, images=2000, lr=1e-9).cost.images == 2000


@pytest.mark.parametrize(("microbatch", "parts"), [(5, 2), (4, 3), (1, 10), (64, 1)])
def test_a_step_in_parts_is_one_step_of_the_whole_batch(microbatch, parts, tmp_path):
    """Accumulated gradients of means over parts, weighted by size, are the gradient of the mean over all."""

    class Fits(Ramp):
        def train_step(self, batch):
            self.sizes.append(batch.size)
            yield self.student, (self.student.w - batch.uniform()).square().mean()

    whole, method = Fits(), Fits()
    expected = run(whole, tmp_path / "a", images=100)
    workspace = make_workspace(method.teacher, tmp_path / "b", BudgetConfig(images=100))
    trained = train(method, optimizer(), workspace, None, Loop(10, microbatch), SILENT)
    assert sum(method.sizes) == 100 and trained.cost.images == 100
    assert len(method.sizes) == 10 * parts and max(method.sizes) <= microbatch
    assert method.student.w.item() == pytest.approx(whole.student.w.item(), abs=1e-12)  # the same random numbers
    assert [p.loss for p in trained.curve] == pytest.approx([p.loss for p in expected.curve], abs=1e-12)


# --- updates that were clipped or not finite -------------------------------------------------------------------------


class Pulled(Ramp):
    """Two networks whose gradients in step k are those listed."""

    def __init__(self, first, second) -> None:
        super().__init__()
        self.other, self.lists = Weight(), (first, second)

    def train_step(self, batch):
        step = len(self.sizes)
        self.sizes.append(batch.size)
        for network, gradients in zip((self.student, self.other), self.lists, strict=True):
            yield network, Pull.apply(network.w, gradients[step % len(gradients)])


class Pull(torch.autograd.Function):
    """The loss 0 with the given gradient."""

    @staticmethod
    def forward(context, w, gradient):
        context.gradient = gradient
        return w * 0.0

    @staticmethod
    def backward(context, grad):
        return grad * context.gradient, None


FIRST, SECOND = [0.5, -3.0, 1.5, 0.0], [0.1, -0.2, 20.0]  # gradients; those above 1: 2 of 4, 1 of 3


@pytest.mark.parametrize("steps", [12, 120])
def test_clipped_updates_of_all_networks_are_counted(steps, tmp_path):
    counts = run(Pulled(FIRST, SECOND), tmp_path, images=10 * steps, lr=1e-6, grad_clip=1.0).counts
    assert (counts.updates, counts.clipped, counts.nonfinite) == (2 * steps, steps // 2 + steps // 3, 0)


def test_without_clipping_no_update_is_clipped_and_nonfinite_ones_are_counted(tmp_path):
    method = Pulled([1.0, 2.0], [1.0, 1.0])
    counts = run(method, tmp_path, images=100, grad_clip=0.0).counts
    assert (counts.updates, counts.clipped, counts.nonfinite) == (20, None, 0)
    with pytest.raises(DivergedError, match=r"nan after 500 images .*; 50 updates had gradients that are not finite"):
        run(Pulled([math.inf], [1.0]), tmp_path, images=1000, grad_clip=0.0)
    # the first step makes the weight infinite; the check after it sees its loss, which is finite


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_updates_that_the_loss_scaler_skips_are_not_finite(clip, tmp_path):
    """Every fourth gradient overflows in fp16: the weight stays as it was, and the update counts as not finite."""
    method = Pulled([1.0, 2.0, 3.0, math.inf], [0.5])
    workspace = make_workspace(method.teacher, tmp_path, BudgetConfig(images=400))
    loop = Loop(10, compute=ComputeConfig(precision="fp16"))
    counts = train(method, optimizer(lr=1e-3, grad_clip=clip), workspace, None, loop, SILENT).counts
    assert (counts.updates, counts.clipped, counts.nonfinite) == (80, 20 if clip else None, 10)
    assert math.isfinite(method.student.w.item())
