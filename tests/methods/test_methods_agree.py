"""The deterministic methods, one truth: with DDIM on one grid, direct = PD = CM = BOOT (up to its start) = the chain.

First with oracles on a mixture, then trained: affine students on a Gaussian, through the real training loop
(specification 9.1 to 9.3).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from analytic import (
    MEAN,
    VARIANCE,
    close,
    column,
    ddim_chain,
    gaussian_images,
    make_batch,
    make_workspace,
    mixture_map,
    mixture_teacher,
    table_teacher,
    time,
)
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.samplers import ONE_STEP, karras_times, time_like, uniform_times
from distillbench.diffusion.schedules import VPCosine
from distillbench.system.progress import Step
from distillbench.training.budget import BudgetConfig
from distillbench.training.loop import Loop, train
from distillbench_boot import Boot
from distillbench_cm import ConsistencyDistillation
from distillbench_direct import Direct
from distillbench_pd import ProgressiveDistillation

pytestmark = pytest.mark.usefixtures("float64")

STEPS, BATCH = 8, 128


# --- oracles ---------------------------------------------------------------------------------------------------------


def direct_answer(teacher, eps: Tensor, steps: int) -> Tensor:
    return Direct(Direct.Config(steps=steps), teacher).solve(eps, UNCONDITIONAL)


def pd_answer(teacher, eps: Tensor, steps: int) -> Tensor:
    """Nested two-step targets, one method for each phase."""

    def student(method, x_hat):
        method.taught_by = x_hat

        def answer(z, t, c=UNCONDITIONAL):
            i = (t * method.n).round().long()
            return method.target(z, i, method.times_at(i), UNCONDITIONAL)

        return answer

    x_hat, index = teacher.denoise, 0
    while True:
        method = ProgressiveDistillation(ProgressiveDistillation.Config(steps=steps), teacher)
        method.start_phase(index)
        x_hat, index = student(method, x_hat), index + 1
        if method.n == 1:
            return x_hat(eps, time_like(eps, 1.0))


def cm_answer(teacher, eps: Tensor, steps: int) -> Tensor:
    """The solver's chain along the given grid, in units of x^."""
    x, grid = eps, uniform_times(teacher.schedule, steps)
    for k in range(steps, 0, -1):
        x = ONE_STEP["ddim"](teacher.schedule, teacher.denoise, x, time_like(x, grid[k]), time_like(x, grid[k - 1]))
    return x / teacher.schedule.alpha(time_like(x, grid[0]))


def boot_answer(teacher, eps: Tensor, steps: int) -> Tensor:
    method = Boot(Boot.Config(steps=steps, target="euler"), teacher)
    y = teacher.denoise(eps, time_like(eps, 1.0))
    schedule = teacher.schedule
    for k in range(steps, 0, -1):
        t, s = time_like(eps, method.grid[k]), time_like(eps, method.grid[k - 1])
        f_t = teacher.denoise(schedule.alpha(t) * y + schedule.sigma(t) * eps, t)
        y = method.target(eps, y, f_t, t, s, UNCONDITIONAL)
    return y


@pytest.mark.parametrize(("answer", "tolerance"), [(pd_answer, 1e-9), (cm_answer, 1e-3), (boot_answer, 1e-3)])
def test_optima_agree_on_a_mixture(answer, tolerance):
    """CM ends on x^ at t_min instead of the data prediction, and BOOT starts at alpha f + sigma eps: 4.5e-5 each."""
    teacher, eps = mixture_teacher(), make_batch(64, (1, 1, 1)).noise()
    close(answer(teacher, eps, 16), direct_answer(teacher, eps, 16), atol=tolerance)


@pytest.mark.parametrize("answer", [direct_answer, pd_answer, cm_answer, boot_answer])
def test_optima_approach_the_exact_map(answer):
    """Equal quantiles of noise and data; the chain with 64 steps is within .1 of it (specification 9.4: .036)."""
    teacher, eps = mixture_teacher(), make_batch(64, (1, 1, 1)).noise().clamp(-2, 2)
    exact = mixture_map(teacher.schedule, eps, 1.0, 0.0)
    error = (answer(teacher, eps, 64) - exact).square().mean().sqrt()
    assert error < 0.1 and error < 0.6 * (answer(teacher, eps, 16) - exact).square().mean().sqrt()


# --- trained ---------------------------------------------------------------------------------------------------------

ADAM = {"lr": 0.03, "lr_warmup": 0.0, "lr_decay": "linear", "beta2": 0.99, "ema_halflife_kimg": 0.0, "grad_clip": 1e6}


def trained(method, folder, steps: int):
    workspace = make_workspace(method.teacher, folder, BudgetConfig(images=steps * BATCH))
    read = gaussian_images() if method.needs_data else None
    train(method, method.config, workspace, read, Loop(BATCH), Step(lambda fraction, note: None))
    return method


def check(method, expected, tolerance: float, nfe: int = 1) -> None:
    """Root mean square distance to the closed form on fresh noise, where the untrained student is far from it."""
    eps = make_batch(1000, seed=99).noise()
    with torch.no_grad():
        error = (method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL) - expected(eps)).square().mean().sqrt().item()
    untrained = column(MEAN).expand_as(eps)  # E[x_0] is what every student says of pure noise at first
    assert error < tolerance < 0.01 * (untrained - expected(eps)).square().mean().sqrt()


def chain(eps: Tensor) -> Tensor:
    return ddim_chain(VPCosine(), eps, uniform_times(VPCosine(), STEPS))


@pytest.mark.parametrize(
    ("cls", "settings", "steps", "tolerance"),
    [
        (Direct, {"steps": STEPS, "pairs": 1000}, 400, 1e-4),
        (Direct, {"steps": STEPS, "online": True}, 400, 1e-4),
        (ProgressiveDistillation, {"steps": STEPS, "shares": [1.0]}, 900, 1e-4),
        (Boot, {"steps": STEPS, "target": "euler", "lr": 0.01}, 1000, 5e-3),
    ],
    ids=["direct offline", "direct online", "pd", "boot"],
)
def test_trained_students_reach_the_closed_form_chain(tmp_path, cls, settings, steps, tolerance):
    """DDIM with 8 steps on a Gaussian: the product of its gains."""
    method = cls(cls.Config(**ADAM | settings), table_teacher(uniform_times(VPCosine(), STEPS)))
    check(trained(method, tmp_path, steps), chain, tolerance)


@pytest.mark.parametrize(("mu", "weight"), [(0.0, "uniform"), (0.9, "inv_step")])
def test_trained_cm_reaches_the_same_chain_on_the_same_grid(tmp_path, mu, weight):
    """Consistency distillation with DDIM, its levels moved onto the grid of the others; no weight moves the optimum."""
    schedule = VPCosine()
    grid = uniform_times(schedule, STEPS)
    settings = ADAM | {"steps": STEPS + 1, "solver": "ddim", "mu": mu, "weight": weight}
    method = ConsistencyDistillation(ConsistencyDistillation.Config(**settings), table_teacher(grid))
    method.grid = grid
    method.student.e = method.target.e = schedule.noise_level(time(grid[0])).item()
    check(trained(method, tmp_path, 800), chain, 1e-3)


@pytest.mark.parametrize("segments", [2, 3])
def test_trained_cm_with_segments_reaches_the_same_chain(tmp_path, segments):
    """In as many evaluations, on the grid of the others: all of the schedule's range, uniform in t."""
    settings = ADAM | {"steps": STEPS + 1, "solver": "ddim", "mu": 0.9, "weight": "uniform", "segments": segments}
    settings |= {"times": "uniform", "sigma_min": 1e-9, "sigma_max": 1e9}
    method = ConsistencyDistillation(
        ConsistencyDistillation.Config(**settings), table_teacher(uniform_times(VPCosine(), STEPS))
    )
    check(trained(method, tmp_path, 800), chain, 1e-3, segments)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_trained_cm_reaches_its_own_chain_on_a_karras_grid(tmp_path, solver):
    """Euler's and Heun's factors for dx^/dtau = tau (x^ - m) / (v + tau^2), from 80 eps down to e."""
    schedule = VPCosine()
    grid = karras_times(schedule, 10, 0.002, 80.0)
    settings = ADAM | {"steps": 10, "solver": solver, "mu": 0.9, "weight": "uniform"}
    method = ConsistencyDistillation(ConsistencyDistillation.Config(**settings), table_teacher(grid))
    tau, gain = schedule.noise_level(grid), torch.ones(2, 1, 1)
    rate = lambda level: level / (column(VARIANCE) + level**2)
    for k in range(9, 0, -1):
        h = tau[k - 1] - tau[k]
        euler = 1 + h * rate(tau[k])
        gain = gain * (euler if solver == "ddim" else 1 + h / 2 * (rate(tau[k]) + rate(tau[k - 1]) * euler))
    check(trained(method, tmp_path, 800), lambda eps: column(MEAN) + gain * (80 * eps - column(MEAN)), 1e-3)
