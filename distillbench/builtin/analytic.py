"""Teachers in closed form: E[x_0 | x_t] of a Gaussian or of a Gaussian mixture, exact at every noise level.

They have no weights, so students get a network of their own: with fresh weights, or, with ``teacher.fit_images=N``,
with those that N draws of the law taught it by denoising score matching (what a trained teacher's weights would be).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distillbench import Denoiser, Teacher, TeacherConfig, TeacherSource, UserError, hookimpl, option
from distillbench.budget import BudgetConfig, Meter
from distillbench.builtin.trained import DenoisingTraining, TeacherTraining, network_of_size
from distillbench.conditions import Conditioning
from distillbench.datasets import to_float
from distillbench.denoiser import TARGETS
from distillbench.exact import ExactDenoiser
from distillbench.files import canonical_json, key_of, sha256_tensors
from distillbench.kept_tensors import read_tensors, write_tensors
from distillbench.laws import Gaussian, Law
from distillbench.networks import NETWORKS, SIZED
from distillbench.options import require_between, require_one_of
from distillbench.pairs import Workspace
from distillbench.progress import Progress
from distillbench.schedules import SCHEDULES
from distillbench.teachers import TeacherPlan
from distillbench.train import Loop, train

FIT_BATCH = 256
LARGEST_COVARIANCE = 4096  # values of an image


class Analytic(TeacherSource):
    """What both kinds of closed-form teachers share."""

    @dataclass
    class Config(TeacherConfig):
        schedule: str = option("vp_cosine", f"noise schedule: {', '.join(SCHEDULES)}")
        network: str = option("auto", "architecture of the students: mlp, unet, dit, or auto, as for teacher=trained")
        width: int = option(0, "channels; 0: the network's default (mlp 256, unet 64)")
        depth: int = option(0, "blocks; 0: the network's default (mlp 4, unet 2 a level)")
        prediction: str = option("v", f"what students predict: {', '.join(TARGETS)}")
        fit_images: int = option(0, "draws that the students' first weights are fitted to; 0: fresh weights")
        seed: int = option(0, "seed of the students' first weights")

        def __post_init__(self) -> None:
            require_one_of(self, "schedule", SCHEDULES)
            require_one_of(self, "network", ("auto", *SIZED))
            require_one_of(self, "prediction", TARGETS)
            require_between(self, 0, 65536, "width", "depth")
            require_between(self, 0, 2**63 - 1, "fit_images", "seed")

    @functools.cached_property
    @abstractmethod
    def law(self) -> Law:
        """The law of x_0; raises UserError where the dataset has none of this kind."""

    def plan(self) -> TeacherPlan:
        self.untrained()
        return TeacherPlan("in closed form", self.config.fit_images, self.config.fit_images)

    def untrained(self) -> Teacher:
        return self._teacher(self._first(), "untrained")

    def load(self, progress: Progress) -> Teacher:
        start = self._first()
        if self.config.fit_images:
            self._fit(start, progress)
        identity = canonical_json([self._recipe(), sha256_tensors(start.state_dict())])
        return self._teacher(start, hashlib.sha256(identity.encode()).hexdigest())

    def _recipe(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self.config)
        plain.pop("kind")
        return plain | {"fit_batch": FIT_BATCH, "classes": self.conditioning.classes, "law": self.law.plain()}

    def _first(self) -> nn.Module:
        """What students start from, before any fitting."""
        torch.manual_seed(self.config.seed)
        try:
            return self._blank()
        except ValueError as error:
            raise UserError(f"teacher.network: {error}") from error

    def _blank(self) -> nn.Module:
        config, shape = self.config, self.dataset.shape
        name, size = network_of_size(config.network, config.width, config.depth, shape)
        return NETWORKS[name](shape, classes=self.conditioning.classes, **size)

    def _teacher(self, start: nn.Module, sha256: str) -> Teacher:
        schedule = SCHEDULES[self.config.schedule]()
        return Teacher(
            self.name,
            ExactDenoiser(self.law, schedule).to(self.device),
            self.dataset.shape,
            sha256,
            self._recipe(),
            Conditioning(self.conditioning.classes),
            start=Denoiser(start.to(self.device), schedule, self.config.prediction),
            blank=self._blank,
        )

    def _fit(self, start: nn.Module, progress: Progress) -> None:
        """Give `start` the weights after fitting, from the cache or made now."""
        file = self.cache / f"{self.name}-{key_of(self._recipe())}.safetensors"
        try:
            start.load_state_dict(read_tensors(file))
            return
        except (ValueError, RuntimeError):
            pass  # not there, or damaged: it is made (again)
        teacher = self._teacher(start, "untrained")
        training = TeacherTraining(ema_halflife_kimg=self.config.fit_images / 10_000)
        method = DenoisingTraining(training, teacher).to(self.device)
        meter = Meter(BudgetConfig(images=self.config.fit_images), teacher, self.device)
        workspace = Workspace(teacher, meter, self.cache, self.device, self.config.seed, progress)
        generator, law = torch.Generator().manual_seed(self.config.seed), self.law

        def read(size: int) -> tuple[Tensor, Tensor]:
            x_0, component = law.draw(size, generator)
            return to_float(x_0).to(self.device), component

        with progress.step(f"students' first weights for teacher={self.name}") as step:
            train(method, training, workspace, read, Loop(FIT_BATCH), step)
        tensors = {k: v.detach().cpu().contiguous() for k, v in method.student.network.state_dict().items()}
        write_tensors(file, tensors)
        start.load_state_dict(tensors)


class GaussianTeacher(Analytic):
    """N(m, S) with the mean and the covariance of the dataset: the best linear denoiser of its images.

    For ``dataset=gmm`` the moments are those of the law, for others those of all images.
    """

    name = "gaussian"
    Config = Analytic.Config

    @functools.cached_property
    def law(self) -> Law:
        size = torch.Size(self.dataset.shape).numel()
        if self.conditioning.classes:
            raise UserError("teacher=gaussian is one Gaussian and knows no classes: conditional=true cannot be met")
        if size > LARGEST_COVARIANCE:
            raise UserError(
                f"teacher=gaussian holds a covariance: {size} values an image, at most {LARGEST_COVARIANCE}"
            )
        if self.dataset.law is not None:
            mean, covariance = self.dataset.law.moments()
        else:
            images = to_float(self.dataset.read(torch.arange(len(self.dataset)))).double().flatten(1)
            mean, covariance = images.mean(dim=0), torch.cov(images.T, correction=0).reshape(size, size)
        return Gaussian(mean.view(self.dataset.shape), covariance)


class GmmTeacher(Analytic):
    """The exact denoiser of the mixture that ``dataset=gmm`` draws from; its classes are the components."""

    name = "gmm"
    Config = Analytic.Config

    @functools.cached_property
    def law(self) -> Law:
        if self.dataset.law is None:
            raise UserError(f"teacher=gmm needs a dataset whose law is known (dataset=gmm), got {self.dataset.name}")
        return self.dataset.law


@hookimpl(api=1)
def register_teachers(register) -> None:
    register(GaussianTeacher)
    register(GmmTeacher)
