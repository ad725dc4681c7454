"""Distribution matching distillation against the Kullback-Leibler divergence of Gaussians, and its chain of steps.

In the closed forms the student is x = A z + b, so x_t is Gaussian like the teacher's, and both denoisers are affine.
Without a normaliser g is affine in (z, eps) too: its means with z follow from its values at zero and at unit vectors.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from analytic import (
    MEAN,
    VARIANCE,
    close,
    column,
    gaussian_teacher,
    learnable_teacher,
    make_batch,
    make_workspace,
    mlp_teacher,
    perturbed,
    same_weights,
    some_schedules,
    time,
    weights_of,
)
from distillbench import Batch, Condition, Conditioning, Denoiser, NetworkConfig, Teacher, UserError
from distillbench.diffusion import SCHEDULES, UNCONDITIONAL, ExactDenoiser, Gaussian, VPCosine
from distillbench.diffusion.noise import FixedNoise
from distillbench.networks import ResidualMLP
from distillbench.system.progress import Step
from distillbench.training.budget import BudgetConfig
from distillbench.training.loop import Loop, train
from distillbench.training.optimizers import Optimizers
from distillbench_dmd import DistributionMatching

LAYER = "blocks.0"  # of the perceptron
K = torch.zeros(1, 1, 1, 1, dtype=torch.int64)  # the first of the student's steps
ONE_TO_ONE = {"fake_updates": 1}
DIFF_INSTRUCT = ONE_TO_ONE | {"weight": "one", "times": "lognormal", "margin": 0.0}
M, V = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([[0.5, 0.1], [0.1, 0.2]], dtype=torch.float64)


def dmd(teacher=None, **settings) -> DistributionMatching:
    return DistributionMatching(DistributionMatching.Config(**settings), teacher or mlp_teacher())


def updates(method, steps: int, size: int = 8, read=None):
    """The networks and losses of some steps."""
    for step in range(steps):
        yield from method.train_step(
            Batch(size, method.teacher.shape, torch.Generator().manual_seed(step), "cpu", read, step=step)
        )


class Affine(nn.Module):
    """x = A z + b with z = x_s / sigma_s, whatever the schedule."""

    def __init__(self, method, A: Tensor, b: Tensor) -> None:
        super().__init__()
        self.A, self.b = nn.Parameter(A.clone()), nn.Parameter(b.clone())
        self.schedule = method.teacher.schedule

    def forward(self, x: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        z = (x / self.schedule.sigma(t)).flatten(1)
        return (z @ self.A.T + self.b).view(x.shape)


def exact(schedule, mean: Tensor, covariance: Tensor) -> ExactDenoiser:
    return ExactDenoiser(Gaussian(mean.view(-1, 1, 1), covariance), schedule)


def affine(A: Tensor, b: Tensor, name: str = "vp_cosine", mean=M, covariance=V, **settings):
    """A method with the teacher's N(mean, covariance), the student A z + b, and its exact fake score."""
    schedule, shape = SCHEDULES[name](), (len(b), 1, 1)
    start = Denoiser(ResidualMLP(shape, width=8, depth=1), schedule, "v")
    teacher = Teacher("gaussian", exact(schedule, mean, covariance), shape, "gaussian", start=start)
    method = dmd(teacher, **{"levels": [2.5]} | settings)
    method.student, method.fake.denoiser = Affine(method, A, b), exact(schedule, b, A @ A.T)
    return method


def expected_gradient(method, tau: float) -> tuple[Tensor, Tensor]:
    """E of g z^T and of g at noise level tau: the gradients of L_G in A and in b, exactly if g is affine."""
    student, pixels = method.student, len(method.student.b)
    z = torch.cat([torch.zeros(1, pixels), torch.eye(pixels)]).double()
    x = (z @ student.A.T + student.b).detach().view(-1, pixels, 1, 1)
    t = method.teacher.schedule.t_of_lam(time([math.log(tau)] * len(z)))
    g = method.g(x, K, t, torch.zeros_like(x), UNCONDITIONAL).flatten(1)
    return (g[1:] - g[0]).T, g[0]


def kl_gradient(A: Tensor, b: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Of KL(p_G | p_phi), both noised to level tau, by torch."""
    A, b = A.clone().requires_grad_(), b.clone().requires_grad_()
    noise = tau**2 * torch.eye(len(b)).double()
    kl_divergence(MultivariateNormal(b, A @ A.T + noise), MultivariateNormal(M, V + noise)).backward()
    return A.grad, b.grad


# --- the student's gradient ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", some_schedules())
@pytest.mark.parametrize("tau", [0.1, 0.8, 3.0])
@pytest.mark.parametrize("weight", ["one", "kl"])
def test_the_gradient_is_that_of_the_reverse_divergence(weight, tau, name):
    """tau^2 times it for the weight 1. The generator is wrong in mean, scale and direction."""
    A, b = torch.tensor([[0.9, 0.2], [-0.3, 0.25]]).double(), torch.tensor([0.1, 0.4]).double()
    found = expected_gradient(affine(A, b, name, weight=weight), tau)
    for ours, theirs in zip(found, kl_gradient(A, b, tau), strict=True):
        close(ours, theirs * (tau**2 if weight == "one" else 1), rtol=1e-7, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("weight", ["dmd", "one", "kl"])
def test_the_gradient_is_zero_where_the_distributions_agree(weight):
    """For every generator of the teacher's distribution: A Q for any rotation Q."""
    turn = torch.tensor([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]]).double()
    for ours in expected_gradient(affine(torch.linalg.cholesky(V) @ turn, M, weight=weight), 0.8):
        close(ours, torch.zeros_like(ours), atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("settings", [ONE_TO_ONE, DIFF_INSTRUCT], ids=["dmd", "diff-instruct"])
@pytest.mark.parametrize(("a", "sign"), [(0.3, -1), (0.5, 0), (0.9, 1)])
def test_the_gradient_of_a_whole_step_points_to_the_teacher_s_distribution(a, sign, settings):
    """N(0, a^2) to N(0, .25) in 16 pixels: with the normaliser and all noise levels."""
    eye = torch.eye(16).double()
    method = affine(a * eye, 0 * eye[0], mean=0 * eye[0], covariance=0.25 * eye, **settings)
    *_, (network, loss) = method.train_step(make_batch(2000, (16, 1, 1)))
    loss.backward()
    assert network is method.student
    slope = method.student.A.grad.diagonal().sum().item()
    assert abs(slope) < 1e-9 if sign == 0 else sign * slope > 0.01


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("settings", [{}, DIFF_INSTRUCT, {"weight": "kl", "times": "lognormal"}, {"levels": [80.0, 1]}])
def test_a_step_by_hand(settings):
    """The student's gradient from the same draws, written out anew in EDM's coordinates: of x it is g / pixels."""
    method = perturbed(dmd(**{"levels": [80.0]} | settings))
    (_, _), (network, loss) = method.train_step(make_batch(64))
    loss.backward()
    weights = [w for w in method.student.parameters() if w.grad is not None]
    ours = [w.grad.clone() for w in weights]

    batch, schedule, config = make_batch(64), method.teacher.schedule, method.config
    N = len(config.levels)
    batch.random_c(), batch.integers(0, N), [batch.noise() for _ in range(N)], batch.uniform(), batch.noise()
    k, draws = batch.integers(0, N), [batch.noise() for _ in range(N)]
    level = [time([tau] * 64) for tau in config.levels]
    x_s, s = level[0] * draws[0], level[0]
    at = lambda tau: schedule.t_of_lam(tau.log())
    with torch.no_grad():
        for i in range(1, N):
            x_next = method.student(schedule.alpha(at(s)) * x_s, at(s)) + level[i] * draws[i]
            x_s, s = torch.where(k >= i, x_next, x_s), torch.where(k >= i, level[i], s)
    x = method.student(schedule.alpha(at(s)) * x_s, at(s))
    u = config.margin + (1 - 2 * config.margin) * batch.uniform()
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    of_times = {"karras": (low + u * (high - low)) ** 7, "lognormal": stats.lognorm.ppf(u, s=1.2, scale=math.exp(-1.2))}
    tau = torch.as_tensor(of_times[config.times])
    x_t = schedule.alpha(at(tau)) * (x + tau * batch.noise())
    D_phi, D_psi = method.teacher.denoise(x_t, at(tau)).detach(), method.fake(x_t, at(tau), k).detach()
    error = (x - D_phi).detach().abs().mean(dim=(1, 2, 3), keepdim=True)
    w = {"dmd": 1 / error, "one": torch.ones_like(tau), "kl": 1 / tau**2}[config.weight]
    method.student.zero_grad()
    (w * (D_psi - D_phi) * x).mean().backward()
    assert network is method.student
    for grad, weight in zip(ours, weights, strict=True):
        close(grad, weight.grad, rtol=1e-6, atol=1e-12)
    close(loss, 0.5 * (w * (D_psi - D_phi)).square().mean(), rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_the_normaliser_is_of_one_image_and_has_a_floor():
    method = perturbed(dmd())
    batch = make_batch(6)
    x, t, eps = batch.noise(), method.time(batch), batch.noise()
    g = method.g(x, K, t, eps, UNCONDITIONAL)
    assert not g.requires_grad
    for i in range(6):
        close(method.g(x[i : i + 1], K, t[i : i + 1], eps[i : i + 1], UNCONDITIONAL), g[i : i + 1], rtol=1e-9)
    method.teacher.denoise = lambda x_t, t, c: x  # a teacher that agrees with x to the last digit
    D_psi = method.fake.denoiser(method.teacher.schedule.noised(x, t, eps), t)
    close(method.g(x, K, t, eps, UNCONDITIONAL), 1e5 * (D_psi - x), rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_the_released_weight_has_no_floor_and_drops_what_is_not_a_number():
    """As numpy's nan_to_num. A teacher that is 1e-7 from x, at x, at x as the fake score is, and not a number."""
    method = perturbed(dmd(weight="released"))
    batch = make_batch(4)
    x, t, eps = batch.noise(), method.time(batch), batch.noise()
    D_psi = method.fake.denoiser(method.teacher.schedule.noised(x, t, eps), t).detach()
    D_phi = x + torch.tensor([1e-7, 0.0, 0.0, math.nan]).view(4, 1, 1, 1)
    x[2], D_phi[2] = D_psi[2], D_psi[2]
    method.teacher.denoise = lambda x_t, t, c: D_phi
    method.fake.forward = lambda x_t, t, k, c: D_psi
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.abs((x - D_phi).numpy()).mean(axis=(1, 2, 3), keepdims=True)
        expected = np.nan_to_num((D_psi - D_phi).numpy() / error)
    found = method.g(x, K, t, eps, UNCONDITIONAL).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.abs(found[0]).max() > 2e5 and np.abs(found[1]).max() > 1e300 and not found[2:].any()


@pytest.mark.usefixtures("float64")
def test_both_denoisers_see_the_same_x_t():
    method, seen = perturbed(dmd(**ONE_TO_ONE)), []
    denoise = method.teacher.denoise
    method.teacher.denoise = lambda x_t, t, c: seen.append((x_t, t)) or denoise(x_t, t, c)
    method.fake.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    list(method.train_step(make_batch(4)))
    _, of_teacher, of_fake = seen  # the first is that of the fake score's own update
    assert all(torch.equal(a, b) for a, b in zip(of_teacher, of_fake, strict=True))
    assert len(set(of_fake[1].flatten().tolist())) == 4  # a time for each image


# --- noise levels ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", some_schedules())
def test_noise_levels_have_the_released_distributions(name):
    """DMD2: 1000 Karras levels, the fake score's all of them, the student's without 2 % at each end."""
    schedule = SCHEDULES[name]()
    of_ramp = lambda tau: (tau ** (1 / 7) - bottom) / (80 ** (1 / 7) - bottom)
    bottom = max(0.002, math.exp(schedule.lam_range[0])) ** (1 / 7)
    for settings, margin, low, width in (({}, 0.0, 0.0, 1.0), ({}, 0.02, 0.02, 0.96)):
        method = dmd(mlp_teacher(schedule, "x0"), levels=[2.5], **settings)
        tau = schedule.noise_level(method.time(make_batch(20_000), margin)).flatten().numpy()
        assert stats.kstest(of_ramp(tau), stats.uniform(low, width).cdf).pvalue > 0.01
    assert method.config.margin == 0.02
    log_tau = schedule.lam(dmd(mlp_teacher(schedule, "x0"), levels=[2.5], **DIFF_INSTRUCT).time(make_batch(20_000)))
    assert stats.kstest(log_tau.flatten().numpy(), stats.norm(-1.2, 1.2).cdf).pvalue > 0.01


# --- the fake score --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", some_schedules())
def test_the_optimal_fake_score_is_the_denoiser_of_the_student_s_distribution(name):
    """The slope of L_psi in psi's mean and variance changes sign there, and not at the teacher's."""
    method = dmd(learnable_teacher(SCHEDULES[name]()), levels=[2.5])
    network = method.fake.denoiser.network
    x = 0.1 + 0.7 * make_batch(40_000, (1, 1, 1), seed=5).noise()
    for parameter, best, away in ((network.m, 0.1, 0.2), (network.l, math.log(0.49), 0.5)):
        for shift in (-1, 1):
            method.zero_grad()
            with torch.no_grad():
                network.m.fill_(0.1), network.l.fill_(math.log(0.49))
                parameter.fill_(best + shift * away)
            method.fake_loss(x, K, make_batch(40_000, (1, 1, 1)), UNCONDITIONAL).backward()
            assert shift * parameter.grad.item() > 0
            far = abs(parameter.grad.item())
        method.zero_grad()
        with torch.no_grad():
            parameter.fill_(best)
        method.fake_loss(x, K, make_batch(40_000, (1, 1, 1)), UNCONDITIONAL).backward()
        assert abs(parameter.grad.item()) < 0.15 * far  # what sampling leaves


# --- who is trained, when, and at what price -------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("ratio", [1, 2, 5])
def test_the_student_is_updated_once_in_a_cycle(ratio):
    """As released, iteration i updates the fake score, and the student too if i is a multiple of the ratio."""
    method = dmd(fake_updates=ratio)
    networks = [network for network, _ in updates(method, 2 * ratio)]
    assert networks == ([method.fake, method.student] + [method.fake] * (ratio - 1)) * 2
    (phase,) = method.phases()
    assert phase.cycle == ratio and not phase.cost_varies


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("gan", [{}, {"gan_weight": 0.5, "layer": LAYER}], ids=["data-free", "adversarial"])
def test_with_shared_images_the_fake_score_learns_from_those_of_the_student_s_update(gan, tmp_path):
    """DMD2's iteration: one draw of noise and class, the student's update if it is due, then the fake score's."""
    teacher = class_teacher(Conditioning(3))
    method = perturbed(dmd(teacher, shared=True, fake_updates=2, levels=[80.0, 1.0], **gan))
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 0])
    meter, seen, networks = make_workspace(teacher, tmp_path).meter, [], []
    student_loss, fake_loss = method.student_loss, method.fake_loss
    method.student_loss = lambda x, k, batch, c: seen.append((x.detach(), k, c)) or student_loss(x, k, batch, c)
    method.fake_loss = lambda x, k, batch, c: seen.append((x, k, c)) or fake_loss(x, k, batch, c)
    for step in range(3):
        generator, read = torch.Generator().manual_seed(step), lambda n: (torch.zeros(n, 2, 1, 1), labels)
        batch = Batch(7, (2, 1, 1), generator, "cpu", read, teacher.conditioning, step=step)
        for network, loss in method.train_step(batch):
            networks.append(network)
            method.zero_grad()
            loss.backward()
            other = method.student if network is method.fake else method.fake
            assert all(weight.grad is None for weight in other.parameters())
    assert networks == [method.student, method.fake, method.fake, method.student, method.fake]
    for (x, k, c), (x_fake, k_fake, c_fake) in ((seen[0], seen[1]), (seen[3], seen[4])):
        assert torch.equal(x, x_fake) and not x_fake.requires_grad and k is k_fake and c is c_fake
    assert not torch.equal(seen[1][0], seen[2][0])  # each step draws anew
    heads = 7 * (3 * 2 + 2) if gan else 0  # of x and of a real image in three updates; of x in the student's two
    assert (meter.teacher_nfe, meter.student_nfe) == (7 * 2, 7 * (3 * 2 + 3 + 2) + heads)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("gan", [{}, {"gan_weight": 0.5, "layer": LAYER}], ids=["data-free", "adversarial"])
def test_an_update_moves_one_network(gan):
    method = dmd(**ONE_TO_ONE | gan)
    teacher = weights_of(method.teacher.denoiser)
    assert same_weights(weights_of(method.student), teacher)
    assert same_weights(weights_of(method.fake.denoiser), teacher)
    optimizers, moved = Optimizers(method.config), []
    for network, loss in method.train_step(make_batch(16, read=lambda n: (torch.randn(n, 2, 1, 1), None))):
        before = {name: weights_of(getattr(method, name)) for name in ("student", "fake")}
        optimizers.update(network, loss, 1.0)
        moved.append([name for name in before if not same_weights(before[name], weights_of(getattr(method, name)))])
    assert moved == [["fake"], ["student"]]
    assert same_weights(weights_of(method.teacher.denoiser), teacher)


@pytest.mark.usefixtures("float64")
def test_gradients_reach_one_network_at_a_time():
    method = perturbed(dmd(gan_weight=0.5, layer=LAYER, levels=[80.0, 1.0]))
    reached = lambda module: any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    for network, loss in method.train_step(make_batch(16, read=lambda n: (torch.randn(n, 2, 1, 1), None))):
        loss.backward()
        other = method.student if network is method.fake else method.fake
        assert reached(network) and not reached(other) and not reached(method.teacher.denoiser)
        method.zero_grad()
    assert all(p.requires_grad for p in method.parameters())


def class_teacher(conditioning: Conditioning) -> Teacher:
    torch.manual_seed(0)
    network = ResidualMLP((2, 1, 1), width=16, depth=1, classes=conditioning.classes)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Teacher("mlp", Denoiser(network, VPCosine(), "v"), (2, 1, 1), "mlp", conditioning=conditioning)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("w", "teacher_nfe"), [(1.0, 1), (3.0, 2)])
@pytest.mark.parametrize("N", [1, 4])
def test_evaluations_of_a_cycle(N, w, teacher_nfe, tmp_path):
    """Specification 39 at 5 to 1: T 1 (guided 2), Sn 5, Sg 1, F 5 + 1; N - 1 more of the student in each update."""
    method = dmd(class_teacher(Conditioning(3, w)), levels=[80.0, 5.0, 1.0, 0.3][:N])
    meter = make_workspace(method.teacher, tmp_path).meter
    for step in range(5):
        conditioning = method.teacher.conditioning
        list(method.train_step(Batch(7, (2, 1, 1), torch.Generator(), "cpu", None, conditioning, step=step)))
    assert (meter.teacher_nfe, meter.student_nfe) == (7 * teacher_nfe, 7 * (6 * N + 6))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("conditioning", [Conditioning(3), Conditioning(3, 2.5), Conditioning(3, 1.0, (1.0, 4.0))])
def test_every_network_gets_the_classes_of_its_images(conditioning):
    """Generated images have random classes, new for each update; real images their own."""
    teacher = class_teacher(conditioning)
    method = dmd(teacher, gan_weight=0.5, layer=LAYER, levels=[80.0, 1.0])
    labels = torch.tensor([0, 1, 2, 2, 2, 2, 2, 2])
    batch = Batch(
        8, (2, 1, 1), torch.Generator().manual_seed(3), "cpu", lambda n: (torch.zeros(n, 2, 1, 1), labels), conditioning
    )
    asked = {"student": [], "fake": [], "teacher": []}
    for name, module in (("student", method.student), ("fake", method.fake.denoiser)):
        module.register_forward_pre_hook(lambda module, args, name=name: asked[name].append(args[2]))
    denoise = teacher.denoise
    teacher.denoise = lambda x_t, t, c: asked["teacher"].append(c) or denoise(x_t, t, c)
    list(method.train_step(batch))
    (first, *of_fake_update), (second, *of_student_update) = asked["student"][:2], asked["student"][2:]
    assert of_fake_update == [first] and of_student_update == [second] and not torch.equal(first.labels, second.labels)
    denoised, told_generated, told_real, compared, told = asked["fake"]
    assert denoised is told_generated is first and compared is told is asked["teacher"][0] is second
    assert torch.equal(told_real.labels, labels)


# --- several steps ---------------------------------------------------------------------------------------------------

LEVELS = [80.0, 4.0, 1.0, 0.3]


@pytest.mark.usefixtures("float64")
def test_a_step_is_trained_on_the_student_s_own_chain():
    """Each image stops at its own k; only the last evaluation has a gradient, and its inputs are what is sampled."""
    method, calls = dmd(levels=LEVELS), []
    hook = lambda module, args, out: calls.append((*args[:2], out.detach(), out.requires_grad))
    method.student.register_forward_hook(hook)
    method.chain(make_batch(400).noise, make_batch(400, seed=1).integers(0, 4), UNCONDITIONAL)
    assert [gradient for *_, gradient in calls] == [False] * 3 + [True]
    schedule, batch, k = method.teacher.schedule, make_batch(400), make_batch(400, seed=1).integers(0, 4)
    draws = [batch.noise() for _ in range(4)]
    x_s, s, *_ = calls[3]
    assert sorted(set(k.flatten().tolist())) == [0, 1, 2, 3]
    for step, tau in enumerate(LEVELS):
        rows = (k == step).flatten()
        close(schedule.noise_level(s)[rows], time([tau] * int(rows.sum())), rtol=1e-6)
        made = FixedNoise([draw[rows] for draw in draws])
        with torch.no_grad():
            sampled = method.sample(made, step + 1, UNCONDITIONAL)
        close(calls[3][2][rows], sampled, rtol=1e-9, atol=1e-12)
        close(calls[-1][0], x_s[rows], rtol=1e-9, atol=1e-12)
        calls = calls[:4]
    assert method.inputs == "rollout" and dmd().inputs == "noise"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mixture", [False, True])
def test_the_fake_score_is_of_each_step_or_of_their_mixture(mixture):
    """Where two steps make N(-1, .04) and N(1, .04): D_psi at their mean is -1 and 1, or 0 for both."""
    method = dmd(levels=[80.0, 1.0], mixture=mixture, lr=0.01, lr_warmup=0.0)
    optimizers, steps = Optimizers(method.config), 300
    for step in range(steps):
        batch = make_batch(128, seed=step)
        k = batch.integers(0, 2)
        x = 2.0 * k - 1 + 0.2 * batch.noise()
        optimizers.update(method.fake, method.fake_loss(x, k, batch, UNCONDITIONAL), 1 - step / steps)
    t = method.teacher.schedule.t_of_lam(time([math.log(3.0)] * 2))
    found = method.fake(torch.zeros(2, 2, 1, 1), t, torch.tensor([0, 1]).view(2, 1, 1, 1)).mean(dim=(1, 2, 3))
    expected = [0.0, 0.0] if mixture else [-1.0, 1.0]
    assert found.tolist() == pytest.approx(expected, abs=0.15)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", some_schedules())
def test_untrained_samples_are_a_chain_of_denoised_images(name, tmp_path):
    """E[x_0 given x_0 + tau eps] = m + v / (v + tau^2) (x_0 + tau eps - m), from tau z on."""
    method = dmd(gaussian_teacher(SCHEDULES[name]()), levels=[2.5, 0.5])
    batch, m, v = make_batch(5), column(MEAN), column(VARIANCE)
    meter = make_workspace(method.teacher, tmp_path).meter
    draws = [batch.noise(), batch.noise()]
    first = m + v / (v + 2.5**2) * (2.5 * draws[0] - m)
    second = m + v / (v + 0.5**2) * (first + 0.5 * draws[1] - m)
    for nfe, expected in ((1, first), (2, second)):
        close(method.sample(FixedNoise(draws), nfe, UNCONDITIONAL), expected, rtol=1e-7, atol=1e-9)
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 5 + 10)
    assert [nfe for nfe in range(6) if method.supports(nfe)] == [1, 2] and not method.keeps_noise(1)


# --- the adversarial term --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("a", "sign"), [(0.3, -1), (0.5, 0), (0.9, 1)])
def test_the_adversarial_gradient_points_to_the_data(a, sign):
    """With the best discriminator, h = log p_data / p_G of x_t; the matching gradient is zero here."""
    eye = torch.eye(4).double()
    method = affine(a * eye, 0 * eye[0], mean=0 * eye[0], covariance=0.25 * eye)
    method.config.gan_weight = 1.0
    method.g = lambda x, k, t, eps, c: torch.zeros_like(x)
    schedule = method.teacher.schedule

    def logits(x_t, t, k, c):
        square = (x_t / schedule.alpha(t)).square().sum(dim=(1, 2, 3), keepdim=True)
        tau = schedule.noise_level(t)
        data, ours = 0.25 + tau**2, a**2 + tau**2
        return (0.5 * square * (1 / ours - 1 / data) + 2 * (ours / data).log()).flatten(1)

    method.fake.logits = logits
    batch = make_batch(4000, (4, 1, 1))
    loss = method.student_loss(method.chain(batch.noise, 0, UNCONDITIONAL), K, batch, UNCONDITIONAL)
    loss.backward()
    slope = method.student.A.grad.diagonal().sum().item()
    assert abs(slope) < 1e-9 if sign == 0 else sign * slope > 0.01
    assert sign or loss.item() == pytest.approx(math.log(2))


def shifted(n: int, by: float = 0.8):
    return by + 0.3 * torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(n)), None


def test_a_trained_discriminator_tells_real_images_apart():
    """And its gradient moves the student's images towards them."""
    method = dmd(gan_weight=1.0, fake_gan_weight=1.0, layer=LAYER, lr=3e-3, lr_warmup=0.0)
    optimizers = Optimizers(method.config)
    for step in range(150):
        batch = Batch(64, (2, 1, 1), torch.Generator().manual_seed(step), "cpu", shifted, step=5 * step + 1)
        ((network, loss),) = method.train_step(batch)
        optimizers.update(network, loss, 1.0)
    batch = make_batch(512, read=shifted)
    x = method.chain(batch.noise, 0, UNCONDITIONAL).detach().requires_grad_()
    ours, theirs = (method.h(images, K, batch, UNCONDITIONAL).mean().item() for images in (x, batch.x_0))
    assert theirs > ours + 0.5
    method.g = lambda x, k, t, eps, c: torch.zeros_like(x)
    method.student_loss(x, K, batch, UNCONDITIONAL).backward()
    away = (x - 0.8).detach()
    assert (away * x.grad).sum() > 0.2 * away.norm() * x.grad.norm()  # downhill is towards the real images


@pytest.mark.usefixtures("float64")
def test_the_discriminator_s_loss_by_hand():
    """-log of the odds: 2 log 2 for an undecided one, and -log p(generated) - log p(real) in general."""
    method = perturbed(dmd(gan_weight=1.0, fake_gan_weight=0.3, layer=LAYER))
    seen, logits = [], method.fake.logits
    method.fake.logits = lambda x_t, t, k, c: seen.append(logits(x_t, t, k, c)) or seen[-1]
    (_, loss), _ = method.train_step(make_batch(32, read=shifted))
    with_it = loss.item()
    generated, real = (torch.sigmoid(h) for h in seen[:2])
    plain = perturbed(dmd())
    plain.student, plain.fake.denoiser = method.student, method.fake.denoiser
    (_, without), _ = plain.train_step(make_batch(32))
    expected = without.item() + 0.3 * (-(1 - generated).log() - real.log()).mean().item()
    assert with_it == pytest.approx(expected, rel=1e-6)


def test_real_images_are_read_for_the_adversarial_term_only():
    config = DistributionMatching.Config
    assert not DistributionMatching.needs_data
    assert not DistributionMatching.reads_data(config(layer=LAYER))
    assert DistributionMatching.reads_data(config(gan_weight=1e-3, layer=LAYER))
    assert not any("head" in name for name in dmd(layer=LAYER).state_dict())


# --- the distribution ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"lr": 0.03}, 1000), (DIFF_INSTRUCT | {"lr": 0.02, "beta1": 0.0}, 600)],  # with .9 the two networks oscillate
    ids=["dmd", "diff-instruct"],
)
def test_a_trained_student_has_the_teacher_s_distribution(settings, steps, tmp_path):
    """N(.3, .25) from a student that starts with a standard deviation of .096."""
    method = dmd(learnable_teacher(VPCosine()), levels=[2.5], ema_halflife_kimg=4.0, **settings)
    size = 192
    workspace = make_workspace(method.teacher, tmp_path, BudgetConfig(images=steps * size))
    train(method, method.config, workspace, None, Loop(size), Step(lambda fraction, note: None))
    z = FixedNoise([make_batch(10_000, (1, 1, 1), seed=5).noise()])
    with torch.no_grad():
        x = method.sample(z, 1, UNCONDITIONAL).flatten()
    assert (x.mean().item(), x.std().item()) == (pytest.approx(0.3, abs=0.03), pytest.approx(0.5, rel=0.08))
    assert {name.split(".")[0] for name in method.state_dict()} == {"student", "fake"}  # what has to be saved


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_release_s():
    config = DistributionMatching.Config()
    expected = {"fake_updates": 5, "weight": "dmd", "times": "karras", "margin": 0.02, "gan_weight": 0.0}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.fake_gan_weight == 0.01 and config.fake == NetworkConfig()


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": "snr"},
        {"times": "uniform"},
        {"fake_updates": 0},
        {"margin": 0.5},
        {"gan_weight": -1.0},
        {"fake_gan_weight": -1.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        DistributionMatching.Config(**settings)


def test_an_adversarial_term_needs_a_layer():
    with pytest.raises(UserError, match="no submodule ''"):
        dmd(gan_weight=1.0)


def test_levels_that_do_not_fall_are_refused():
    with pytest.raises(UserError, match="levels must fall"):
        dmd(levels=[1.0, 2.0])
