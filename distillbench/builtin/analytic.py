"""Teachers in closed form: E[x_0 | x_t] of a Gaussian or a Gaussian mixture, exact at every noise level.

They have no weights. Students start from a network with random weights, or, with ``teacher.fit_images=N``, from one
that is first trained by denoising score matching on N samples of the distribution, like a trained teacher.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillbench import Denoiser, Teacher, TeacherConfig, TeacherSource, UserError, hookimpl, option
from distillbench.builtin.trained import DenoisingTraining, TeacherTraining, network_of_size
from distillbench.datasets.dataset import to_float
from distillbench.diffusion.conditioning import Conditioning
from distillbench.diffusion.denoiser import TARGETS
from distillbench.diffusion.distributions import Distribution, Gaussian
from distillbench.diffusion.exact_denoiser import ExactDenoiser
from distillbench.diffusion.schedules import SCHEDULES
from distillbench.networks.architectures import NETWORKS, SIZED
from distillbench.options import require_between, require_one_of
from distillbench.storage.checksummed import read_tensors, write_tensors
from distillbench.storage.files import canonical_json, key_of, sha256_tensors
from distillbench.system.progress import Progress
from distillbench.teachers.teacher import TeacherPlan
from distillbench.training.budget import BudgetConfig, Meter
from distillbench.training.loop import Loop, train
from distillbench.training.pairs import Workspace

FIT_BATCH = 256
LARGEST_COVARIANCE = 4096  # most values of an image


class Analytic(TeacherSource):
    """The common part of both closed-form teachers."""

    @dataclass
    class Config(TeacherConfig):
        schedule: str = option("vp_cosine", f"noise schedule: {', '.join(SCHEDULES)}")
        network: str = option("auto", "architecture of the students: mlp, unet, dit, or auto, as in teacher=trained")
        width: int = option(0, "channels; 0: the network's default (mlp 256, unet 64)")
        depth: int = option(0, "blocks; 0: the network's default (mlp 4, unet 2 per level)")
        prediction: str = option("v", f"what students predict: {', '.join(TARGETS)}")
        fit_images: int = option(0, "samples that the students' initial weights are trained on; 0: random weights")
        seed: int = option(0, "seed of the students' initial weights")

        def __post_init__(self) -> None:
            require_one_of(self, "schedule", SCHEDULES)
            require_one_of(self, "network", ("auto", *SIZED))
            require_one_of(self, "prediction", TARGETS)
            require_between(self, 0, 65536, "width", "depth")
            require_between(self, 0, 2**63 - 1, "fit_images", "seed")

    @functools.cached_property
    @abstractmethod
    def distribution(self) -> Distribution:
        """The distribution of x_0. Raises UserError if the dataset has none of this kind."""

    def plan(self) -> TeacherPlan:
        self.untrained()
        images = self.config.fit_images
        images = 0 if images and self._fitted.is_file() else images
        return TeacherPlan("in closed form", images, images, FIT_BATCH, setting="teacher.fit_images")

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
        return plain | {"fit_batch": FIT_BATCH, "classes": self.conditioning.classes, "law": self.distribution.plain()}

    def _first(self) -> nn.Module:
        """The students' initial network before any training."""
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
            ExactDenoiser(self.distribution, schedule).to(self.device),
            self.dataset.shape,
            sha256,
            self._recipe(),
            Conditioning(self.conditioning.classes),
            start=Denoiser(start.to(self.device), schedule, self.config.prediction),
            blank=self._blank,
        )

    @property
    def _fitted(self) -> Path:
        """The file of the students' initial weights, where it is cached."""
        return self.cache / f"{self.name}-{key_of(self._recipe())}.safetensors"

    def _fit(self, start: nn.Module, progress: Progress) -> None:
        """Load the trained initial weights into `start`, from the cache or by training now."""
        file = self._fitted
        try:
            start.load_state_dict(read_tensors(file))
            return
        except (ValueError, RuntimeError):
            pass  # missing or damaged: train (again)
        teacher = self._teacher(start, "untrained")
        training = TeacherTraining(ema_halflife_kimg=self.config.fit_images / 10_000)
        method = DenoisingTraining(training, teacher).to(self.device)
        meter = Meter(BudgetConfig(images=self.config.fit_images), teacher, self.device)
        workspace = Workspace(teacher, meter, self.cache, self.device, self.config.seed, progress)
        generator, distribution = torch.Generator().manual_seed(self.config.seed), self.distribution

        def read(size: int) -> tuple[Tensor, Tensor]:
            x_0, component = distribution.draw(size, generator)
            return to_float(x_0).to(self.device), component

        with progress.step(f"students' initial weights for teacher={self.name}") as step:
            train(method, training, workspace, read, Loop(FIT_BATCH), step)
        tensors = {k: v.detach().cpu().contiguous() for k, v in method.student.network.state_dict().items()}
        write_tensors(file, tensors)
        start.load_state_dict(tensors)


class GaussianTeacher(Analytic):
    """N(m, S) with the mean and covariance of the dataset: the best linear denoiser of its images.

    For ``dataset=gmm`` these are the exact moments, for other datasets the moments of all images.
    """

    name = "gaussian"
    Config = Analytic.Config

    @functools.cached_property
    def distribution(self) -> Distribution:
        size = torch.Size(self.dataset.shape).numel()
        if self.conditioning.classes:
            raise UserError(
                "teacher=gaussian is a single Gaussian without classes and does not support conditional=true"
            )
        if size > LARGEST_COVARIANCE:
            raise UserError(
                f"teacher=gaussian stores a covariance: images have {size} values, at most {LARGEST_COVARIANCE}"
            )
        if self.dataset.distribution is not None:
            mean, covariance = self.dataset.distribution.moments()
        else:
            images = to_float(self.dataset.read(torch.arange(len(self.dataset)))).double().flatten(1)
            mean, covariance = images.mean(dim=0), torch.cov(images.T, correction=0).reshape(size, size)
        return Gaussian(mean.view(self.dataset.shape), covariance)


class GmmTeacher(Analytic):
    """The exact denoiser of the mixture of ``dataset=gmm``. Classes are the components."""

    name = "gmm"
    Config = Analytic.Config

    @functools.cached_property
    def distribution(self) -> Distribution:
        if self.dataset.distribution is None:
            raise UserError(
                f"teacher=gmm needs a dataset with a known distribution (dataset=gmm), got {self.dataset.name}"
            )
        return self.dataset.distribution


@hookimpl(api=2)
def register_teachers(register) -> None:
    register(GaussianTeacher)
    register(GmmTeacher)
