"""TRACT against the paper's formulas, oracle students and the closed-form chains of a Gaussian."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from analytic import (
    MEAN,
    VARIANCE,
    close,
    column,
    ddim_chain,
    gaussian_images,
    gaussian_teacher,
    loss_of,
    make_batch,
    make_workspace,
    mixture_teacher,
    mlp_teacher,
    same_weights,
    some_schedules,
    table_teacher,
    time,
    weights_of,
)
from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition, Conditioning
from distillbench.diffusion.denoiser import Denoiser, implied_eps
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.samplers import TIME_GRIDS, heun_step, karras_grid, time_like, uniform_times
from distillbench.diffusion.schedules import SCHEDULES, VE, VPCosine
from distillbench.errors import UserError
from distillbench.networks.architectures import ResidualMLP
from distillbench.system.progress import Step
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import BudgetConfig
from distillbench.training.loop import Loop, train
from distillbench.training.method import Batch
from distillbench_tract import Tract

pytestmark = pytest.mark.usefixtures("float64")


def target_of(method, x_t: Tensor, index: Tensor, c=UNCONDITIONAL) -> Tensor:
    """x~ at the times that belong to the index."""
    e = (index - 1) // method.group * method.group
    times = method.grid[index], method.grid[(index - 1).clamp(min=1)], method.grid[e]
    return method.target(x_t, index, e, times, c)


def tract(teacher=None, phase: int | None = None, **settings) -> Tract:
    method = Tract(Tract.Config(**{"steps": [16, 4, 1]} | settings), teacher or gaussian_teacher())
    if phase is not None:
        method.start_phase(phase)
    return method


def ddim_to(schedule, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """alpha_s x_0 + sigma_s eps^, written out."""
    return schedule.alpha(s) * x_0 + schedule.sigma(s) * implied_eps(x_t, x_0, schedule.alpha(t), schedule.sigma(t))


def x_0_that_lands(schedule, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The released form: (sigma_s x_t - sigma_t x_s) / (alpha_t sigma_s - alpha_s sigma_t)."""
    alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
    return (sigma_s * x_t - sigma_t * x_s) / (alpha_t * sigma_s - alpha_s * sigma_t)


def integers(value: int | Tensor, x: Tensor) -> Tensor:
    """(B,1,1,1) int64."""
    return torch.as_tensor(value).expand(len(x)).view(-1, 1, 1, 1)


class Call(nn.Module):
    """A function in a network's place."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        return self.function(x_t, t, c)


def each_time(grid: Tensor, answer):
    """A denoiser on `grid` from answer(x_t, j, c) for images that are all at t_j."""

    def f(x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        out, times = torch.full_like(x_t, torch.nan), t.flatten().expand(len(x_t))
        for j in range(1, len(grid)):
            rows = times == grid[j]
            if rows.any():
                out[rows] = answer(x_t[rows], j, c[rows])
        assert not out.isnan().any()  # a student meets no other times
        return out

    return f


def chain_oracle(method: Tract):
    """Where the chain of the phase's teacher gets to at the group's end, as the x_0 of one jump. Own formulas."""
    schedule, grid, group, teacher = method.teacher.schedule, method.grid, method.group, method.taught_by

    def answer(x_t: Tensor, j: int, c: Condition) -> Tensor:
        end, x = group * math.floor((j - 1) / group), x_t
        for k in range(j, end, -1):
            x_0 = teacher(x, time_like(x, grid[k]), c)
            if k == 1:
                return x_0
            x = ddim_to(schedule, x, x_0, time_like(x, grid[k]), time_like(x, grid[k - 1]))
        return x_0_that_lands(schedule, x_t, x, time_like(x, grid[j]), time_like(x, grid[end]))

    return each_time(grid, answer)


def fixed_point(method: Tract):
    """The student that equals its own target, from time to time upwards; self-teachers that must not count say NaN."""

    def answer(x_t: Tensor, j: int, c: Condition) -> Tensor:
        counts = (j - 1) % method.group != 0
        nothing = lambda x, t, c: torch.full_like(x, torch.nan)
        method.self_teacher = Call((lambda x, t, c: answer(x, j - 1, c)) if counts else nothing)
        return target_of(method, x_t, integers(j, x_t), c)

    return each_time(method.grid, answer)


def last_student(teacher, c: Condition = UNCONDITIONAL, **settings):
    """x_T -> the answer of the student at the end of all phases, each trained to its fixed point."""
    student = None
    for phase in range(len(settings["steps"]) - 1):
        method = tract(teacher, phase, **settings)
        if student is not None:
            method.taught_by = student
        student = fixed_point(method)
    assert method.n == settings["steps"][-1] == 1
    return lambda x_T: student(x_T, time_like(x_T, method.grid[-1]), c)


# --- the target ------------------------------------------------------------------------------------------------------


def two_parts(method: Tract, j: Tensor):
    """x_t, x~ and x_t'' written out with DDIM, with any other denoiser as the self-teacher; e = 0 comes out as NaN."""
    schedule, grid = method.teacher.schedule, method.grid
    method.self_teacher = mixture_teacher(schedule, spreads=(0.4, 0.1, 0.3)).denoiser
    e = (j - 1).div(method.group, rounding_mode="floor") * method.group
    t, t_1, t_2 = grid[j], grid[j - 1], grid[e]
    x_t = schedule.alpha(t) * 0.3 + schedule.sigma(t) * make_batch(len(j), (1, 1, 1)).noise()
    x_1 = ddim_to(schedule, x_t, method.taught_by(x_t, t, UNCONDITIONAL), t, t_1)
    x_2 = ddim_to(schedule, x_1, method.self_teacher(x_1, t_1), t_1, t_2)
    return x_t, target_of(method, x_t, j, UNCONDITIONAL), torch.where(e == j - 1, x_1, x_2), t, t_2


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("times", ["uniform", "karras"])
@pytest.mark.parametrize("name", some_schedules())
def test_the_target_is_the_released_one_and_lands_on_the_two_part_chain(name, times, phase):
    """All groups but the last: both forms of x~ agree, and DDIM(x_t, x~, t -> t'') = x_t''."""
    schedule = SCHEDULES[name]()
    method = tract(mixture_teacher(schedule), phase, steps=[32, 8, 2], times=times)
    j = torch.arange(method.group + 1, len(method.grid)).view(-1, 1, 1, 1)
    assert len(j) == 28 if phase == 0 else 4
    x_t, x_tilde, x_2, t, t_2 = two_parts(method, j)
    close(x_tilde, x_0_that_lands(schedule, x_t, x_2, t, t_2), atol=1e-10)
    close(ddim_to(schedule, x_t, x_tilde, t, t_2), x_2, rtol=1e-12, atol=1e-12)


def test_forms_of_the_target_agree_to_machine_precision():
    """Specification 6: 6e-15 on the cosine schedule."""
    method = tract(mixture_teacher(), 0, steps=[16, 4, 1])
    x_t, x_tilde, x_2, t, t_2 = two_parts(method, torch.arange(5, 17).view(-1, 1, 1, 1))
    close(x_tilde, x_0_that_lands(VPCosine(), x_t, x_2, t, t_2), atol=6e-15)


@pytest.mark.parametrize("times", TIME_GRIDS)
@pytest.mark.parametrize("name", some_schedules())
def test_the_last_group_ends_on_a_data_prediction(name, times):
    """e = 0: the teacher's at j = 1, else the self-teacher's at t'; exact, finite, and nobody is asked at t_0."""
    teacher = mixture_teacher(SCHEDULES[name]())
    method = tract(teacher, 0, steps=[16, 4, 1], times=times)
    other = mixture_teacher(teacher.schedule, spreads=(0.4, 0.1, 0.3)).denoise
    asked = []
    method.taught_by = lambda x, t, c: asked.append(t) or teacher.denoise(x, t)
    method.self_teacher = Call(lambda x, t, c: asked.append(t) or other(x, t))
    j = torch.arange(1, 5).view(-1, 1, 1, 1)
    t, x_t = method.grid[j], make_batch(4, (1, 1, 1)).noise()
    target, f = target_of(method, x_t, j, UNCONDITIONAL), teacher.denoise(x_t, t)
    assert torch.equal(target[:1], f[:1]) and target.isfinite().all()
    x_1 = ddim_to(teacher.schedule, x_t[1:], f[1:], t[1:], t[:-1])
    close(target[1:], other(x_1, t[:-1]), atol=1e-12)
    assert min(times.min() for times in asked) == method.grid[1]  # which t_0 may equal


@pytest.mark.parametrize(
    "schedule", [VE(), VPCosine().restricted(math.log(0.002), math.log(80))], ids=["ve", "tract_cifar10"]
)
def test_in_float32_the_target_is_the_published_one_in_float64(schedule):
    """1024 steps to 32, as published: to 1e-6. The published form in float32 has two digits (VE) or four."""
    fine = tract(mixture_teacher(schedule), 0, steps=[1024, 32, 1])
    j = torch.arange(33, 1025).view(-1, 1, 1, 1)
    x_t, _, x_2, t, t_2 = two_parts(fine, j)
    published = x_0_that_lands(schedule, x_t, x_2, t, t_2)
    torch.set_default_dtype(torch.float32)
    rounded = tract(mixture_teacher(schedule), 0, steps=[1024, 32, 1])
    f = lambda x, t, c=UNCONDITIONAL: fine.taught_by(x.double(), t, c).float()
    rounded.taught_by = f
    rounded.self_teacher = Call(lambda x, t, c: fine.self_teacher(x.double(), t, c).float())
    target = target_of(rounded, x_t.float(), j, UNCONDITIONAL)
    assert target.dtype == torch.float32
    close(target.double(), published, atol=1e-6)
    in_float32 = x_0_that_lands(schedule, x_t.float(), x_2.float(), t, t_2)
    assert (in_float32.double() - published).abs().max() > 5e-5


@pytest.mark.parametrize("phase", [0, 1])
def test_the_clipped_target_is_the_released_one(phase):
    """post_xt_x0 of tc_distill.py, which clips x_0 and then computes eps, in both steps."""
    method = tract(mixture_teacher(), phase, steps=[32, 8, 2], clip=True)
    schedule, grid = method.teacher.schedule, method.grid
    f, g = method.taught_by, mixture_teacher(schedule, spreads=(0.4, 0.1, 0.3)).denoise
    wide = lambda network: lambda x, t, c=UNCONDITIONAL: 1.7 * network(x, t, UNCONDITIONAL)
    method.taught_by, method.self_teacher = wide(f), Call(wide(g))
    j = torch.arange(method.group + 1, len(grid)).repeat(20).view(-1, 1, 1, 1)
    e = (j - 1).div(method.group, rounding_mode="floor") * method.group
    t, t_1, t_2 = grid[j], grid[j - 1], grid[e]
    x_t = 2 * make_batch(len(j), (1, 1, 1)).noise()

    def post_xt_x0(x, network, t, s):
        x_0 = 1.7 * network(x, t, UNCONDITIONAL)
        assert (x_0.abs() > 1).any() and (x_0.abs() < 1).any()
        return ddim_to(schedule, x, x_0.clip(-1, 1), t, s)

    x_1 = post_xt_x0(x_t, f, t, t_1)
    x_2 = torch.where(e == j - 1, x_1, post_xt_x0(x_1, g, t_1, t_2))
    close(target_of(method, x_t, j), x_0_that_lands(schedule, x_t, x_2, t, t_2), atol=1e-10)


def test_samples_are_ddim_with_clipped_predictions():
    method, eps = tract(gaussian_teacher(VPCosine(), (0.9, -0.9), (0.5, 0.5)), clip=True), make_batch(64).noise()
    schedule, times, x = method.teacher.schedule, uniform_times(VPCosine(), 4), eps
    for k in (4, 3, 2, 1):
        t, s = (time_like(x, times[i]) for i in (k, k - 1))
        x_0 = method.teacher.denoise(x, t).clip(-1, 1)
        x = ddim_to(schedule, x, x_0, t, s)
    sample = method.sample(FixedNoise([eps]), 4, UNCONDITIONAL)
    close(sample, x_0, atol=1e-12)
    assert sample.abs().max() == 1


# --- oracle students -------------------------------------------------------------------------------------------------

CHAINS = [[16, 1], [16, 4, 1], [16, 8, 4, 2, 1], [12, 6, 2, 1]]


@pytest.mark.parametrize("steps", CHAINS, ids=str)
@pytest.mark.parametrize("name", some_schedules())
def test_phases_with_trained_students_are_ddim(name, steps):
    """TRACT = DDIM with T_0 steps: here the closed-form product of gains of a Gaussian."""
    teacher = gaussian_teacher(SCHEDULES[name]())
    x_T = make_batch(6).noise()
    expected = ddim_chain(teacher.schedule, x_T, uniform_times(teacher.schedule, steps[0]))
    close(last_student(teacher, steps=steps)(x_T), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("times", TIME_GRIDS)
@pytest.mark.parametrize("name", ["vp_cosine", "ve", "ddpm_linear"])
def test_the_same_on_every_grid(name, times):
    """Also where the grid's first two times are one."""
    schedule = SCHEDULES[name]()
    teacher, x_T, grid = gaussian_teacher(schedule), make_batch(6).noise(), TIME_GRIDS[times](schedule, 16)
    answer = last_student(teacher, steps=[16, 4, 1], times=times)(x_T)
    close(answer, ddim_chain(schedule, x_T, grid), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", CHAINS, ids=str)
def test_the_same_on_a_mixture(steps):
    """Where nothing is affine: DDIM written out."""
    teacher, eps = mixture_teacher(), make_batch(32, (1, 1, 1)).noise()
    x = eps
    for j in range(steps[0], 0, -1):
        t, s = (time_like(x, k / steps[0]) for k in (j, j - 1))
        x_0 = teacher.denoise(x, t)
        x = ddim_to(teacher.schedule, x, x_0, t, s)
    close(last_student(teacher, steps=steps)(eps), x_0, atol=1e-12)


@pytest.mark.parametrize("weight", ["truncated_snr", "snr_plus_one"])
@pytest.mark.parametrize("teacher", [gaussian_teacher, mixture_teacher])
def test_the_loss_is_zero_at_the_oracle_and_not_at_the_teacher(teacher, weight):
    """In every phase; from the second on the teacher is the oracle of the phase before."""
    oracle = None
    for phase in range(3):
        method = tract(teacher(), phase, steps=[27, 9, 3, 1], weight=weight)
        pixels = method.teacher.shape[0]
        images = [(64, method.teacher.shape, 0, gaussian_images(0, MEAN[:pixels], VARIANCE[:pixels])) for _ in range(3)]
        if oracle is not None:
            method.taught_by = oracle
        start, oracle = method.student, chain_oracle(method)
        method.student = method.self_teacher = Call(oracle)
        assert loss_of(method, make_batch(*images[0])) < 1e-22
        method.student = start  # a student that has not learnt yet, and a self-teacher that has
        assert loss_of(method, make_batch(*images[1])) > 1e-5
        method.student, method.self_teacher = Call(oracle), start.freeze()
        assert loss_of(method, make_batch(*images[2])) > 1e-7


# --- Heun ------------------------------------------------------------------------------------------------------------


def heun_chain(schedule, x_T: Tensor, times: Tensor) -> Tensor:
    """Heun's factors for dx^/dtau = tau (x^ - m) / (v + tau^2), from times[-1] to times[1], then E[x_0 | x_t]."""
    tau = schedule.noise_level(times)
    rate = lambda level: level / (column(VARIANCE) + level**2)
    away = x_T / schedule.alpha(time(times[-1])) - column(MEAN)
    for k in range(len(times) - 1, 1, -1):
        h = tau[k - 1] - tau[k]
        away = away * (1 + h / 2 * (rate(tau[k]) + rate(tau[k - 1]) * (1 + h * rate(tau[k]))))
    return column(MEAN) + column(VARIANCE) / (column(VARIANCE) + tau[1] ** 2) * away


@pytest.mark.parametrize("steps", [[16, 1], [16, 4, 1]], ids=str)
@pytest.mark.parametrize("name", some_schedules())
def test_phases_with_heun_are_heun_s_chain(name, steps):
    """Only the first teacher takes Heun's steps: its student has learnt jumps of DDIM."""
    schedule = SCHEDULES[name]()
    teacher, eps = gaussian_teacher(schedule), make_batch(6).noise()
    grid = karras_grid(schedule, steps[0])
    x_T = schedule.alpha(time(grid[-1])) * 80 * eps
    answer = last_student(teacher, steps=steps, times="karras", teacher_step="heun")(x_T)
    close(answer, heun_chain(schedule, x_T, grid), rtol=1e-10, atol=1e-10)
    assert (answer - ddim_chain(schedule, x_T, grid)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["vp_cosine", "ve", "flow_matching"])
def test_heun_s_step_is_that_of_the_samplers(name):
    """The self-teacher is asked where heun_step ends, and nowhere else; f alone counts in the last step."""
    schedule = SCHEDULES[name]()
    teacher = mixture_teacher(schedule)
    method = tract(teacher, 0, steps=[18, 3, 1], times="karras", teacher_step="heun")
    asked = []
    method.self_teacher = Call(lambda x, t, c: asked.append((x, t)) or torch.zeros_like(x))
    j = torch.arange(1, 19).view(-1, 1, 1, 1)
    t, x_t = method.grid[j], schedule.alpha(method.grid[j]) * 0.3 + schedule.sigma(method.grid[j])
    target = target_of(method, x_t, j, UNCONDITIONAL)
    ((x_1, t_1),) = asked
    assert torch.equal(t_1[1:], t[:-1])
    close(x_1[1:], heun_step(schedule, teacher.denoise, x_t[1:], t[1:], t_1[1:]), rtol=1e-10, atol=1e-12)
    assert torch.equal(target[0], teacher.denoise(x_t, t)[0])


# --- the self-teacher ------------------------------------------------------------------------------------------------


def walk(method: Tract, updates: int, seed: int = 1) -> list[list[Tensor]]:
    """Random weights for the student, one after_step for each; returns them."""
    generator, history = torch.Generator().manual_seed(seed), []
    for _ in range(updates):
        with torch.no_grad():
            for parameter in method.student.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        method.after_step()
        history.append([parameter.detach().clone() for parameter in method.student.parameters()])
    return history


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_the_self_teacher_is_the_bias_corrected_average(mu):
    """sum_i mu^(k-i) theta_i / sum_i mu^(k-i): a weighted mean of the students after each update."""
    method = tract(mlp_teacher(), mu=mu)
    history = walk(method, 7)
    weights = [mu ** (7 - i) for i in range(1, 8)]
    for n, mine in enumerate(method.self_teacher.parameters()):
        mean = sum(w * thetas[n] for w, thetas in zip(weights, history, strict=True)) / sum(weights)
        close(mine, mean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_initial_weights_vanish_after_the_first_update(mu, dtype):
    torch.set_default_dtype(dtype)
    method = tract(mlp_teacher(), mu=mu)
    assert same_weights(weights_of(method.self_teacher), weights_of(method.student))
    walk(method, 1)
    assert same_weights(weights_of(method.self_teacher), weights_of(method.student))


def test_k_is_saved_and_goes_on_through_phases(tmp_path):
    """A method that is restored updates its self-teacher as the one that was saved does."""
    method = tract(mlp_teacher(), 0, steps=[8, 4, 1])
    walk(method, 2)
    method.end_phase(0, method.student)
    method.start_phase(1)
    walk(method, 1)
    assert method.state_dict()["k"].item() == 3
    again = tract(mlp_teacher(seed=5), steps=[8, 4, 1])
    again.load_state_dict(method.state_dict())
    walk(method, 1, seed=3), walk(again, 1, seed=3)
    assert method.k.item() == again.k.item() == 4
    assert same_weights(weights_of(method.self_teacher), weights_of(again.self_teacher))
    assert not same_weights(weights_of(method.self_teacher), weights_of(method.student))


def test_buffers_are_the_student_s():
    """As in the harness's average: what is no weight is copied."""
    method = tract(table_teacher(uniform_times(VPCosine(), 16)))
    method.student.network.times.mul_(0.5)
    walk(method, 2)
    assert torch.equal(method.self_teacher.network.times, method.student.network.times)
    assert method.self_teacher.network.times is not method.student.network.times


def test_a_training_step_changes_nothing_but_what_after_step_does():
    method = tract(mlp_teacher(), 0)
    before = weights_of(method)
    loss_of(method, make_batch(8, read=gaussian_images()))
    assert same_weights(weights_of(method), before)
    method.after_step()
    changed = {name for name, value in weights_of(method).items() if not torch.equal(value, before[name])}
    assert changed == {"k"}  # the student has not moved


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["truncated_snr", "snr_plus_one", "edm"])
def test_weights(weight):
    """A student that is off by .1 everywhere has loss .01 w with w = max(SNR, 1), SNR + 1 or + 4, SNR = 1 / tan^2."""
    schedule, seen = VPCosine(), set()
    for seed in range(60):  # one image, hence one t, a batch
        method = tract(phase=0, steps=[8, 2, 1], weight=weight)
        oracle = chain_oracle(method)
        method.self_teacher = Call(oracle)
        method.student = Call(lambda x, t, c, oracle=oracle: oracle(x, t, c) + 0.1)
        batch = make_batch(1, seed=seed, read=gaussian_images())
        again = make_batch(1, seed=seed)
        again.noise()
        j = again.integers(1, 9).item()
        seen.add(j)
        snr = math.tan(schedule.theta_0 + j / 8 * (schedule.theta_1 - schedule.theta_0)) ** -2
        w = {"truncated_snr": max(snr, 1.0), "snr_plus_one": snr + 1, "edm": snr + 1 / 0.5**2}[weight]
        assert loss_of(method, batch).item() == pytest.approx(0.01 * w, rel=1e-9)
    assert seen == set(range(1, 9))


def released_edm_loss(student, f, g, x: Tensor, noise: Tensor, j: Tensor) -> Tensor:
    """train_op of tc_distill_edm.py for the schedule 40, 1, with sigma_data .5."""
    sd = 0.5
    sigma = torch.cat([torch.zeros(1), torch.linspace(0.002 ** (1 / 7), 80.0 ** (1 / 7), 40).pow(7)]).double()
    s = [sigma[i] for i in (j, (j - 1).clamp(1), torch.zeros_like(j))]
    c_skip, c_out = sd**2 / (s[0] ** 2 + sd**2), s[0] * sd * (sd**2 + s[0] ** 2) ** -0.5
    xt = x + noise * s[0]
    x0 = f(xt, s[0])
    eps = (xt - x0) / s[0]
    xt_ = xt + (s[1] - s[0]) * eps
    eps = 0.5 * (eps + (xt_ - f(xt_, s[1])) / s[1])
    xt_ = xt + (s[1] - s[0]) * eps
    x0_ = torch.clip(g(xt_, s[1]), -1.0, 1.0)
    xt2 = x0_ + (xt_ - x0_) / s[1] * s[2]
    xt2 = xt2 + (j == 1) * (xt_ - xt2)
    xt2 = (xt2 * s[0] - xt * s[2]) / (s[0] - s[2])
    target = (torch.where(j == 1, x0, xt2) - c_skip * xt) / c_out
    pred = (student(xt, s[0]) - c_skip * xt) / c_out
    weight = (s[0] ** 2 + sd**2) * c_out**2 * (s[0] * sd) ** -2
    return (weight.flatten() * (pred - target).square().mean((1, 2, 3))).mean()


def test_the_edm_variant_is_the_release_s():
    """On its grid, with its teacher's step and its weight: the loss is equal to rounding."""
    schedule = VE(sigma_min=0.002, sigma_max=80.0)
    teacher = mlp_teacher(schedule, "x0")
    method = tract(teacher, 0, steps=[40, 1], times="karras", teacher_step="heun", weight="edm", clip=True)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in (*method.student.parameters(), *method.self_teacher.parameters()):
            weight.add_(0.1 * torch.randn_like(weight))
        method.self_teacher.network.exit.bias.add_(1.0)  # some of its predictions are clipped
    batch, again = (make_batch(512, seed=4, read=gaussian_images()) for _ in range(2))
    at = lambda network: lambda x, tau: network(x, schedule.t_of_lam(tau.log()))
    x, noise, j = again.x_0, again.noise(), again.integers(1, 41)
    expected = released_edm_loss(at(method.student), at(teacher.denoise), at(method.self_teacher), x, noise, j)
    assert set(j.flatten().tolist()) == set(range(1, 41))
    assert loss_of(method, batch).item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(("phase", "steps"), [(0, 16), (1, 8)])
def test_a_step_draws_every_time_of_the_phase_s_grid_and_noises_real_images(phase, steps):
    """Groups and places in a group are uniform: so is t on the grid. The self-teacher is asked one step further."""
    method = tract(mlp_teacher(), phase, steps=[16, 8, 2])
    asked: dict[str, tuple] = {}
    networks = {"teacher": Call(method.taught_by), "self": method.self_teacher, "student": method.student}
    method.taught_by = networks["teacher"]
    for name, network in networks.items():
        network.register_forward_pre_hook(lambda module, inputs, name=name: asked.setdefault(name, inputs))
    loss_of(method, make_batch(4000, read=gaussian_images()))
    batch = make_batch(4000, read=gaussian_images())
    x_0, eps = batch.x_0, batch.noise()
    (x_t, t, _), (_, t_1, _) = asked["teacher"], asked["self"]
    close(x_t, VPCosine().alpha(t) * x_0 + VPCosine().sigma(t) * eps, rtol=1e-12)
    assert torch.equal(x_t, asked["student"][0]) and torch.equal(t, asked["student"][1])
    times, counts = t.flatten().unique(return_counts=True)
    assert times.tolist() == [j / steps for j in range(1, steps + 1)]
    assert (counts - 4000 / steps).abs().max() < 5 * (4000 / steps) ** 0.5
    close(t_1, (t - 1 / steps).clamp(min=1 / steps), rtol=1e-12)


def test_every_time_belongs_to_the_group_below_it():
    """T_p+1 groups of S times each: t'' is the largest time of the student's grid below t."""
    method = tract(mixture_teacher(), phase=1, steps=[48, 24, 4, 1])
    schedule, coarse = method.teacher.schedule, uniform_times(VPCosine(), 4)
    assert method.group == 6 and torch.equal(method.grid[::6], coarse)
    j = torch.arange(7, 25).view(-1, 1, 1, 1)
    x_t, x_tilde, x_2, t, _ = two_parts(method, j)
    t_2 = torch.stack([coarse[coarse < time - 1e-9].max() for time in t.flatten()]).view(t.shape)
    close(ddim_to(schedule, x_t, x_tilde, t, t_2), x_2, atol=1e-12)


def test_gradients_reach_the_student_only():
    for phase in (0, 1):
        method = tract(mlp_teacher(), phase)
        loss_of(method, make_batch(16, read=gaussian_images())).backward()
        assert all(p.grad is not None for p in method.student.parameters())
        others = [method.frozen_copy, method.students, method.self_teacher, method.teacher.denoiser]
        assert all(p.grad is None and not p.requires_grad for network in others for p in network.parameters())


@pytest.mark.parametrize(("teacher_step", "first"), [("ddim", 1), ("heun", 2)])
def test_evaluations_of_a_step(tmp_path, teacher_step, first):
    """Specification 8: T = 1 (2 with Heun, in the first phase), Sn = Sg = 1 for each image of every phase."""
    method = tract(mlp_teacher(), steps=[16, 8, 2, 1], times="karras", teacher_step=teacher_step)
    for phase in range(3):
        meter = make_workspace(method.teacher, tmp_path).meter
        method.start_phase(phase)
        loss_of(method, make_batch(7, read=gaussian_images()))
        method.after_step()
        method.end_phase(phase, method.student)
        assert (meter.teacher_nfe, meter.student_nfe) == (7 * (first if phase == 0 else 1), 14)
    assert method.needs_data


# --- conditions ------------------------------------------------------------------------------------------------------


def class_teacher(conditioning: Conditioning) -> Teacher:
    torch.manual_seed(0)
    network = ResidualMLP((2, 1, 1), width=16, depth=1, classes=conditioning.classes)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Teacher("mlp", Denoiser(network, VPCosine(), "v"), (2, 1, 1), "mlp", conditioning=conditioning)


def class_batch(size: int, conditioning: Conditioning) -> Batch:
    generator, images = torch.Generator().manual_seed(0), gaussian_images()
    labelled = lambda n: (images(n)[0], torch.arange(n) % conditioning.classes)
    return Batch(size, (2, 1, 1), generator, "cpu", labelled, conditioning)


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize(
    ("conditioning", "first"),
    [(Conditioning(3), 1), (Conditioning(3, w=2.5), 2), (Conditioning(3, w_range=(1.0, 4.0)), 2)],
    ids=["classes", "guided", "drawn guidance"],
)
def test_the_condition_is_handed_to_every_network(tmp_path, conditioning, first, phase):
    """And only the first teacher is guided: two evaluations."""
    method = tract(class_teacher(conditioning), phase)
    batch, heard = class_batch(9, conditioning), []
    method.taught_by = Call(method.taught_by)
    for network in (method.taught_by, method.self_teacher, method.student):
        network.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[2]))
    meter = make_workspace(method.teacher, tmp_path).meter
    loss_of(method, batch)
    assert len(heard) == 3 and all(c is batch.c for c in heard)
    assert (meter.teacher_nfe, meter.student_nfe) == (9 * (first if phase == 0 else 1), 18)
    heard.clear()
    method.students["4"].register_forward_pre_hook(lambda module, _, named: heard.append(named["c"]), with_kwargs=True)
    c = conditioning.of_images(range(9), "cpu")
    method.sample(FixedNoise([make_batch(9).noise()]), 4, c)
    assert len(heard) == 4 and all(one is c for one in heard)


class ClassGaussian(nn.Module):
    """E[x_0 given x_t and the class] of N(m_class, diag(v)); the last mean stands for no class."""

    embedding_channels = 4
    MEANS = torch.tensor([[0.5, -0.3], [-1.0, 0.2], [0.1, 0.1]], dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor, embedding: Tensor | None = None, c: Condition | None = None) -> Tensor:
        alpha, sigma = VPCosine().alpha(time(t)), VPCosine().sigma(time(t))
        mean = self.MEANS[c.labels].view(-1, 2, 1, 1)
        return mean + alpha * column(VARIANCE) / (alpha**2 * column(VARIANCE) + sigma**2) * (x - alpha * mean)


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_conditional_phases_are_guided_ddim_in_closed_form(w):
    """Of Gaussians that differ in their mean, guidance makes the one with mean m_0 + w (m_c - m_0)."""
    denoiser = Denoiser(ClassGaussian(), VPCosine(), "x0")
    teacher = replace(Teacher("classes", denoiser, (2, 1, 1), "classes"), conditioning=Conditioning(2, w))
    c, eps = teacher.conditioning.of_images(range(6), "cpu"), make_batch(6).noise()
    answer = last_student(teacher, c, steps=[16, 4, 1])(eps)
    for k in range(6):
        none, given = ClassGaussian.MEANS[2], ClassGaussian.MEANS[k % 2]
        times, mean = uniform_times(VPCosine(), 16), none + w * (given - none)
        close(answer[k : k + 1], ddim_chain(VPCosine(), eps[k : k + 1], times, mean), atol=1e-12)


# --- phases ----------------------------------------------------------------------------------------------------------


def test_phases_share_one_optimiser_and_an_equal_part_of_the_budget():
    method = tract(steps=[16, 8, 4, 1])
    assert [phase.label for phase in method.phases()] == ["16 to 8 steps", "8 to 4 steps", "4 to 1 steps"]
    assert [phase.share for phase in method.phases()] == [1.0, 1.0, 1.0]
    assert [phase.fresh for phase in method.phases()] == [True, False, False]
    for index, (before, after) in enumerate(pairwise([16, 8, 4, 1])):
        method.start_phase(index)
        assert method.n == after and method.group == before // after
        assert method.grid.tolist() == [j / before for j in range(before + 1)]


def test_starting_a_phase_changes_no_state():
    """What a saved method is restored into has started none."""
    method = tract(mlp_teacher(), steps=[8, 4, 1])
    before = weights_of(method)
    for index in (0, 1):
        method.start_phase(index)
        assert same_weights(weights_of(method), before)


def test_at_the_end_of_a_phase_the_average_becomes_teacher_and_snapshot():
    """Student, self-teacher and k go on (as released); the teacher that all methods share is not touched."""
    method = tract(mlp_teacher(), 1, steps=[8, 4, 2, 1])
    walk(method, 2)
    before, average = weights_of(method), mlp_teacher(seed=7).student()
    method.end_phase(1, average)
    for network in (method.frozen_copy, method.students["2"]):
        assert same_weights(weights_of(network), weights_of(average))
    after = weights_of(method)
    kept = [name for name in before if not name.startswith(("frozen_copy.", "students.2."))]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert {name.split(".")[0] for name in kept} == {"student", "self_teacher", "k", "students"}
    assert same_weights(weights_of(method.teacher.denoiser), weights_of(mlp_teacher().denoiser))
    with torch.no_grad():
        next(average.parameters()).add_(1.0)  # they are copies
    assert not same_weights(weights_of(method.frozen_copy), weights_of(average))


@pytest.mark.parametrize("halflife", [0.0, 0.05])
def test_training_hands_the_average_from_phase_to_phase(tmp_path, halflife):
    """Each phase is taught by the snapshot before; the student goes on from its own weights."""
    starts, ends = [], []

    class Watched(Tract):
        def start_phase(self, index):
            super().start_phase(index)
            starts.append((weights_of(self.frozen_copy), weights_of(self.student), weights_of(self.self_teacher)))

        def end_phase(self, index, average):
            ends.append((weights_of(self.student), weights_of(self.self_teacher)))
            super().end_phase(index, average)

    teacher = mlp_teacher()
    method = Watched(Watched.Config(steps=[8, 4, 2, 1], ema_halflife_kimg=halflife), teacher)
    workspace = make_workspace(teacher, tmp_path, BudgetConfig(images=450))
    train(method, method.config, workspace, gaussian_images(), Loop(25), Step(lambda fraction, note: None))
    snapshots = [weights_of(teacher.denoiser), *(weights_of(method.students[n]) for n in ("4", "2", "1"))]
    for (phase_teacher, _, _), snapshot in zip(starts, snapshots, strict=False):
        assert same_weights(phase_teacher, snapshot)
    for (_, *at_start), at_end in zip(starts[1:], ends, strict=False):
        assert all(same_weights(a, b) for a, b in zip(at_start, at_end, strict=True))
    for (student, _), snapshot in zip(ends, snapshots[1:], strict=True):
        assert same_weights(student, snapshot) == (halflife == 0)
    assert same_weights(weights_of(method.student), snapshots[-1])
    assert not any(same_weights(a, b) for k, a in enumerate(snapshots) for b in snapshots[:k])
    assert method.k.item() == 18
    assert workspace.meter.teacher_nfe == 450 and workspace.meter.student_nfe == 900


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 2, 8])
def test_sample_is_ddim_with_the_student_of_that_many_steps(nfe, tmp_path):
    """Untrained snapshots are the teacher, so this is the teacher's DDIM in closed form; each has its own weights."""
    method = tract(steps=[16, 8, 2, 1])
    eps = make_batch(5).noise()
    meter = make_workspace(method.teacher, tmp_path).meter
    sample = method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL)
    close(sample, ddim_chain(VPCosine(), eps, uniform_times(VPCosine(), nfe)), atol=1e-12)
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 5 * nfe)
    used = []
    for n, student in method.students.items():
        student.register_forward_pre_hook(lambda module, inputs, n=n: used.append(n))
    method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL)
    assert used == [str(nfe)] * nfe
    assert [n for n in range(20) if method.supports(n)] == [1, 2, 8] and method.keeps_noise(nfe)


@pytest.mark.parametrize("name", some_schedules())
def test_sample_answers_the_noise_scaled_to_the_schedule(name):
    """eps stands for x_T = sigma_T eps, also where sigma_T is 80 (VE)."""
    teacher = gaussian_teacher(SCHEDULES[name](), (0.0,), (6400.0,))
    eps = make_batch(5, (1, 1, 1)).noise()
    x_T = teacher.schedule.sigma(time(teacher.schedule.t_max)) * eps
    expected = ddim_chain(teacher.schedule, x_T, uniform_times(teacher.schedule, 4), (0.0,), (6400.0,))
    close(tract(teacher).sample(FixedNoise([eps]), 4, UNCONDITIONAL), expected, rtol=1e-12)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        *({"steps": steps} for steps in ([], [1], [16], [16, 16], [16, 5], [4, 16], [16, 4, 0], [16, -4], [16, 4, 4])),
        *({"mu": mu} for mu in (1.0, -0.1)),
        {"weight": "snr"},
        {"times": "sometimes"},
        {"teacher_step": "euler"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Tract.Config(**settings)


def test_teachers_that_predict_noise_are_refused():
    with pytest.raises(UserError, match="eps"):
        tract(mlp_teacher(prediction="eps"))
    for prediction in ("x0", "v", "flow"):
        tract(mlp_teacher(prediction=prediction))


# --- trained ---------------------------------------------------------------------------------------------------------

ADAM = {"lr": 0.03, "lr_warmup": 0.0, "beta2": 0.99, "ema_halflife_kimg": 4.0, "grad_clip": 1e6}


@pytest.mark.parametrize(
    ("settings", "chain"),
    [
        ({"steps": [8, 2, 1]}, ddim_chain),
        ({"steps": [8, 1], "mu": 0.0, "weight": "snr_plus_one"}, ddim_chain),
        ({"steps": [8, 4, 1], "times": "karras", "teacher_step": "heun"}, heun_chain),
    ],
    ids=["three grids", "one phase", "heun"],
)
def test_trained_students_reach_the_closed_form_chain(tmp_path, settings, chain):
    """Affine students, through the real training loop, with every number of steps (specification 9.3: 2e-3)."""
    config = Tract.Config(**ADAM | settings)
    grid = TIME_GRIDS[config.times](VPCosine(), config.steps[0])
    method = Tract(config, table_teacher(grid))
    workspace = make_workspace(method.teacher, tmp_path, BudgetConfig(images=800 * 128))
    train(method, method.config, workspace, gaussian_images(), Loop(128), Step(lambda fraction, note: None))
    eps = make_batch(1000, seed=99).noise()
    expected = chain(VPCosine(), eps, grid)
    untrained = column(MEAN).expand_as(eps)  # E[x_0] is what every student says of pure noise at first
    assert (untrained - expected).square().mean().sqrt() > 0.2
    for nfe in config.steps[1:]:
        with torch.no_grad():
            error = (method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL) - expected).square().mean().sqrt().item()
        assert error < 2e-3, f"{error} with {nfe} steps"
