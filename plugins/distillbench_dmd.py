"""DMD: distribution matching distillation. The student's samples get the teacher's distribution, not its mapping.

Yin, Gharbi, Park, Zhang, Shechtman, Durand & Freeman 2024, "Improved Distribution Matching Distillation for Fast Image
Synthesis" (DMD2), arXiv:2405.14867, as in the authors' code; the gradient is that of DMD, Yin et al. 2023,
arXiv:2311.18828. Noise levels are EDM's, tau = sigma_t / alpha_t, so x_t = alpha_t (x + tau eps) on any schedule.

    x     = G(x_s, s),   x_s from the student's own chain: noise at its highest level s, or its last image noised to s
    L_psi = E (1/tau^2 + 1/sd^2) | D_psi(x_t, t) - sg[x] |^2                        in every step
    L_G   = E | x - sg[x - g] |^2 / 2,   whose gradient in x is g                   in every `fake_updates`-th step
    g     = w (D_psi(x_t, t) - D_phi(x_t, t)),   w = 1 / mean|x - D_phi(x_t, t)| of each image

Both denoisers see the same x_t. With w = 1/tau^2 the gradient is that of KL(p_G,t | p_phi,t), and with any w > 0 it is
zero where these agree. w = 1 and `fake_updates` = 1 are Diff-Instruct (Luo et al. 2023, arXiv:2305.18455). With
`gan_weight` a head h on features of D_psi tells x_t from noised real images y_t: L_G gains E softplus(-h(x_t)) times
that weight, and L_psi E softplus(h(x_t)) + softplus(-h(y_t)) times `fake_gan_weight`.

| symbol | meaning                                                                           | shape      |
|--------|-----------------------------------------------------------------------------------|------------|
| x, k   | image of the student after its steps 0, ..., k, k drawn for each image            | (B,C,H,W)  |
| t, s   | time of x_t, drawn for each image; time of the student's input                    | (B,1,1,1)  |
| D_phi  | teacher, E[x_0 given x_t, c], guided where c says so                              | (B,C,H,W)  |
| D_psi  | fake score, denoiser of what step k makes given c; starts as the teacher          | (B,C,H,W)  |
| h      | logit of the discriminator                                                        | (B,1)      |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from distillbench import Batch, Condition, Method, MethodConfig, NetworkConfig, Phase, Teacher, hookimpl, option
from distillbench.diffusion import chain_times, denoising_loss, karras_time, lognormal_time, mean_square, rollout
from distillbench.networks import FakeScore, frozen_weights
from distillbench.options import Among, Between, require_between, require_one_of, require_positive

TIMES = {  # t from the schedule and a uniform draw
    "karras": functools.partial(karras_time, low=0.002, high=80.0),
    "lognormal": functools.partial(lognormal_time, p_mean=-1.2, p_std=1.2),
}
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # w from |x - D_phi| and tau
    "dmd": lambda error, tau: 1 / error.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5),
    "released": lambda error, tau: 1 / error.mean(dim=(1, 2, 3), keepdim=True),
    "one": lambda error, tau: torch.ones_like(tau),
    "kl": lambda error, tau: tau**-2,
}


class DistributionMatching(Method):
    name, label, title = "dmd", "DMD", "distribution matching distillation"
    paper = "Yin et al. 2024, arXiv:2405.14867"
    needs_data = False
    reads_data = classmethod(lambda cls, config: config.gan_weight > 0)
    inputs = property(lambda self: "rollout" if len(self.times) > 1 else "noise")

    @dataclass
    class Config(MethodConfig):
        lr: float = option(1e-3, "peak learning rate of Adam", search=Between(3e-4, 1e-2, log=True))
        levels: list[float] = option([80.0], "noise levels of the student's steps, falling; as many as it has steps")
        mixture: bool = option(False, "the fake score is of the mixture of all steps (published), and not of each step")
        fake_updates: int = option(5, "updates of the fake score to one of the student", search=Among([2, 5, 10]))
        shared: bool = option(False, "both updates of a step use the same images, the student's first (as released)")
        weight: str = option("dmd", "w: dmd, released (no floor), one, kl, 1/tau^2", search=Among(["dmd", "one", "kl"]))
        times: str = option("karras", "t: uniform on Karras's ramp, or lognormal (Diff-Instruct)", search=Among(TIMES))
        margin: float = option(0.02, "share of times at each end that L_G leaves out", search=Among([0.0, 0.02, 0.1]))
        gan_weight: float = option(0.0, "of the student's adversarial loss (published: 3e-3); 0: none, data-free")
        fake_gan_weight: float = option(0.01, "of the discriminator's loss")
        layer: str = option("", "submodule of the network whose output the discriminator gets")
        fake: NetworkConfig = option(NetworkConfig(), "of the fake score", search={"lr": Among([None, 1e-3, 4e-3])})

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "weight", WEIGHTS)
            require_one_of(self, "times", TIMES)
            require_positive(self, "fake_updates")
            require_between(self, 0, 1e6, "gan_weight", "fake_gan_weight")
            require_between(self, 0, 0.49, "margin")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        self.times = chain_times(teacher.schedule, config.levels)
        steps, layer = 1 if config.mixture else len(self.times), config.layer if config.gan_weight else None
        self.fake = FakeScore(teacher.trainable_copy(), steps, layer, teacher.shape, teacher.conditioning)

    def phases(self) -> list[Phase]:
        return [Phase(cycle=self.config.fake_updates)]

    def time(self, batch: Batch, margin: float = 0.0) -> Tensor:
        return TIMES[self.config.times](self.teacher.schedule, batch.uniform(margin, 1 - margin))

    def chain(self, noise: Callable[[], Tensor], k: Tensor | int, c: Condition) -> Tensor:
        """x, with gradient in the last of its k + 1 steps."""
        G = lambda x_s, s: self.student(x_s, s, c)
        return G(*rollout(G, self.teacher.schedule, self.times, noise, k))

    def h(self, x: Tensor, k: Tensor, batch: Batch, c: Condition) -> Tensor:
        return self.fake.logits(self.teacher.schedule.noised(x, t := self.time(batch), batch.noise()), t, k, c)

    def fake_loss(self, x: Tensor, k: Tensor, batch: Batch, c: Condition) -> Tensor:
        e = self.fake.embedding(k)
        loss = denoising_loss(self.fake.denoiser, x, self.time(batch), batch.noise(), c, embedding=e)
        if self.config.gan_weight:
            told_apart = softplus(self.h(x, k, batch, c)) + softplus(-self.h(batch.x_0, k, batch, batch.c))
            loss = loss + self.config.fake_gan_weight * told_apart.mean()
        return loss

    def g(self, x: Tensor, k: Tensor, t: Tensor, eps: Tensor, c: Condition) -> Tensor:
        with torch.no_grad():
            x_t, tau = self.teacher.schedule.noised(x, t, eps), self.teacher.schedule.noise_level(t).to(x.dtype)
            D_phi, D_psi = self.teacher.denoise(x_t, t, c), self.fake(x_t, t, k, c)
            g = WEIGHTS[self.config.weight]((x - D_phi).abs(), tau) * (D_psi - D_phi)
            return g.nan_to_num() if self.config.weight == "released" else g

    def student_loss(self, x: Tensor, k: Tensor, batch: Batch, c: Condition) -> Tensor:
        g = self.g(x, k, self.time(batch, self.config.margin), batch.noise(), c)
        loss = mean_square(x, (x - g).detach(), 0.5)
        if self.config.gan_weight:
            with frozen_weights(self.fake):  # gradients reach x, not psi; no dropout
                loss = loss + self.config.gan_weight * softplus(-self.h(x, k, batch, c)).mean()
        return loss

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        due, shared = batch.step % self.config.fake_updates == 0, self.config.shared
        c, k = batch.random_c(), batch.integers(0, len(self.times))
        with torch.set_grad_enabled(due and shared):  # without gradients there is no dropout
            x = self.chain(batch.noise, k, c)
        if due and shared:
            yield self.student, self.student_loss(x, k, batch, c)
        yield self.fake, self.fake_loss(x.detach(), k, batch, c)
        if due and not shared:
            c, k = batch.random_c(), batch.integers(0, len(self.times))
            yield self.student, self.student_loss(self.chain(batch.noise, k, c), k, batch, c)

    def supports(self, nfe: int) -> bool:
        return 1 <= nfe <= len(self.times)

    def keeps_noise(self, nfe: int) -> bool:
        return False  # only the distribution is fitted

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        return self.chain(map(noise, range(nfe)).__next__, nfe - 1, c)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(DistributionMatching)
