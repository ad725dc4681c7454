"""The derivative along a trajectory: against closed forms, and exact against finite differences on every network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import every_network
from analytic import close, column, gaussian_teacher, time
from distillbench.diffusion import SCHEDULES, Gaussian, VPCosine, derivative, mixture, one_mask, tangent
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.exact_denoiser import ExactDenoiser
from distillbench.diffusion.schedules import VE, NoiseSchedule
from distillbench.networks import ResidualMLP, UNet, calls
from distillbench.networks.calls import ConfiguredCall
from distillbench.networks.edm import SongUNet

SHAPE = (3, 8, 8)


def randomised(network: nn.Module) -> nn.Module:
    """With no weight at zero, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    return network.eval()


def song(**settings) -> SongUNet:
    sizes = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
    return SongUNet(8, 3, 3, **sizes | settings)


NETWORKS = {
    "mlp": lambda: Denoiser(randomised(ResidualMLP(SHAPE, width=32, depth=2)), VPCosine(), "v"),
    "unet": lambda: Denoiser(randomised(UNet(SHAPE, width=16, depth=1)), VPCosine(), "v"),
    "song": lambda: Denoiser(randomised(song()), VE(), "edm"),
}


def inputs(f: Denoiser, size: int = 4) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Noisy images at their times, and their derivatives along the network's own ODE."""
    schedule, generator = f.schedule, torch.Generator().manual_seed(1)
    t = schedule.t_of_lam(time(torch.linspace(-3, 3, size)))
    x_t = (1 + schedule.sigma(t)) * torch.randn(size, *SHAPE, generator=generator)
    with torch.no_grad():
        return (x_t, t), tangent(schedule, x_t, t, f(x_t, t))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- networks in float32 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", every_network.NETWORKS)
def test_differences_and_the_exact_derivative_agree(name):
    """To 1e-3. DDPM++ and ADM see lam / 4 and need no small step. The others see high frequencies, of t or of lam:
    h = 1e-3, and the error of order h^2 is removed by h / 2 (Richardson)."""
    f = every_network.denoiser(name)
    x_t, t, _, c = every_network.inputs(name, f)
    with torch.no_grad():
        along = tangent(f.schedule, x_t, t, f(x_t, t, c))
        F, exact = derivative(f, (x_t, t), along, c, exact=True)
        if name in ("edm, ddpm++", "edm, adm"):
            G, differences = derivative(f, (x_t, t), along, c)
        else:
            G, coarse = derivative(f, (x_t, t), along, c, step=1e-3)
            _, fine = derivative(f, (x_t, t), along, c, step=5e-4)
            differences = (4 * fine - coarse) / 3
    assert F.dtype == exact.dtype == torch.float32
    assert relative(F, G) < 1e-5 and relative(differences, exact) < 1e-3


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_reach_f_and_not_its_derivative(exact):
    f = NETWORKS["mlp"]()
    at, along = inputs(f)
    F, dF = derivative(f, at, along, exact=exact)
    assert F.requires_grad and not dF.requires_grad
    close(F, f(*at))
    rows = f.counted.counter.rows
    with torch.no_grad():
        again, _ = derivative(f, at, along, exact=exact)
    close(again, F, atol=1e-6)
    assert f.counted.counter.rows - rows == 4 * (1 if exact else 3)


@pytest.mark.parametrize("settings", [{"recompute": True}, {"precision": "bf16"}, {"channels_last": True}])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["unet", "song"])
def test_settings_of_computation_leave_the_derivative_as_it_is(name, exact, settings):
    """It is in float32 also where the network runs in bf16, and goes with a recomputed backward pass."""
    f = NETWORKS[name]().requires_grad_(True)
    at, along = inputs(f)
    _, plain = derivative(f, at, along, exact=exact)
    with f.counted.counter.calling(ConfiguredCall("cpu", **settings)), torch.autocast("cpu", torch.bfloat16):
        F, dF = derivative(f, at, along, exact=exact)
        F.square().mean().backward()
    assert dF.dtype == torch.float32 and relative(dF, plain) < 1e-3
    assert all(weight.grad is not None for weight in f.parameters() if weight.requires_grad)


@pytest.mark.parametrize("kind", ["whole", "blocks"])
@pytest.mark.parametrize("exact", [False, True])
def test_what_is_compiled(exact, kind, monkeypatch):
    """F and the evaluations of differences; of the exact derivative F alone, since jvp is not compiled."""
    ran: list[bool] = []

    def noting(forward):
        def noted(*args):
            ran.append(torch.is_grad_enabled())
            return forward(*args)

        return noted

    monkeypatch.setattr(calls, "compiled", noting)
    f = Denoiser(randomised(ResidualMLP(SHAPE, width=16, depth=3)), VE(), "edm")
    at, along = inputs(f)
    _, plain = derivative(f, at, along, exact=exact)
    with f.counted.counter.calling(ConfiguredCall("cpu", compile=kind)):
        _, dF = derivative(f, at, along, exact=exact)
    blocks = 1 if kind == "whole" else 3
    assert ran == ([] if exact else 2 * blocks * [False]) + blocks * [True]
    close(dF, plain)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["whole", "blocks"])
@pytest.mark.parametrize("exact", [False, True])
def test_compiled_networks(exact, kind):
    f = Denoiser(randomised(ResidualMLP(SHAPE, width=16, depth=3)), VE(), "edm")
    at, along = inputs(f)
    F, dF = derivative(f, at, along, exact=exact)
    with f.counted.counter.calling(ConfiguredCall("cpu", "bf16", compile=kind)):
        G, compiled = derivative(f, at, along, exact=exact)
        G.square().mean().backward()
    assert relative(compiled, dF) < 1e-2 and relative(G, F) < 2e-2


@pytest.mark.parametrize("exact", [False, True])
def test_all_evaluations_drop_the_same_features(exact):
    """With dropout the two kinds agree, as both differentiate one network; two masks would differ by 1/h."""
    f = Denoiser(randomised(song(dropout=0.5)), VE(), "edm").train()
    at, along = inputs(f)
    torch.manual_seed(3)
    with one_mask(f), torch.no_grad():
        expected = f(*at)
    torch.manual_seed(3)
    F, dF = derivative(f, at, along, exact=exact)
    close(F, expected, atol=1e-5)
    torch.manual_seed(3)
    _, other = derivative(f, at, along, exact=not exact)
    assert relative(dF, other) < 1e-2
    torch.manual_seed(4)
    assert relative(derivative(f, at, along, exact=exact)[0], F) > 0.05


def test_classes_and_times_that_stay_constant_are_passed_on():
    def f(x: Tensor, s: Tensor, power: int) -> Tensor:
        return s * x**power

    x, s = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[5.0]], dtype=torch.float64)
    for exact in (False, True):
        F, dF = derivative(f, (x,), (torch.ones_like(x),), s, 2, exact=exact)
        close(F, 5 * x**2)
        close(dF, 10 * x, rtol=1e-10)


def test_wrong_arguments_are_refused():
    x = torch.zeros(2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"shapes of `at`"):
        derivative(lambda a: a, (x,), (x[:1],))
    with pytest.raises(ValueError, match="above 0"):
        derivative(lambda a: a, (x,), (x,), step=0.0)


# --- closed forms in float64 -----------------------------------------------------------------------------------------


def along_the_ode(f: Denoiser, schedule: NoiseSchedule, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """t, f, and df/dlam at some points."""
    t = schedule.t_of_lam(time(torch.linspace(-3, 3, 7)))
    generator = torch.Generator().manual_seed(0)
    x_t = schedule.alpha(t) * 0.7 + (schedule.alpha(t) + schedule.sigma(t)) * torch.randn(
        7, 2, 1, 1, generator=generator
    )
    along = tangent(schedule, x_t, t, f(x_t, t))
    if exact:
        F, dF = derivative(f, (x_t, t), along, exact=True)
    else:  # error of order h^4 (Richardson)
        (F, coarse), (_, fine) = (derivative(f, (x_t, t), along, step=h) for h in (2e-3, 1e-3))
        dF = (4 * fine - coarse) / 3
    return t, F, dF


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_denoiser_of_a_gaussian(name, exact, float64):
    """f - m = v (x^ - m) / (v + tau^2) and x^ - m grows as sqrt(v + tau^2): df/dlam = -(f - m) tau^2 / (v + tau^2)."""
    schedule = SCHEDULES[name]()
    if name.startswith("ddpm") and not exact:
        pytest.skip("lam(t) has corners, next to which differences are less exact")
    mean, variance = (0.5, -0.3), (1.0, 0.09)
    t, f, df = along_the_ode(gaussian_teacher(schedule, mean, variance).denoiser, schedule, exact)
    square = schedule.noise_level(t) ** 2
    close(df, -(f - column(mean)) * square / (column(variance) + square), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["ve", "vp_cosine", "flow_matching"])
def test_both_agree_on_exact_denoisers(name, float64):
    schedule = SCHEDULES[name]()
    for distribution in (
        mixture([0.3, 0.7], [[-0.5, 0.1], [0.4, 0.4]], [[0.2], [0.3]]),
        Gaussian(torch.tensor([0.3, -0.2]).view(2, 1, 1), torch.tensor([[0.5, 0.2], [0.2, 0.3]])),
    ):
        f = ExactDenoiser(distribution, schedule)
        close(along_the_ode(f, schedule, True)[2], along_the_ode(f, schedule, False)[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_tangent_is_that_of_x_hat(name, float64):
    """dx^/dlam = x^ - x_0 and dlam/dt t' = 1, by differences of x_t = alpha (x_0 + tau eps) in lam."""
    schedule = SCHEDULES[name]()
    lam, h = time(torch.linspace(-2, 2, 7) + 0.00123), 1e-5
    x_0, eps = torch.randn(2, 7, 2, 1, 1, generator=torch.Generator().manual_seed(0))

    def x(lam: Tensor) -> tuple[Tensor, Tensor]:
        t = schedule.t_of_lam(lam)
        return schedule.alpha(t) * x_0 + schedule.sigma(t) * eps, t

    (ahead, t_ahead), (behind, t_behind), (x_t, t) = x(lam + h), x(lam - h), x(lam)
    dx, dt = tangent(schedule, x_t, t, x_0)
    close(dx, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-6)
    close(dt, (t_ahead - t_behind) / (2 * h), rtol=1e-5)


def test_copies_of_a_network_are_computed_in_float32_too():
    """A module that has several networks: all that share a counter."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = NETWORKS["song"]()
            self.other = copy.deepcopy(self.one)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.one(x, t) + self.other(x, t)

    both = Two()
    at, along = inputs(both.one)
    _, single = derivative(both.one, at, along)
    with both.one.counted.counter.calling(ConfiguredCall("cpu", "bf16")):
        _, double = derivative(both, at, along)
    assert relative(double, 2 * single) < 1e-5
