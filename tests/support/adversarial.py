"""adversarial.py: a fake score, and a discriminator that gets its features (DMD2 with one student evaluation)."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import softplus

from distillbench import Method, MethodConfig, NetworkConfig, option
from distillbench.diffusion import time_like, x_at_t_max
from distillbench.networks import frozen_weights


class Adversarial(Method):
    """The student matches the teacher's distribution, and its noised images the features of noised real ones."""

    name, paper, needs_data = "adversarial", "Yin et al. 2024, arXiv:2405.14867", True

    @dataclass
    class Config(MethodConfig):
        layer: str = option("blocks.0", "submodule of the network whose output the discriminator gets")
        weight: float = option(0.01, "of the adversarial losses")
        head: NetworkConfig = option(NetworkConfig(lr=1e-4, beta1=0.0), "of the discriminator")

    def __init__(self, config, teacher):
        super().__init__(config, teacher)
        self.fake = teacher.trainable_copy()
        shape = self.fake.feature_shapes([config.layer], teacher.shape, teacher.conditioning)[config.layer]
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 16), nn.SiLU(), nn.Linear(16, 1))

    def g(self, z, c):
        schedule = self.teacher.schedule
        return self.student(x_at_t_max(schedule, z), time_like(z, schedule.t_max), c)

    def noised(self, x, batch):
        schedule, t = self.teacher.schedule, batch.uniform(0.02, 0.98)  # VP, flow: t from 0 to 1
        return schedule.noised(x, t, batch.noise()), t

    def logits(self, x_t, t, c):
        """The discriminator's of noised images, (B,1). The fake score's own answer is not used."""
        _, features = self.fake.features([self.config.layer], x_t, t, c, f_gradient=False)
        return self.head(features[self.config.layer])

    def told_apart(self, generated, real):
        return softplus(generated).mean() + softplus(-real).mean()

    def train_step(self, batch):
        c, w, layer = batch.c, self.config.weight, self.config.layer
        with torch.no_grad():
            x = self.g(batch.noise(), c)
        (x_t, t), real = self.noised(x, batch), (*self.noised(batch.x_0, batch), c)
        f, features = self.fake.features([layer], x_t, t, c)  # both are used: one evaluation
        yield self.fake, (f - x).square().mean() + w * self.told_apart(self.head(features[layer]), self.logits(*real))
        with torch.no_grad():
            (_, ours), (_, theirs) = (self.fake.features([layer], *each) for each in ((x_t, t, c), real))
        yield self.head, self.told_apart(self.head(ours[layer]), self.head(theirs[layer]))
        x = self.g(batch.noise(), c)
        x_t, t = self.noised(x, batch)
        with torch.no_grad():
            towards = self.teacher.denoise(x_t, t, c) - self.fake(x_t, t, c)
        with frozen_weights(self.fake), frozen_weights(self.head):  # gradients reach x_t
            realism = softplus(-self.logits(x_t, t, c)).mean()
        yield self.student, (x - (x + towards).detach()).square().mean() + w * realism

    def keeps_noise(self, nfe):
        return False

    def sample(self, noise, nfe, c):
        return self.g(noise(0), c)
