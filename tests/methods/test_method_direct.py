"""Direct distillation: its pairs are the teacher's DDIM in closed form, found again, and its optimum has zero loss."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analytic import (
    close,
    ddim_chain,
    gaussian_teacher,
    loss_of,
    make_batch,
    make_workspace,
    mlp_teacher,
    some_schedules,
    time,
)
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.noise import FixedNoise, Noise, stream_key
from distillbench.diffusion.samplers import time_like, uniform_times
from distillbench.diffusion.schedules import SCHEDULES, VPCosine
from distillbench.errors import UserError
from distillbench.training import pairs
from distillbench_direct import Direct

pytestmark = pytest.mark.usefixtures("float64")


def direct(teacher=None, **settings) -> Direct:
    return Direct(Direct.Config(**settings), teacher or gaussian_teacher())


def prepared(folder, teacher=None, seed: int = 0, **settings):
    """A method after `prepare`, and the meter that was charged."""
    method = direct(teacher, **settings)
    workspace = make_workspace(method.teacher, folder, seed=seed)
    method.prepare(workspace)
    return method, workspace.meter


def all_pairs(method: Direct) -> tuple[Tensor, Tensor]:
    return method.store.read(torch.arange(len(method.store)))[:2]


def test_pairs_are_noise_and_the_closed_form_ddim_of_it(tmp_path):
    """Seeded noise; gains of a Gaussian; stored in float32, not in 8 bits."""
    method, _ = prepared(tmp_path, steps=8, pairs=20)
    eps, x_0 = all_pairs(method)
    assert torch.equal(eps, Noise(stream_key("pairs", 0), range(20), (2, 1, 1))(0))
    close(x_0, ddim_chain(VPCosine(), eps, torch.linspace(0, 1, 9, dtype=torch.float64)), atol=3e-7)


@pytest.mark.parametrize("online", [False, True])
def test_targets_of_eight_bits_are_those_of_the_release(tmp_path, online):
    """float_to_image, and back by y / 127.5 - 1: numpy's uint8, which rounds down."""
    settings = {"steps": 4, "pairs": 30, "online": online}
    teacher = gaussian_teacher(VPCosine(), (0.9, -0.9), (0.5, 0.5))
    plain, ours = (prepared(tmp_path, teacher, eight_bit=bits, **settings)[0] for bits in (False, True))
    ours.student = plain.student
    eps, x_0, c = plain.pair(make_batch(16))
    y = (np.clip(x_0.numpy(), -1, 1) * 127.5 + 127.5).astype("uint8")
    assert x_0.abs().max() > 1 and len(np.unique(y)) > 10
    expected = (plain.g(plain.student, eps, c) - torch.from_numpy(y.astype("float64") / 127.5 - 1)).square().mean()
    close(loss_of(ours, make_batch(16)), expected, rtol=1e-12)
    assert abs(loss_of(plain, make_batch(16)) - expected) > 1e-6


def test_it_says_whether_pairs_are_made_ahead():
    assert direct().inputs == "pairs" and direct(online=True).inputs == "noise"


@pytest.mark.parametrize("name", some_schedules())
def test_the_answer_is_to_the_noise_scaled_to_the_schedule(name):
    """eps stands for x_T = sigma_T eps, also where sigma_T is 80 (VE)."""
    teacher = gaussian_teacher(SCHEDULES[name](), (0.0,), (6400.0,))
    schedule = teacher.schedule
    eps = make_batch(5, (1, 1, 1)).noise()
    x_T = schedule.sigma(time(schedule.t_max)) * eps
    expected = ddim_chain(schedule, x_T, uniform_times(schedule, 4), (0.0,), (6400.0,))
    close(direct(teacher, steps=4).solve(eps, UNCONDITIONAL), expected, rtol=1e-3)


def test_pairs_are_reproduced_found_again_and_charged_the_same(tmp_path):
    first, paid = prepared(tmp_path / "a", mlp_teacher(), steps=4, pairs=10)
    rebuilt, _ = prepared(tmp_path / "b", mlp_teacher(), steps=4, pairs=10)
    found, paid_again = prepared(tmp_path / "a", mlp_teacher(), steps=4, pairs=10)
    for other in (rebuilt, found):
        assert all(torch.equal(x, y) for x, y in zip(all_pairs(first), all_pairs(other), strict=True))
    assert paid.teacher_nfe == paid_again.teacher_nfe == 40
    assert found.teacher.teacher_rows.rows == 0
    (manifest,) = (tmp_path / "a").glob("*/manifest.json")
    assert paid_again.charged.seconds == json.loads(manifest.read_text())["seconds"]


def test_other_steps_seeds_and_teachers_have_pairs_of_their_own(tmp_path):
    base = all_pairs(prepared(tmp_path, mlp_teacher(), steps=4, pairs=10)[0])
    for teacher, steps, seed in ((mlp_teacher(), 5, 0), (mlp_teacher(), 4, 1), (mlp_teacher(seed=1), 4, 0)):
        method, meter = prepared(tmp_path, teacher, seed=seed, steps=steps, pairs=10)
        assert not torch.equal(all_pairs(method)[1], base[1])
        assert method.teacher.teacher_rows.rows == meter.teacher_nfe == 10 * steps
    assert len(list(tmp_path.glob("[!.]*"))) == 4


def test_damaged_pairs_are_made_again(tmp_path):
    good = all_pairs(prepared(tmp_path, steps=4, pairs=10)[0])
    (targets,) = tmp_path.glob("*/targets.safetensors")
    data = bytearray(targets.read_bytes())
    data[-1] ^= 255
    targets.write_bytes(data)
    method, meter = prepared(tmp_path, steps=4, pairs=10)
    assert torch.equal(all_pairs(method)[1], good[1])
    assert method.teacher.teacher_rows.rows == meter.teacher_nfe == 40


class Lookup(nn.Module):
    """The closed-form answer to every noise: the optimum."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)

    def forward(self, eps: Tensor, t: Tensor, c=UNCONDITIONAL) -> Tensor:
        assert (t == 1).all()
        return ddim_chain(VPCosine(), eps, self.times)


@pytest.mark.parametrize(("online", "tolerance"), [(True, 1e-24), (False, 1e-13)])
def test_the_loss_is_zero_at_the_oracle(tmp_path, online, tolerance):
    """Up to the rounding of stored targets to float32."""
    method, _ = prepared(tmp_path, steps=8, pairs=40, online=online)
    method.student = Lookup(8)
    assert loss_of(method, make_batch(30)) < tolerance
    method.student = Lookup(9)
    assert loss_of(method, make_batch(30)) > 1e-5


def test_losses_are_the_mean_square_and_the_mean_absolute_difference(tmp_path):
    """A student that is off by -.3 everywhere: .09 and .3."""

    class Off(Lookup):
        def forward(self, eps, t, c):
            return super().forward(eps, t, c) - 0.3

    for loss, expected in {"l2": 0.09, "l1": 0.3}.items():
        method, _ = prepared(tmp_path, steps=8, online=True, loss=loss)
        method.student = Off(8)
        assert loss_of(method, make_batch(30)).item() == pytest.approx(expected, rel=1e-9)


def test_online_every_batch_is_solved_anew(tmp_path):
    method, meter = prepared(tmp_path, mlp_teacher(), steps=6, online=True)
    assert method.store is None and meter.teacher_nfe == 0 and not list(tmp_path.iterdir())
    loss_of(method, make_batch(7)).backward()
    assert (meter.teacher_nfe, meter.student_nfe) == (7 * 6, 7)
    eps, *_ = method.pair(make_batch(7))
    assert torch.equal(eps, make_batch(7).noise())
    assert all(p.grad is None for p in method.teacher.denoiser.parameters())


def test_offline_a_step_costs_one_evaluation_of_the_student(tmp_path):
    method, meter = prepared(tmp_path, mlp_teacher(), steps=6, pairs=10)
    before = meter.teacher_nfe
    loss_of(method, make_batch(7, read=None))  # the batch would raise if x_0 were asked for
    assert (before, meter.teacher_nfe, meter.student_nfe) == (60, 60, 7)
    assert not method.needs_data


def test_offline_all_pairs_are_drawn(tmp_path):
    method, _ = prepared(tmp_path, steps=2, pairs=10)
    eps, x_0, _ = method.pair(make_batch(500))
    all_eps, all_x_0 = all_pairs(method)
    index = (eps[:, None] - all_eps).abs().sum(dim=(2, 3, 4)).argmin(dim=1)
    assert torch.equal(eps, all_eps[index]) and torch.equal(x_0, all_x_0[index])
    assert index.unique().tolist() == list(range(10))


@pytest.mark.parametrize("name", some_schedules())
def test_sample_is_the_student_at_t_max_with_one_evaluation(tmp_path, name):
    """At first f(sigma_T eps, t_max), the teacher's answer to pure noise."""
    method = direct(mlp_teacher(SCHEDULES[name](), "x0"))
    meter, schedule = make_workspace(method.teacher, tmp_path).meter, method.teacher.schedule
    eps = make_batch(5).noise()
    x_0 = method.sample(FixedNoise([eps]), 1, UNCONDITIONAL)
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 5)
    T = time_like(eps, schedule.t_max)
    assert torch.equal(x_0, method.teacher.denoise(schedule.sigma(T) * eps, T))
    assert method.supports(1) and not method.supports(2) and method.keeps_noise(1)


# --- held-out pairs --------------------------------------------------------------------------------------------------


HELD = {"steps": 4, "pairs": 12, "held_out": 10, "checks": 3}


def test_held_out_pairs_are_others_and_are_charged(tmp_path):
    method, meter = prepared(tmp_path, **HELD)
    eps, x_0 = method.held.read(torch.arange(10))[:2]
    close(x_0, ddim_chain(VPCosine(), eps, torch.linspace(0, 1, 5, dtype=torch.float64)), atol=3e-7)
    assert not torch.isclose(eps[:, None], all_pairs(method)[0]).any()
    assert meter.teacher_nfe == 4 * (12 + 10)
    assert [(phase.share, phase.fresh) for phase in method.phases()] == 3 * [(pytest.approx(1 / 3), False)]
    assert [phase.share for phase in direct(steps=4).phases()] == [1.0]


@pytest.mark.parametrize("offsets", [(0.3, 0.1, 0.2), (0.3, 0.2, 0.1), (0.1, 0.1, 0.2)])
def test_the_average_with_the_lowest_loss_on_held_out_pairs_is_sampled(offsets, tmp_path):
    """Averages that are off by a constant have its square as their loss."""

    class Off(Lookup):
        def __init__(self, offset: float) -> None:
            super().__init__(4)
            self.offset = nn.Parameter(torch.tensor(offset))

        def forward(self, eps, t, c):
            return super().forward(eps, t, c) - self.offset

    method, _ = prepared(tmp_path, **HELD)
    method.best, ready = Off(9.0), []
    for index, offset in enumerate(offsets):
        ready.append(method.ready(1, index))
        method.end_phase(index, Off(offset))
    close(method.losses, torch.tensor(offsets).square(), rtol=1e-6)
    first = offsets.index(min(offsets))
    assert method.best.offset == offsets[first] and ready == [False, True, True]
    share = ("33%", "67%", "100%")[first]
    assert method.note == f"the average after {share} of training: loss 0.01 on held-out pairs (the last: " + (
        f"{offsets[-1] ** 2:.4g})"
    )
    eps = make_batch(5).noise()
    chain = ddim_chain(VPCosine(), eps, torch.linspace(0, 1, 5, dtype=torch.float64))
    close(method.sample(FixedNoise([eps]), 1, UNCONDITIONAL), chain - offsets[first], atol=1e-12)


def test_looks_at_held_out_pairs_are_evaluations_of_the_student(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "BATCH", 4)  # the last of three batches has two pairs
    method, meter = prepared(tmp_path, mlp_teacher(), **HELD)
    method.end_phase(0, method.student)
    assert (meter.teacher_nfe, meter.student_nfe) == (4 * 22, 10)
    assert not any(p.grad is not None for p in method.student.parameters())
    eps, x_0, c = method.held.read(torch.arange(10))
    close(method.losses[0], (method.g(method.student, eps, c) - x_0).square().mean(), rtol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"pairs": 0}, {"loss": "l3"}, {"held_out": -1}, {"checks": 0}, {"held_out": 9, "online": True}],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Direct.Config(**settings)
