"""SiD: score identity distillation. A one-step generator learns the teacher's distribution from its noised samples.

Zhou, Zheng, Wang, Yin & Huang 2024, arXiv:2404.04057, as in the authors' code. Data-free. Noise levels are EDM's,
tau = sigma_t / alpha_t, so it works on any schedule: x_t = alpha_t (x + tau eps).

    x     = G(z) = D_G(sigma_t' z, t'),   tau_t' = sigma_init
    L_psi = E w |D_psi(x_t, t) - sg[x]|^2,   w = 1/tau^2 + 1/sd^2,   log tau ~ N(p_mean, p_std^2)
    L_G   = E d [ (D_phi(x_t, t) - x) - alpha d ] / m,   d = D_phi(x_t, t) - D_psi(x_t, t),   m = sg mean|x - D_phi|
    SiDA    L_psi += discriminator E[w] E[ softplus(-l(y_t)) + softplus(l(x_t)) ] / (2 CHW)
            L_G    = (L_G + adversarial E[1/m] E softplus(-l(x_t))) / 2,   l clamped to [-10, 10]

L_G has gradients through x, and through x_t in both D_phi and D_psi, but updates only G. At the optimal psi it is, but
for m, (1 - alpha) E|d|^2: no measure of progress. SiD-LSG (arXiv:2406.01561) guides D_psi like D_phi where it is fitted
(`guided_fit`: kappa_1) and in L_G (`guided_loss`: kappa_2 = kappa_3). SiDA (arXiv:2410.14919): l is the mean of a layer
of psi over channels, (B,...); y_t a real image y noised as x.

| symbol            | meaning                                                                            | shape     |
|-------------------|------------------------------------------------------------------------------------|-----------|
| z, eps; x, x_t    | noise of the generator, and of x_t and y_t; generated image, the same noised       | (B,C,H,W) |
| D_phi, D_psi, D_G | teacher, guided where c says so; fake score, of generated images given c; student  | (B,C,H,W) |
| t, t'; w, m       | time of x_t, of the generator's input; weight and denominator of each image        | (B,1,1,1) |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from distillbench import Batch, Condition, Method, MethodConfig, NetworkConfig, Phase, Teacher, UserError, hookimpl
from distillbench.diffusion import denoising_weight, guided, karras_time, karras_times, lognormal_time, time_like
from distillbench.networks import frozen_weights
from distillbench.options import Among, Between, option, require_between, require_positive


class ScoreIdentityDistillation(Method):
    name, label, title = "sid", "SiD", "score identity distillation"
    paper = "Zhou et al. 2024, arXiv:2404.04057"
    reads_data = classmethod(lambda cls, config: config.adversarial > 0)
    needs_data, inputs = False, "noise"  # real images train the fake score only

    @dataclass
    class Config(MethodConfig):
        lr: float = option(1e-3, "peak learning rate of Adam", search=Between(3e-4, 1e-2, log=True))
        beta1: float = option(0.0, "Adam's first decay rate, as released", search=Among([0.0, 0.5, 0.9]))
        alpha: float = option(1.2, "alpha of L_G (released: 1.2; SiD-LSG and SiDA: 1.0)", search=Between(0.75, 1.25))
        sigma_init: float = option(2.5, "noise level of the generator's input", search=Between(1.0, 20.0, log=True))
        fake: NetworkConfig = option(NetworkConfig(grad_clip=0.0), "of the fake score; not clipped, as released")
        fake_updates: int = option(1, "updates of the fake score to one of the generator")
        guided_fit: bool = option(False, "guide the fake score like the teacher where it is fitted (SiD-LSG)")
        guided_loss: bool = option(False, "guide the fake score like the teacher in L_G (SiD-LSG)")
        adversarial: float = option(0.0, "weight of the adversarial term of L_G; 0: none, data-free (SiDA: 1e-4)")
        generator_start: float = option(0.0, "share of training before G's first update (SiDA: 100,000 images)")
        adversarial_start: float = option(0.0, "share of it before L_G's adversarial term joins (SiDA: 200,000 images)")
        discriminator: float = option(1.0, "weight of the discriminator's loss, as released")
        augment: float = option(0.0, "probability of each of EDM's transformations of x and y in L_psi (released: .12)")
        layer: str = option("", "submodule of the network whose output's mean over channels is the discriminator")
        sigma_min: float = option(0.002, "smallest noise level of L_G")
        sigma_max: float = option(80.0, "largest noise level of the Karras ramp of L_G")
        ramp_share: float = option(0.8, "low share of its ramp that L_G draws (released: .8)", search=Between(0.5, 1.0))
        rho: float = option(7.0, "curvature of the ramp, on which tau^(1/rho) is linear")
        p_mean: float = option(-1.2, "mean of log tau in L_psi (EDM's training)")
        p_std: float = option(1.2, "standard deviation of log tau in L_psi")
        sigma_data: float = option(0.5, "sd, standard deviation of the data")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "sigma_init", "fake_updates", "sigma_min", "sigma_max", "rho", "p_std", "sigma_data")
            require_between(self, -1, 2, "alpha")
            require_between(self, 0, 1e6, "adversarial", "discriminator")
            require_between(self, 1e-3, 1, "ramp_share")
            require_between(self, 0, 1, "augment", "generator_start", "adversarial_start")
            require_between(self, -20, 20, "p_mean")
            require_between(self, 0, self.sigma_max, "sigma_min")
            if self.adversarial and (not self.layer or self.guided_fit or self.guided_loss):
                raise UserError("adversarial needs a layer, and does not go with guided_fit and guided_loss")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        self.fake, schedule, rho, share = teacher.trainable_copy(), teacher.schedule, config.rho, config.ramp_share
        self.t_init = schedule.time_of_level(config.sigma_init, "sigma_init")
        top = (config.sigma_min ** (1 / rho) * (1 - share) + config.sigma_max ** (1 / rho) * share) ** rho  # 24.4
        self.starts = sorted({0.0, config.generator_start, config.adversarial_start})  # of phases
        self.low, self.high = schedule.noise_level(karras_times(schedule, 2, config.sigma_min, top, rho)).tolist()

    def phases(self) -> list[Phase]:
        return Phase.starting_at(self.starts)

    def G(self, z: Tensor, c: Condition) -> Tensor:
        return self.student(self.teacher.schedule.sigma(t := time_like(z, self.t_init)) * z, t, c)

    def D_psi(self, x_t: Tensor, t: Tensor, c: Condition, guide: bool, f_gradient: bool = True) -> tuple:
        """D_psi(x_t, t), guided if `guide`, and l(x_t), None without a discriminator."""
        if not self.config.adversarial:
            return guided(self.fake, self.teacher.conditioning, x_t, t, c) if guide else self.fake(x_t, t, c), None
        D, features = self.fake.features([self.config.layer], x_t, t, c, f_gradient=f_gradient)
        return D, (h := features[self.config.layer]).mean(dim=-1 if h.ndim == 3 else 1)  # of tokens: (B,N,C)

    def fake_loss(self, x: Tensor, c: Condition, t: Tensor, eps: Tensor, real: tuple | None = None) -> Tensor:
        """L_psi, with the discriminator's loss for real images y and their condition."""
        schedule, config = self.teacher.schedule, self.config
        w = denoising_weight(schedule, t, config.sigma_data).to(x.dtype)
        D_psi, l_x = self.D_psi(schedule.noised(x, t, eps), t, c, config.guided_fit)
        loss = (w * (D_psi - x).square()).mean()
        if real is not None:
            _, l_y = self.D_psi(schedule.noised(real[0], t, eps), t, real[1], False, f_gradient=False)
            loss = loss + config.discriminator * w.mean() * softplus(torch.cat([-l_y, l_x])).mean() / x[0].numel()
        return loss

    def identity(self, x: Tensor, t: Tensor, eps: Tensor, c: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """d [(D_phi - x) - alpha d], m and l(x_t): (B,C,H,W), (B,1,1,1), (B,...)."""
        D_phi = self.teacher.denoise(x_t := self.teacher.schedule.noised(x, t, eps), t, c)
        with frozen_weights(self.fake):  # gradients reach x_t, not psi; no dropout
            D_psi, l_x = self.D_psi(x_t, t, c, self.config.guided_loss)
        d = D_phi - D_psi
        m = (x - D_phi).detach().abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5)  # as released
        return d * (D_phi - x - self.config.alpha * d), m, l_x

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        config, schedule = self.config, self.teacher.schedule
        for _ in range(config.fake_updates):
            c = batch.c if config.adversarial else batch.random_c(drop=0.1 if config.guided_fit else 0)  # as released
            with torch.no_grad():  # and so without dropout
                x = self.G(batch.noise(), c)
            t = lognormal_time(schedule, batch.uniform(), config.p_mean, config.p_std)
            real = batch.augmented(batch.x_0, c, config.augment) if config.adversarial else None
            yield self.fake, self.fake_loss(*batch.augmented(x, c, config.augment), t, batch.noise(), real)
        if self.starts[batch.phase] < config.generator_start:
            return
        c = batch.random_c()
        x, t = self.G(batch.noise(), c), karras_time(schedule, batch.uniform(), self.low, self.high, config.rho)
        product, m, l_x = self.identity(x, t, batch.noise(), c)
        loss = (product / m).mean()
        if config.adversarial and self.starts[batch.phase] >= config.adversarial_start:
            loss = (loss + config.adversarial * (1 / m).mean() * softplus(-l_x.clamp(-10, 10)).mean()) / 2  # released
        yield self.student, loss

    def keeps_noise(self, nfe: int) -> bool:
        return False  # only the distribution is fitted

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        return self.G(noise(0), c)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(ScoreIdentityDistillation)
