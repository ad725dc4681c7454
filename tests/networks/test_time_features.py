"""Networks whose features of time are replaced by polynomials: the fit, and what becomes of each network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analytic import close, gaussian_teacher, time
from distillbench import Condition, UserError
from distillbench.diffusion import VE, VPCosine, derivative
from distillbench.diffusion.denoiser import Denoiser
from distillbench.networks import DiT, ResidualMLP, TimeFeatures, UNet, smooth_times
from distillbench.networks.diffusers_calls import ScoreCall
from distillbench.networks.diffusers_wrappers import PixelUNet
from distillbench.networks.edm import DhariwalUNet, Fourier, SongUNet
from distillbench.networks.time_features import PolynomialFeatures, scale_fourier
from small_diffusers_networks import dit, pixel_unet, text_unet

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)
SIZES = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
NETWORKS = {
    "mlp": lambda: (ResidualMLP(SHAPE, width=16, depth=1), VPCosine(), "v"),
    "unet": lambda: (UNet(SHAPE, width=8, depth=1), VPCosine(), "v"),
    "dit": lambda: (DiT(SHAPE, width=16, depth=1), VPCosine(), "v"),
    "ncsn++": lambda: (SongUNet(8, 3, 3, embedding_type="fourier", **SIZES), VE(), "edm"),
    "pixels": lambda: (pixel_unet(), VPCosine(), "v"),
    "fourier": lambda: (
        PixelUNet(pixel_unet(time_embedding_type="fourier").wrapped, ScoreCall(0.5)),
        VE(0.02, 1348),
        "eps",
    ),
    "text": lambda: (text_unet(), VPCosine(), "v"),
    "diffusers' dit": lambda: (dit(), VPCosine(), "v"),
}
SMOOTH = {
    "ddpm++": lambda: (SongUNet(8, 3, 3, **SIZES), VE(), "edm"),
    "adm": lambda: (DhariwalUNet(8, 3, 3, **SIZES), VE(), "edm"),
}


def made(name: str) -> Denoiser:
    torch.manual_seed(0)
    network, schedule, prediction = (NETWORKS | SMOOTH)[name]()
    for weight in network.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return Denoiser(network.eval(), schedule, prediction)


def inputs(f: Denoiser, channels: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor, Condition]:
    """Noisy images, their times, how these change with lam, and conditions."""
    low, high = f.schedule.lam_range
    lam = time(torch.linspace(max(low, -4), min(high, 4), size))
    t, dt = torch.func.jvp(f.schedule.t_of_lam, (lam,), (torch.ones_like(lam),))
    generator = torch.Generator().manual_seed(1)
    x_t = (1 + f.schedule.sigma(t)) * torch.randn(size, channels, 8, 8, generator=generator)
    return x_t, t, dt, Condition(torch.arange(size), text=torch.randn(size, 5, 6, generator=generator))


def change(f: Denoiser, channels: int, exact: bool = True) -> tuple[Tensor, Tensor]:
    """F and dF/dlam at constant x_t."""
    x_t, t, dt, c = inputs(f, channels)
    with torch.no_grad():
        return derivative(f.output, (x_t, t), (torch.zeros_like(x_t), dt), c, exact=exact)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- the fit ---------------------------------------------------------------------------------------------------------


class Monomials(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(a), a, a**2, a**3], dim=1)


@pytest.mark.parametrize("degree", [3, 8])
def test_polynomials_are_fitted_exactly(degree, float64):
    smooth, a = PolynomialFeatures(Monomials(), 0.5, 3.0, degree, False, CPU), torch.linspace(0.5, 3.0, 50)
    close(smooth(a), Monomials()(a), rtol=1e-10, atol=1e-10)


def test_logarithmic_features_are_polynomials_of_the_logarithm(float64):
    class Logarithmic(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return Monomials()(a.log())

    smooth, a = PolynomialFeatures(Logarithmic(), 0.02, 1348.0, 3, True, CPU), torch.logspace(-1.6, 3, 50)
    close(smooth(a), Logarithmic()(a), rtol=1e-9, atol=1e-9)


def test_the_fit_is_that_of_least_squares_with_chebyshev_weight(float64):
    """Against numpy's, on other nodes: roots of a Chebyshev polynomial of higher degree."""
    features, degree = TimeFeatures(), 8
    smooth = PolynomialFeatures(features, 0.0, 1.0, degree, False, CPU)
    v = np.polynomial.chebyshev.chebpts1(20_000)
    expected = np.polynomial.chebyshev.chebfit(v, features(torch.from_numpy((v + 1) / 2)).numpy(), degree)
    close(smooth.coefficients, torch.from_numpy(expected), rtol=0, atol=1e-9)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_changes_slowly_in_time(name):
    """Ten times slower than before, and so slowly that a difference over .01 is the derivative."""
    f = made(name)
    channels = 4 if name in ("text", "diffusers' dit") else 3
    before = [(k, v.clone()) for k, v in f.named_parameters()]
    F, rough = change(f, channels)
    G, slow = change(smooth_times(f), channels)
    assert slow.norm() / G.norm() < 0.1 * rough.norm() / F.norm()
    assert relative(change(f, channels, exact=False)[1], slow) < 2e-2
    assert relative(G, F) < 0.7  # even with random weights, whose output depends on the fast features
    for (key, old), (new_key, new) in zip(before, f.named_parameters(), strict=True):
        assert key == new_key and torch.equal(old, new)


@pytest.mark.parametrize("name", SMOOTH)
def test_a_network_that_is_smooth_stays_the_same(name):
    f = made(name)
    x_t, t, _, c = inputs(f, 3)
    with torch.no_grad():
        expected = f(x_t, t, c)
        close(smooth_times(f)(x_t, t, c), expected, rtol=0, atol=1e-4)


def test_a_copy_is_independent_and_takes_the_weights_of_another():
    f = made("ncsn++")
    student = smooth_times(copy.deepcopy(f))
    again = copy.deepcopy(student)
    x_t, t, _, _ = inputs(f, 3)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.1)
        rebuilt = smooth_times(copy.deepcopy(f))
        rebuilt.load_state_dict(student.state_dict())
        assert torch.equal(rebuilt(x_t, t), student(x_t, t))
        assert not torch.equal(again(x_t, t), student(x_t, t))
        assert not torch.equal(f(x_t, t), again(x_t, t))


def test_the_embedding_of_time_is_trained():
    f = smooth_times(made("mlp"))
    x_t, t, _, _ = inputs(f, 3)
    f(x_t, t).square().sum().backward()
    assert f.network.time[1].weight.grad.abs().sum() > 0


def test_times_of_another_schedule_are_those_of_the_network():
    """The fit is over the network's own times, whatever schedule it is read on."""
    f = made("ncsn++")
    vp = smooth_times(copy.deepcopy(f).on(VPCosine()))
    x_t, t, _, _ = inputs(f, 3)
    s = vp.schedule.t_of_lam(f.schedule.lam(t))
    with torch.no_grad():
        close(vp(x_t * vp.schedule.alpha(s), s), smooth_times(f)(x_t, t), rtol=0, atol=1e-3)


def test_rows_of_differences_are_counted():
    f = made("mlp")
    x_t, t, dt, c = inputs(f, 3)
    counter = f.counted.counter
    derivative(f, (x_t, t), (x_t, dt), c)
    assert (counter.rows, counter.rows_of_differences, counter.rows_along) == (24, 16, 0)
    derivative(f, (x_t, t), (x_t, dt), c, exact=True)
    assert (counter.rows_of_differences, counter.rows_along) == (16, 8)


def test_what_cannot_be_made_smooth_is_refused():
    with pytest.raises(UserError, match="Possible: mlp, unet, dit"):
        smooth_times(gaussian_teacher().denoiser)
    with pytest.raises(UserError, match="noise level of its small image"):
        smooth_times(Denoiser(text_unet(100, class_embed_type="timestep"), VPCosine(), "v"))
    with pytest.raises(ValueError, match="degree must be at least 1, got 0"):
        smooth_times(made("mlp"), 0)


# --- the scale of Fourier features ------------------------------------------------------------------------------------


def test_scaled_fourier_features_are_those_that_a_draw_with_that_scale_gives():
    """And in the network they are the only change: at time 0 all of them are what they were."""
    network = SongUNet(8, 3, 3, **SIZES | {"model_channels": 64}, embedding_type="fourier")
    f = Denoiser(network.eval(), VE(), "edm")
    torch.manual_seed(3)
    f.network.map_noise = Fourier(64)
    twin = scale_fourier(copy.deepcopy(f), 0.02)
    torch.manual_seed(3)
    drawn = 0.02 * torch.randn(32)
    a = torch.linspace(-1.5, 1.1, 7)
    angles = 2 * np.pi * np.outer(a.numpy(), drawn.numpy())
    found = twin.network.map_noise(a).numpy()
    np.testing.assert_allclose(found, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=1e-6)
    assert 0.01 < twin.network.map_noise.freqs.std() < 0.03 and 8 < f.network.map_noise.freqs.std() < 24
    x = torch.randn(2, 3, 8, 8)
    for weight in (*f.network.parameters(), *twin.network.parameters()):
        nn.init.constant_(weight, 0.1)
    assert torch.equal(f(x, time([1.0, 1.0])), twin(x, time([1.0, 1.0])))  # ln 1 / 4 = 0
    assert not torch.allclose(f(x, time([2.0, 3.0])), twin(x, time([2.0, 3.0])))
    scale_fourier(twin, 16.0)
    close(twin.network.map_noise.freqs, f.network.map_noise.freqs, rtol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "ddpm++", "adm", "fourier"])
def test_a_network_without_edm_s_fourier_features_has_no_scale(name):
    with pytest.raises(UserError, match=r"without EDM's Fourier features of time .*fourier_scale=0"):
        scale_fourier(made(name), 0.02)


def test_a_scale_of_zero_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        scale_fourier(made("ncsn++"), 0.0)
