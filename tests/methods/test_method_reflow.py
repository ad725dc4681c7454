"""Reflow where the teacher's map and the straight flow are known: on Gaussians, and on a mixture in one dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from analytic import (
    close,
    ddim_chain,
    gaussian_map,
    gaussian_teacher,
    loss_of,
    make_batch,
    make_workspace,
    minimised,
    mixture_map,
    mlp_teacher,
    same_weights,
    time,
    weights_of,
)
from distillbench import Teacher, UserError
from distillbench.diffusion import FlowMatching, Solver, VPCosine, time_like, uniform_times
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.schedules import SCHEDULES
from distillbench_direct import Direct
from distillbench_reflow import Reflow

pytestmark = pytest.mark.usefixtures("float64")
FLOW = FlowMatching()
T = FLOW.t_max


def reflow(teacher: Teacher | None = None, phase: int = 0, **settings) -> Reflow:
    """The method on the flow schedule, as the harness builds it."""
    method = Reflow(Reflow.Config(**settings), (teacher or gaussian_teacher()).on(FLOW))
    method.start_phase(phase)
    return method


@dataclass
class Pairs:
    """A store of given pairs."""

    eps: Tensor
    x_0: Tensor

    def __len__(self) -> int:
        return len(self.eps)

    def read(self, indices: Tensor):
        indices = indices.flatten()
        return self.eps[indices], self.x_0[indices], UNCONDITIONAL


def gaussian_answer(eps: Tensor) -> Tensor:
    """The end at t = 0 of the teacher's ODE from T eps: exact."""
    return gaussian_map(FLOW, T * eps, time_like(eps, T), torch.zeros_like(time_like(eps, T)))


def mixture_answer(eps: Tensor) -> Tensor:
    return mixture_map(FLOW, T * eps, T, FLOW.t_min)


class StraightFlow(nn.Module):
    """f of the flow along the straight paths from T eps to `answer`(eps): looks for the eps whose path meets x_t.

    Each pixel is on its own, and along t the order of a pixel's paths never changes: bisection finds the only one.
    """

    def __init__(self, answer, error: float = 0.0) -> None:
        super().__init__()
        self.answer, self.error = answer, error  # of the velocity

    def forward(self, x_t: Tensor, t: Tensor, c=UNCONDITIONAL) -> Tensor:
        low, high = torch.full_like(x_t, -9.0), torch.full_like(x_t, 9.0)
        for _ in range(36):
            eps = (low + high) / 2
            before = (1 - t / T) * self.answer(eps) + t * eps < x_t
            low, high = torch.where(before, eps, low), torch.where(before, high, eps)
        return self.answer(eps) - t * self.error


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_are_ddim_on_the_teacher_s_own_schedule(tmp_path):
    """In closed form on the cosine schedule, although training is on that of flow matching."""
    method = reflow(steps=8, pairs=20)
    method.prepare(make_workspace(method.teacher, tmp_path))
    eps, x_0, _ = method.store.read(torch.arange(20))
    close(x_0, ddim_chain(VPCosine(), eps, torch.linspace(0, 1, 9, dtype=torch.float64)), atol=3e-7)


def test_direct_distillation_s_pairs_are_found(tmp_path):
    """Both methods ask the same teacher with the same solver: the second of them computes nothing, and is charged."""
    teacher, settings = mlp_teacher(), {"steps": 4, "pairs": 10, "solver": "dpmpp_2m"}
    first = Direct(Direct.Config(**settings), teacher)
    first.prepare(make_workspace(teacher, tmp_path))
    rows = teacher.teacher_rows.rows
    second = reflow(teacher, **settings)
    workspace = make_workspace(second.teacher, tmp_path)
    second.prepare(workspace)
    assert teacher.teacher_rows.rows == rows == workspace.meter.teacher_nfe == 4 * 10
    for a, b in zip(*(m.store.read(torch.arange(10))[:2] for m in (first, second)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("schedule", "level"), [("vp_cosine", 1e4), ("ve", 80.0), ("ddpm_linear", None)])
def test_the_same_noise_is_where_both_start(schedule, level):
    """T eps on the flow schedule and sigma_T eps on the teacher's own are the same x^ = tau eps."""
    teacher = gaussian_teacher(SCHEDULES[schedule]())
    method = reflow(teacher)
    own = method.teacher.native
    assert own.schedule is teacher.schedule
    t, s = (time(each.schedule.t_max) for each in (method.teacher, own))
    here, there = method.teacher.schedule.noise_level(t), own.schedule.noise_level(s)
    assert here.item() == pytest.approx(level or there.item(), rel=1e-3)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_zero_on_straight_paths():
    """In one dimension paths never cross. A velocity that is off by .3 costs .09."""
    eps = make_batch(20, (1, 1, 1)).noise()
    method = reflow()
    method.store = Pairs(eps, mixture_answer(eps))
    for error, expected in ((0.0, 0.0), (0.3, 0.09)):
        method.student = StraightFlow(mixture_answer, error)
        assert loss_of(method, make_batch(20, (1, 1, 1))).item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_target_is_the_path_s_velocity():
    """With v = 0 the loss is |x_T - x_0|^2 / T^2, with f = 0 at t = T it is |x_0|^2 / T^2: v(eps, 1) = eps - M(eps)."""
    eps, x_0 = make_batch(50).noise(), make_batch(50, seed=1).noise()

    class Still(nn.Module):
        def forward(self, x_t, t, c):
            return x_t

    class Nothing(nn.Module):
        def forward(self, x_t, t, c):
            assert (t == T).all()
            return torch.zeros_like(x_t)

    for phase, student, expected in ((0, Still(), T * eps - x_0), (1, Nothing(), x_0)):
        method = reflow(phase=phase, distil_share=1.0)
        method.store, method.student = Pairs(eps, x_0), student
        index = make_batch(400).integers(0, 50).flatten()
        close(loss_of(method, make_batch(400)), (expected[index] / T).square().mean(), rtol=1e-10)


# --- times -----------------------------------------------------------------------------------------------------------


def test_u_shaped_times_have_the_density_of_the_paper():
    """e^(4t) + e^(4 - 4t), integrated from 0 to t."""
    t = reflow(t_low=1e-4).time(make_batch(100_000))
    assert 1e-4 <= t.min() < 2e-4 and 0.9998 < t.max() <= T
    for upper in (0.1, 0.5, 0.8, 0.95):
        mass = (math.exp(4 * upper) - math.exp(4 - 4 * upper) + math.exp(4) - 1) / (2 * (math.exp(4) - 1))
        assert (t < upper).double().mean().item() == pytest.approx(mass, abs=0.005)


def test_uniform_times_and_those_of_distillation():
    t = reflow(times="uniform", t_low=0.1).time(make_batch(20_000))
    assert 0.1 <= t.min() < 0.101 and t.max() <= T
    assert (t < 0.4).double().mean().item() == pytest.approx(1 / 3, abs=0.015)
    method = reflow(phase=1, distil_share=1.0, distil_steps=4)
    close(method.time(make_batch(100)).unique(), T * torch.arange(1, 5) / 4, rtol=1e-15)


@pytest.mark.parametrize("phase", [0, 1])
def test_times_are_float64_in_single_precision(phase):
    """Near t_max float32 has errors of 1e-4 of 1 - t, and the sampler starts at t_max in float64."""
    torch.set_default_dtype(torch.float32)
    t = reflow(phase=phase, distil_share=1.0).time(make_batch(8))
    assert t.dtype == torch.float64
    assert phase == 0 or (t == T).all()


# --- the flow --------------------------------------------------------------------------------------------------------


def test_at_first_the_velocity_is_the_teacher_s():
    """The derivative of the exact trajectory, by a finite difference; and that of a network, read at equal SNR."""
    method, x, t = reflow(), make_batch(20).noise(), time(torch.linspace(0.05, 0.95, 20))
    h = 1e-5
    slope = (gaussian_map(FLOW, x, t, t + h) - gaussian_map(FLOW, x, t, t - h)) / (2 * h)
    close(method.v(method.student, x, t, UNCONDITIONAL), slope, atol=1e-8)
    method = reflow(mlp_teacher())
    f = method.teacher.denoise(x, t)
    close(method.v(method.student, x, t, UNCONDITIONAL), (x - f) / t, atol=1e-10)


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_at_first_euler_s_steps_are_ddim_s(nfe):
    """DDIM on the flow schedule, as a product of a Gaussian's gains."""
    method, eps = reflow(), make_batch(20).noise()
    times = torch.linspace(0, T, nfe + 1, dtype=torch.float64)
    close(method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL), ddim_chain(FLOW, T * eps, times), atol=1e-10)


@pytest.mark.parametrize(("answer", "pixels"), [(gaussian_answer, 2), (mixture_answer, 1)])
def test_on_straight_paths_any_number_of_steps_is_exact(answer, pixels):
    method, eps = reflow(), make_batch(8, (pixels, 1, 1)).noise()
    method.student = StraightFlow(answer)
    for nfe in (1, 3):
        close(method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL), answer(eps), atol=1e-7)
        assert method.supports(nfe) and method.keeps_noise(nfe) and method.ready(nfe, 0)
    assert not method.supports(0)


class LearnedAnswer(nn.Module):
    """A straight flow to m + g eps, which are learned: its x_0 from x_t = (1 - t/T) x_0 + t eps."""

    prediction = "x0"

    def __init__(self) -> None:
        super().__init__()
        self.m, self.g = nn.Parameter(torch.zeros(2, 1, 1)), nn.Parameter(torch.full((2, 1, 1), 1.5))

    def forward(self, x_t: Tensor, t: Tensor, c=UNCONDITIONAL) -> Tensor:
        rest = 1 - t / T
        return self.m + self.g * (x_t - rest * self.m) / (rest * self.g + t)


@pytest.mark.parametrize("times", ["u_shaped", "uniform"])
def test_a_trained_flow_reaches_the_teacher_s_chain(times, tmp_path):
    method = reflow(gaussian_teacher(VPCosine()), steps=8, pairs=512, times=times)
    method.prepare(make_workspace(method.teacher, tmp_path))
    method.student, eps = LearnedAnswer(), make_batch(100, seed=9).noise()
    minimised(method.student, lambda step: loss_of(method, make_batch(128, seed=step)), lr=0.03)
    schedule = VPCosine()
    chain = ddim_chain(schedule, schedule.sigma(time(schedule.t_max)) * eps, uniform_times(schedule, 8))
    for nfe in (1, 3):
        close(method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL), chain, atol=1e-3)


# --- pairs of the flow's own -----------------------------------------------------------------------------------------


def own_pairs(method: Reflow, folder, seed: int = 0):
    """The pairs of the second phase, (eps, x_0), and the meter that was charged for them alone."""
    method.start_phase(1)
    workspace = make_workspace(method.teacher, folder, seed=seed)
    method.prepare_phase(1, workspace)
    return *method.store.read(torch.arange(len(method.store)))[:2], workspace.meter


@pytest.mark.parametrize(("solver", "steps", "tolerance"), [("ddim", 3, 1e-6), ("heun", 18, 1e-6)])
def test_own_pairs_are_the_flow_s_answers(solver, steps, tolerance, tmp_path):
    """In closed form: a flow along straight paths to 1 + M(eps) / 2, which is not the teacher's.

    Heun's first noise level is 80, not that of T: its path is the one that meets 80/81 eps at t = 80/81.
    """
    answer = lambda eps: 1 + gaussian_answer(eps) / 2
    method = reflow(pairs=40, steps=steps, solver=solver, distil_share=1.0, distil_pairs="own")
    method.flow = StraightFlow(answer)
    eps, x_0, _ = own_pairs(method, tmp_path)
    close(x_0, method.flow(80 / 81 * eps, time(80 / 81)) if solver == "heun" else answer(eps), atol=tolerance)


def test_own_pairs_have_new_noise_and_follow_the_flow_s_weights(tmp_path):
    method = reflow(mlp_teacher(), pairs=10, steps=4, distil_share=1.0, distil_pairs="own")
    method.prepare(make_workspace(method.teacher, tmp_path))
    teachers = method.store.read(torch.arange(10))[:2]
    eps, x_0, meter = own_pairs(method, tmp_path)
    assert not torch.isclose(eps, teachers[0]).any()
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 4 * 10)
    chain = Solver.parse("ddim").solve(method.flow, FLOW, eps, 4)
    assert torch.equal(x_0, chain.float())
    method.end_phase(0, mlp_teacher(seed=5).on(FLOW).student())
    other_eps, other, _ = own_pairs(method, tmp_path)
    assert torch.equal(other_eps, eps) and not torch.isclose(other, x_0).all()
    assert len(list(tmp_path.glob("*/manifest.json"))) == 3


def test_own_pairs_are_found_again_and_charged_alike(tmp_path):
    """An interrupted second phase asks for them again, with the flow's weights from the saved state."""
    settings = {"pairs": 10, "steps": 18, "solver": "heun", "distil_share": 1.0, "distil_pairs": "own"}
    first, second = reflow(mlp_teacher(), **settings), reflow(mlp_teacher(), **settings)
    eps, x_0, paid = own_pairs(first, tmp_path)
    again_eps, again, charged = own_pairs(second, tmp_path)
    assert torch.equal(again_eps, eps) and torch.equal(again, x_0)
    assert second.teacher.student_rows.rows == 0
    a, b = paid.cost(), charged.cost()
    assert a.student_nfe == b.student_nfe == 10 * 35 and a.teacher_nfe == b.teacher_nfe == 0
    assert a.networks == b.networks and [each.counted for each in a.networks] == ["student"]
    assert 0 < b.student_seconds <= b.seconds and b.teacher_seconds == 0


def test_the_teacher_s_pairs_stay_without_the_setting(tmp_path):
    method = reflow(mlp_teacher(), pairs=10, steps=4, distil_share=1.0)
    workspace = make_workspace(method.teacher, tmp_path)
    method.prepare(workspace)
    store, spent = method.store, workspace.meter.evaluations
    method.prepare_phase(1, workspace)
    assert method.store is store and workspace.meter.evaluations == spent


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_pairs_steps_and_samples_are_counted(tmp_path):
    method = reflow(mlp_teacher(), steps=6, pairs=10)
    workspace = make_workspace(method.teacher, tmp_path)
    method.prepare(workspace)
    meter = workspace.meter
    assert (meter.teacher_nfe, meter.student_nfe) == (60, 0)
    loss_of(method, make_batch(7, read=None))  # the batch would raise if x_0 were asked for
    assert (meter.teacher_nfe, meter.student_nfe) == (60, 7)
    method.sample(FixedNoise([make_batch(3).noise()]), 5, UNCONDITIONAL)
    assert (meter.teacher_nfe, meter.student_nfe) == (60, 7 + 15)
    assert method.inputs == "pairs" and not method.needs_data


# --- distillation ----------------------------------------------------------------------------------------------------


def test_distillation_goes_on_from_the_average_and_leaves_the_flow():
    method = reflow(mlp_teacher(), distil_share=0.5, distil_steps=2)
    assert [(phase.label, phase.share) for phase in method.phases()] == [("reflow", 1.0), ("distil", 0.5)]
    average = mlp_teacher(seed=5).on(FLOW).student()
    method.end_phase(0, average)
    assert same_weights(weights_of(method.flow), weights_of(average))
    assert same_weights(weights_of(method.student), weights_of(average))
    assert not any(p.requires_grad for p in method.flow.parameters())
    assert [method.ready(nfe, 0) for nfe in (1, 2, 4)] == [False, True, False]
    assert all(method.ready(nfe, 1) for nfe in (1, 2, 4))
    method.start_phase(1)
    method.end_phase(1, mlp_teacher(seed=6).on(FLOW).student())
    assert same_weights(weights_of(method.flow), weights_of(average))


def test_the_distilled_student_takes_its_own_number_of_steps():
    """Here one, with a velocity that is off by 1; other numbers of steps are the flow's, which is exact."""
    method, eps = reflow(distil_share=1.0), make_batch(5).noise()
    method.student, method.flow = StraightFlow(gaussian_answer, error=1.0), StraightFlow(gaussian_answer)
    for nfe, off in ((1, T), (2, 0.0), (4, 0.0)):
        close(method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL), gaussian_answer(eps) - off, atol=1e-9)


def test_without_distillation_there_is_one_phase_and_one_network():
    method = reflow()
    assert [phase.label for phase in method.phases()] == ["reflow"] and not hasattr(method, "flow")
    method.end_phase(0, method.student)


# --- settings --------------------------------------------------------------------------------------------------------


WRONG = {
    "schedule": "ve",
    "times": "karras",
    "distil_pairs": "mine",
    "steps": 0,
    "pairs": 0,
    "distil_steps": 0,
    "t_low": 0.5,
} | {
    "distil_share": -1.0,
    "solver": "ddpm",
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_make_no_sense_are_refused(name):
    with pytest.raises(UserError, match=name):
        Reflow.Config(**{name: WRONG[name]})


def test_a_student_that_predicts_eps_needs_some_signal_at_t_max():
    with pytest.raises(UserError, match="eps does not give a velocity"):
        reflow(mlp_teacher(VPCosine(), "eps"))
    reflow(mlp_teacher(SCHEDULES["ddpm_linear"](), "eps"))  # diffusers' schedules end at alpha = .0063
