"""SiD: score identity distillation. A one-step generator learns the teacher's distribution from its noised samples.

Zhou, Zheng, Wang, Yin & Huang 2024, "Score identity Distillation: Exponentially Fast Distillation of Pretrained
Diffusion Models for One-Step Generation", arXiv:2404.04057, as in the authors' code. Data-free. Noise levels are
EDM's, tau = sigma_t / alpha_t, so it works on any schedule: x_t = alpha_t (x + tau eps).

    x     = G(z) = D_G(sigma_t' z, t'),   tau_t' = sigma_init
    L_psi = E (1/tau^2 + 1/sd^2) | D_psi(x_t, t) - sg[x] |^2,   log tau ~ N(p_mean, p_std^2)
    L_G   = E d [ (D_phi(x_t, t) - x) - alpha d ] / sg[ mean|x - D_phi(x_t, t)| ],   d = D_phi(x_t, t) - D_psi(x_t, t)

L_G has gradients through x, and through x_t in both D_phi and D_psi, but updates only G. At the optimal psi, E[x given
x_t] = D_psi, so without its denominator L_G = (1 - alpha) E|d|^2: zero where the distributions agree and negative
elsewhere for alpha > 1. Its value does not measure progress. For images of a single pixel 1 / |x - D_phi| has no mean,
and training is erratic; for two or more pixels it has one.

| symbol         | meaning                                                                        | shape      |
|----------------|--------------------------------------------------------------------------------|------------|
| z, eps         | noise of the generator; noise of x_t                                           | (B,C,H,W)  |
| t, t'          | time of x_t, drawn for each image; time of the generator's input               | (B,1,1,1)  |
| x, x_t         | generated image; the same noised                                               | (B,C,H,W)  |
| D_phi          | teacher, E[x_0 given x_t, c], guided where c says so                           | (B,C,H,W)  |
| D_psi          | fake score network: denoiser of the generator's distribution, given c          | (B,C,H,W)  |
| D_G            | student as a denoiser; both start from the teacher's weights                   | (B,C,H,W)  |
| alpha          | of L_G (the schedule's is alpha_t)                                             | float      |
| sd             | standard deviation of the data                                                 | float      |
| c              | condition: class and guidance of the teacher                                   | of a batch |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, NetworkConfig, Teacher, UserError, hookimpl, option
from distillbench.diffusion import karras_times, time_like
from distillbench.networks import frozen_weights
from distillbench.options import require_between, require_positive

SMALLEST = 1e-5  # of the denominator of L_G, as released


class ScoreIdentityDistillation(Method):
    name = "sid"
    paper = "Zhou et al. 2024, arXiv:2404.04057"
    needs_data = False

    @dataclass
    class Config(MethodConfig):
        beta1: float = option(0.0, "Adam's first decay rate, as released")
        alpha: float = option(1.2, "alpha of L_G (released: 1.2, and 1.0 for AFHQ-v2)")
        sigma_init: float = option(2.5, "noise level of the generator's input")
        fake: NetworkConfig = option(NetworkConfig(grad_clip=0.0), "of the fake score; not clipped, as released")
        fake_updates: int = option(1, "updates of the fake score to one of the generator")
        sigma_min: float = option(0.002, "smallest noise level of L_G")
        sigma_max: float = option(80.0, "largest noise level of the Karras ramp of L_G")
        ramp_share: float = option(0.8, "L_G draws uniformly from this low share of its ramp (released: 800 of 1000)")
        rho: float = option(7.0, "curvature of the ramp, on which tau^(1/rho) is linear")
        p_mean: float = option(-1.2, "mean of log tau in L_psi (EDM's training)")
        p_std: float = option(1.2, "standard deviation of log tau in L_psi")
        sigma_data: float = option(0.5, "sd, standard deviation of the data")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "sigma_init", "fake_updates", "sigma_min", "sigma_max", "rho", "p_std", "sigma_data")
            require_between(self, -1, 2, "alpha")
            require_between(self, 1e-3, 1, "ramp_share")
            require_between(self, -20, 20, "p_mean")
            if self.sigma_min >= self.sigma_max:
                raise UserError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        self.fake = teacher.trainable_copy()
        schedule, rho = teacher.schedule, config.rho
        ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
        low, high = schedule.noise_level(ends).tolist()
        if not low <= config.sigma_init <= high:
            raise UserError(
                f"sigma_init must be a noise level of the schedule, {low:g} to {high:g}, got {config.sigma_init}"
            )
        self.t_init = schedule.t_of_lam(torch.tensor(math.log(config.sigma_init), dtype=torch.float64)).item()
        first, last = config.sigma_min ** (1 / rho), config.sigma_max ** (1 / rho)
        top = (first + config.ramp_share * (last - first)) ** rho  # 24.4 as released
        within = karras_times(schedule, 2, config.sigma_min, top, rho)  # as far as the schedule reaches
        self.ramp = (schedule.noise_level(within) ** (1 / rho)).tolist()

    def G(self, z: Tensor, c: Condition) -> Tensor:
        t = time_like(z, self.t_init)
        return self.student(self.teacher.schedule.sigma(t) * z, t, c)

    def generator_times(self, batch: Batch) -> Tensor:
        """t of L_G, (B,1,1,1): tau^(1/rho) is uniform."""
        return self.teacher.schedule.t_of_lam(self.config.rho * batch.uniform(*self.ramp).log())

    def fake_times(self, batch: Batch) -> Tensor:
        """t of L_psi, (B,1,1,1): log tau is normal, cut to the schedule's range."""
        normal = torch.special.ndtri(batch.uniform())
        return self.teacher.schedule.t_of_lam(self.config.p_mean + self.config.p_std * normal)

    def noised(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self.teacher.schedule.alpha(t) * x + self.teacher.schedule.sigma(t) * eps

    def fake_loss(self, x: Tensor, t: Tensor, eps: Tensor, c: Condition) -> Tensor:
        """L_psi of each pixel, (B,C,H,W)."""
        weight = self.teacher.schedule.noise_level(t) ** -2 + self.config.sigma_data**-2
        return weight.to(x.dtype) * (self.fake(self.noised(x, t, eps), t, c) - x).square()

    def identity(self, x: Tensor, t: Tensor, eps: Tensor, c: Condition) -> tuple[Tensor, Tensor]:
        """d [(D_phi - x) - alpha d] and the denominator of L_G: (B,C,H,W), (B,1,1,1)."""
        x_t = self.noised(x, t, eps)
        D_phi = self.teacher.denoise(x_t, t, c)
        with frozen_weights(self.fake):  # gradients reach x_t, not psi; no dropout
            d = D_phi - self.fake(x_t, t, c)
        scale = (x - D_phi).detach().abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=SMALLEST)
        return d * (D_phi - x - self.config.alpha * d), scale

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        for _ in range(self.config.fake_updates):
            c = batch.random_c()
            with torch.no_grad():  # and so without dropout
                x = self.G(batch.noise(), c)
            yield self.fake, self.fake_loss(x, self.fake_times(batch), batch.noise(), c).mean()
        c = batch.random_c()
        product, scale = self.identity(self.G(batch.noise(), c), self.generator_times(batch), batch.noise(), c)
        yield self.student, (product / scale).mean()

    def keeps_noise(self, nfe: int) -> bool:
        return False  # only the distribution is fitted

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        return self.G(noise(0), c)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(ScoreIdentityDistillation)
