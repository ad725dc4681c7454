"""Progressive distillation against DDIM, the closed-form chain of a Gaussian, and oracle students."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from analytic import (
    close,
    ddim_chain,
    gaussian_images,
    gaussian_map,
    gaussian_teacher,
    loss_of,
    make_batch,
    make_workspace,
    mixture_teacher,
    mlp_teacher,
    same_weights,
    slope,
    some_schedules,
    time,
    weights_of,
)
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.denoiser import implied_eps
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.samplers import time_like
from distillbench.diffusion.schedules import SCHEDULES, VPCosine
from distillbench.errors import UserError
from distillbench.runs.sampling_settings import as_trained, sampling_settings
from distillbench.system.progress import Step
from distillbench.training.budget import BudgetConfig
from distillbench.training.loop import Loop, train
from distillbench_pd import ProgressiveDistillation

pytestmark = pytest.mark.usefixtures("float64")


def target_of(method, x_t: Tensor, index: Tensor, c=UNCONDITIONAL) -> Tensor:
    """x~ at the times that belong to the index."""
    return method.target(x_t, index, method.times_at(index), c)


def pd(teacher=None, phase: int | None = None, **settings) -> ProgressiveDistillation:
    method = ProgressiveDistillation(ProgressiveDistillation.Config(**settings), teacher or gaussian_teacher())
    if phase is not None:
        method.start_phase(phase)
    return method


def ddim_to(schedule, z_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """alpha_s x_0 + sigma_s eps^, written out."""
    return schedule.alpha(s) * x_0 + schedule.sigma(s) * implied_eps(z_t, x_0, schedule.alpha(t), schedule.sigma(t))


def stretched(schedule, u: Tensor) -> Tensor:
    """Time u of [0, 1] on the schedule's own range."""
    return schedule.t_min + u * (schedule.t_max - schedule.t_min)


# --- the target ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp_cosine", "vp_linear", "flow_matching", "ve"])
def test_one_step_with_the_target_lands_where_two_steps_of_the_teacher_do(name):
    """DDIM(z_t, x~, t -> t'') = z_t'' to machine precision (relative to x^), for i = 2..n."""
    schedule = SCHEDULES[name]()
    method = pd(mixture_teacher(schedule), phase=0, steps=16)  # n = 8
    i = torch.arange(2, 9).view(-1, 1, 1, 1)
    t, t_1, t_2 = (stretched(schedule, (2 * i.double() - k) / 16) for k in (0, 1, 2))
    z_t = schedule.alpha(t) * 0.3 + schedule.sigma(t) * make_batch(7, (1, 1, 1)).noise()
    z_1 = ddim_to(schedule, z_t, method.teacher.denoise(z_t, t), t, t_1)
    z_2 = ddim_to(schedule, z_1, method.teacher.denoise(z_1, t_1), t_1, t_2)
    close(ddim_to(schedule, z_t, target_of(method, z_t, i, UNCONDITIONAL), t, t_2), z_2, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["vp_cosine", "vp_linear", "flow_matching"])
def test_the_last_step_ends_on_the_teacher_s_second_data_prediction(name):
    """i = 1: x~ is x^(z_t', t'), which the formula gives too, up to what is left of alpha and sigma at t_min."""
    schedule = SCHEDULES[name]()
    method = pd(mixture_teacher(schedule), phase=0, steps=16)
    t, t_1 = time(stretched(schedule, torch.tensor(1 / 8))), time(stretched(schedule, torch.tensor(1 / 16)))
    z_t = schedule.alpha(t) * 0.3 + schedule.sigma(t) * make_batch(5, (1, 1, 1)).noise()
    z_1 = ddim_to(schedule, z_t, method.teacher.denoise(z_t, t), t.expand(5, 1, 1, 1), t_1)
    x_1 = method.teacher.denoise(z_1, t_1.expand(5, 1, 1, 1))
    close(target_of(method, z_t, torch.ones(5, 1, 1, 1, dtype=torch.int64), UNCONDITIONAL), x_1, rtol=1e-14)


class Oracle(nn.Module):
    """The student that does in one step what its method's phase teacher does in two."""

    def __init__(self, method: ProgressiveDistillation) -> None:
        super().__init__()
        self.__dict__["method"] = method

    def forward(self, z_t: Tensor, t: Tensor, c=UNCONDITIONAL) -> Tensor:
        schedule = self.method.teacher.schedule
        i = (t - schedule.t_min) / (schedule.t_max - schedule.t_min) * self.method.n
        assert torch.allclose(i, i.round(), atol=1e-9)  # a student meets no other times
        return target_of(self.method, z_t, i.round().long().expand(len(z_t), 1, 1, 1), UNCONDITIONAL)


@pytest.mark.parametrize("steps", [2, 4, 16])
@pytest.mark.parametrize("name", some_schedules())
def test_nested_phases_with_oracle_students_are_ddim(name, steps):
    """After log2 N halvings one step is DDIM-N: here the closed-form product of gains of a Gaussian."""
    teacher = gaussian_teacher(SCHEDULES[name]())
    student, phases = None, int(math.log2(steps))
    for phase in range(phases):
        method = pd(teacher, phase=phase, steps=steps)
        if student is not None:
            method.taught_by = student
        student = Oracle(method)
    assert method.n == 1
    z = make_batch(6).noise()
    times = stretched(teacher.schedule, torch.arange(steps + 1, dtype=torch.float64) / steps)
    close(
        student(z, time_like(z, teacher.schedule.t_max)), ddim_chain(teacher.schedule, z, times), rtol=1e-9, atol=1e-9
    )


def test_the_loss_is_zero_at_the_oracle_and_not_at_the_teacher():
    for phase in range(3):
        method = pd(mixture_teacher(), phase=phase, steps=8)
        batch = lambda method=method: make_batch(64, (1, 1, 1), read=gaussian_images(0, (0.0,), (1.0,)))
        teacher = method.student
        method.student = Oracle(method)
        assert loss_of(method, batch()) < 1e-20
        method.student = teacher
        assert loss_of(method, batch()) > 1e-5


@pytest.mark.parametrize("weight", ["truncated_snr", "snr_plus_one", "edm"])
def test_weights(weight):
    """A student that is off by .1 everywhere has loss .01 w with w = max(SNR, 1), SNR + 1 or + 4, SNR = 1 / tan^2."""
    schedule = VPCosine()

    class Off(Oracle):
        def forward(self, z_t, t, c):
            return super().forward(z_t, t, c) + 0.1

    seen = set()
    for seed in range(30):  # one image, hence one t, a batch
        method = pd(phase=0, steps=8, weight=weight)
        method.student = Off(method)
        batch = make_batch(1, seed=seed, read=gaussian_images())
        again = make_batch(1, seed=seed)
        again.noise()
        i = again.integers(1, 5).item()
        seen.add(i)
        snr = math.tan(schedule.theta_0 + i / 4 * (schedule.theta_1 - schedule.theta_0)) ** -2
        w = {"truncated_snr": max(snr, 1.0), "snr_plus_one": snr + 1, "edm": snr + 1 / 0.5**2}[weight]
        assert loss_of(method, batch).item() == pytest.approx(0.01 * w, rel=1e-8)
    assert seen == {1, 2, 3, 4}


def test_a_v_loss_is_an_x_loss_weighted_with_snr_plus_one():
    """|v~ - v|^2 = (SNR + 1) |x~ - x^|^2 where alpha^2 + sigma^2 = 1 (specification 1.3)."""
    method = pd(mlp_teacher(prediction="v"), phase=0, steps=8, weight="snr_plus_one")
    schedule = method.teacher.schedule
    loss = loss_of(method, make_batch(16, read=gaussian_images()))
    batch = make_batch(16, read=gaussian_images())
    x_0, eps, i = batch.x_0, batch.noise(), batch.integers(1, 5)
    t = i.double() / 4
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    z_t = alpha * x_0 + sigma * eps
    x_tilde = target_of(method, z_t, i, UNCONDITIONAL)
    v_tilde = alpha * implied_eps(z_t, x_tilde, alpha, sigma) - sigma * x_tilde
    close(loss, (v_tilde - method.student.output(z_t, t)).square().mean(), rtol=1e-7)


def test_a_step_draws_all_of_its_grid_and_noises_real_images():
    """What the phase's teacher is asked first: z_t = alpha x_0 + sigma eps at t in {1/n, ..., 1}."""
    method = pd(phase=0, steps=8)  # n = 4
    asked = []
    method.teacher.denoiser.register_forward_pre_hook(lambda module, inputs: asked.append(inputs))
    loss_of(method, make_batch(300, read=gaussian_images()))
    (z_t, t, _), (_, t_1, _) = asked
    batch = make_batch(300, read=gaussian_images())
    x_0, eps = batch.x_0, batch.noise()
    close(z_t, VPCosine().alpha(t) * x_0 + VPCosine().sigma(t) * eps, rtol=1e-12)
    assert sorted(set(t.flatten().tolist())) == [0.25, 0.5, 0.75, 1.0]
    close(t_1, t - 1 / 8, rtol=1e-12)


# --- phases ----------------------------------------------------------------------------------------------------------


def test_halvings_and_shares():
    method = pd(steps=16)
    assert method.halvings == [8, 4, 2, 1]
    shares = lambda method: [phase.share for phase in method.phases()]
    assert shares(method) == [1.0, 1.0, 2.0, 2.0]  # the paper: twice as long for 2 and 1 steps
    assert shares(pd(steps=16, shares=[3.0])) == [3.0] * 4 and shares(pd(steps=8, shares=[1, 2, 3])) == [1, 2, 3]
    assert all(phase.fresh for phase in method.phases())
    assert pd(steps=2).halvings == [1] and shares(pd(steps=2)) == [2.0]
    for index, n in enumerate([8, 4, 2, 1]):
        method.start_phase(index)
        assert method.n == n and method.grid.tolist() == [j / (2 * n) for j in range(2 * n + 1)]


def test_at_the_end_of_a_phase_the_average_becomes_teacher_student_and_snapshot():
    method = pd(mlp_teacher(), phase=1, steps=8)
    average = mlp_teacher(seed=7).student()
    before = weights_of(method.students["4"])
    method.end_phase(1, average)
    for network in (method.frozen_copy, method.student, method.students["2"]):
        assert same_weights(weights_of(network), weights_of(average))
    for n in ("4", "1"):
        assert same_weights(weights_of(method.students[n]), before)
    assert same_weights(weights_of(method.teacher.denoiser), before)  # the teacher that all methods share
    with torch.no_grad():
        next(method.student.parameters()).add_(1.0)  # they are copies
    assert same_weights(weights_of(method.frozen_copy), weights_of(average))
    assert not any(p.requires_grad for p in [*method.frozen_copy.parameters(), *method.students.parameters()])
    assert all(p.requires_grad for p in method.student.parameters())


@pytest.mark.parametrize("halflife", [0.0, 0.05])
def test_training_hands_the_average_from_phase_to_phase(tmp_path, halflife):
    """Each phase starts with teacher = student = the snapshot of the phase before; the last snapshot is the result."""
    starts = []

    class Watched(ProgressiveDistillation):
        def start_phase(self, index):
            super().start_phase(index)
            starts.append((weights_of(self.frozen_copy), weights_of(self.student)))

    teacher = mlp_teacher()
    method = Watched(Watched.Config(steps=8, ema_halflife_kimg=halflife), teacher)
    workspace = make_workspace(teacher, tmp_path, BudgetConfig(images=500))
    train(method, method.config, workspace, gaussian_images(), Loop(25), Step(lambda fraction, note: None))
    snapshots = [weights_of(teacher.denoiser), *(weights_of(method.students[n]) for n in ("4", "2", "1"))]
    for (phase_teacher, student), snapshot in zip(starts, snapshots, strict=False):
        assert same_weights(phase_teacher, snapshot) and same_weights(student, snapshot)
    assert same_weights(weights_of(method.student), snapshots[-1])
    assert not any(same_weights(a, b) for k, a in enumerate(snapshots) for b in snapshots[:k])


# --- accounting and sampling -----------------------------------------------------------------------------------------


def test_evaluations_of_a_step(tmp_path):
    """Specification 8: T = 2, Sg = 1, for each image; the phase's teacher counts as teacher in every phase."""
    method = pd(mlp_teacher(), phase=0, steps=8)
    for phase in range(3):
        meter = make_workspace(method.teacher, tmp_path).meter
        method.start_phase(phase)
        loss_of(method, make_batch(7, read=gaussian_images()))
        method.end_phase(phase, method.student)
        assert (meter.teacher_nfe, meter.student_nfe) == (14, 7)
    assert method.needs_data


def test_gradients_reach_the_student_only():
    method = pd(mlp_teacher(), phase=0, steps=8)
    loss_of(method, make_batch(16, read=gaussian_images())).backward()
    assert all(p.grad is not None for p in method.student.parameters())
    others = [method.frozen_copy, method.students, method.teacher.denoiser]
    assert all(p.grad is None for network in others for p in network.parameters())


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_sample_is_ddim_with_the_student_of_that_many_steps(nfe, tmp_path):
    """Untrained snapshots are the teacher, so this is the teacher's DDIM in closed form; each has its own weights."""
    method = pd(steps=8)
    eps = make_batch(5).noise()
    times = torch.arange(nfe + 1, dtype=torch.float64) / nfe
    meter = make_workspace(method.teacher, tmp_path).meter
    close(
        method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL), ddim_chain(VPCosine(), eps, times), rtol=1e-9, atol=1e-9
    )
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 5 * nfe)
    used = []
    for n, student in method.students.items():
        student.register_forward_pre_hook(lambda module, inputs, n=n: used.append(n))
    method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL)
    assert set(used) == {str(nfe)}
    assert [n for n in range(10) if method.supports(n)] == [1, 2, 4] and method.keeps_noise(nfe)


@pytest.mark.parametrize("nfe", [1, 4])
def test_clipping_in_sampling_is_that_of_the_release(nfe, tmp_path):
    """ddim_step of its dpm.py: x^ is clipped, eps^ is that of the clipped x^, and the last step returns x^."""
    method, schedule = pd(mlp_teacher(), steps=8, clip=True), VPCosine()
    for parameter in method.students[str(nfe)].parameters():
        parameter.data.mul_(3.0)  # clipped often, not always
    meter, z = make_workspace(method.teacher, tmp_path).meter, 2 * make_batch(50).noise()
    sampled, outside = method.sample(FixedNoise([z]), nfe, UNCONDITIONAL), []
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 50 * nfe)
    for i in range(nfe, 0, -1):
        t, s = time(i / nfe), time((i - 1) / nfe)
        x = method.students[str(nfe)](z, t.expand(50, 1, 1, 1))
        outside.append((x.abs() > 1).double().mean().item())
        x = x.clip(-1, 1)
        eps = (z - schedule.alpha(t) * x) / schedule.sigma(t)
        z = schedule.alpha(s) * x + schedule.sigma(s) * eps if i > 1 else x
    close(sampled, z, atol=1e-10)
    assert all(0 < share < 1 for share in outside) and sampled.abs().max() == 1
    trained = as_trained(method.config)
    assert not trained.clip and sampling_settings(method.config) == {"clip": True}


@pytest.mark.parametrize("name", some_schedules())
def test_sample_answers_the_noise_scaled_to_the_schedule(name):
    """eps stands for x_T = sigma_T eps, also where sigma_T is 80 (VE)."""
    teacher = gaussian_teacher(SCHEDULES[name](), (0.0,), (6400.0,))
    schedule = teacher.schedule
    eps = make_batch(5, (1, 1, 1)).noise()
    times = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    x_T = schedule.sigma(time(schedule.t_max)) * eps
    expected = ddim_chain(schedule, x_T, times, (0.0,), (6400.0,))
    close(pd(teacher, steps=2).sample(FixedNoise([eps]), 1, UNCONDITIONAL), expected, rtol=1e-3)


def test_a_long_chain_approaches_the_exact_flow_with_order_1():
    """Oracle students from N = 8, 16, 32 against the Gaussian's exact flow: the halvings add no error."""
    teacher, z = gaussian_teacher(), make_batch(6).noise()
    limit, errors = gaussian_map(teacher.schedule, z, time(1.0), time(0.0)), []
    for steps in (8, 16, 32):
        student = None
        for phase in range(int(math.log2(steps))):
            method = pd(teacher, phase=phase, steps=steps)
            method.taught_by = student or method.taught_by
            student = Oracle(method)
        errors.append((student(z, time_like(z, 1.0)) - limit).square().mean().sqrt().item())
    assert slope(errors) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1},
        {"steps": 12},
        {"steps": 0},
        {"weight": "snr"},
        {"shares": [1.0, 2.0]},
        {"shares": [0.0]},
        {"shares": [1.0, 1.0, 1.0, -1.0]},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        ProgressiveDistillation.Config(**settings)


def test_teachers_that_predict_noise_are_refused():
    with pytest.raises(UserError, match="eps"):
        pd(mlp_teacher(prediction="eps"))
    for prediction in ("x0", "v", "flow"):
        pd(mlp_teacher(prediction=prediction))
