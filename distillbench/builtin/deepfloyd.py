"""DeepFloyd IF, a cascade in pixel space: a base that makes 64x64 images from texts, and an upscaler to 256x256.

    stage 1:  f(x_t, t, text)                           text: T5's, 77 tokens
    stage 2:  f(x_t, t, text, y),   y = a B(base(eps, text)) + b n

| symbol | meaning                                                                        | shape     |
|--------|--------------------------------------------------------------------------------|-----------|
| base   | stage 1 or its student, with its own noise                                     | (B,C,h,w) |
| B      | bilinear upsampling with align_corners=True                                    | (B,C,H,W) |
| n      | augmentation noise, drawn together with eps                                    | (B,C,H,W) |
| a, b   | alpha, sigma of the `image_noising_scheduler` at the index `noise_level`       |           |
| y      | ``c.image``                                                                    | (B,C,H,W) |

The stages are distilled one after the other: stage 1, its export, then stage 2 with ``teacher.base=`` the export.
Evaluations of the base count as the teacher's, because it is frozen. They happen before sampling, so no row's nfe
contains them.

The variance that both networks predict is ignored. Data predictions are thresholded as in the scheduler's config
(Saharia et al. 2022, section 2.3, with the maximum that diffusers adds).

At t = 1 IF's schedule has alpha = 5e-5, so that errors of the predicted noise are multiplied by 20,000 in the data
prediction, which ruins one-step students. ``t_max=.981`` ends the schedule where diffusers' 50 steps begin, at
1 / alpha = 34. A method's own ``schedule`` can do the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distillbench import Denoiser, Teacher, UserError, hookimpl, option
from distillbench.builtin.diffusers_pipelines import (
    Index,
    PipelineConfig,
    blank_component,
    check_component,
    identity,
    load_component,
    read_json,
    read_schedule,
    unread_settings,
)
from distillbench.builtin.stable_diffusion import TextEncoder, TextPipeline
from distillbench.diffusion.conditioning import Condition, Conditioning, Texts
from distillbench.diffusion.denoiser import Counter
from distillbench.diffusion.samplers import TIME_GRIDS, ddim
from distillbench.diffusion.schedules import NoiseSchedule
from distillbench.networks.diffusers_wrappers import TextUNet
from distillbench.options import require_between, require_one_of
from distillbench.storage.files import canonical_json
from distillbench.system.progress import Progress
from distillbench.teachers.diffusers_schedulers import SchedulerReading, read_config, with_defaults
from distillbench.teachers.encoded_prompts import PlaceholderPrompts
from distillbench.teachers.teacher import TeacherPlan

STUDENT_TIMES = 2  # most timesteps in the scheduler of an exported one-step student
NOISING = "image_noising_scheduler"
GRID = "leading"  # time grid of a base with several steps
AT_ONCE = 64  # batch size of the base


# --- the base --------------------------------------------------------------------------------------------------------


class BaseImages:
    """The upscaler's input images, computed by `base` from noise: C channels of eps for the base, then n, reshaped.

    As in diffusers, the base starts from eps and not from sigma_t eps. `noising` is the schedule of n and its time.
    """

    def __init__(
        self,
        base: Teacher,
        times: Tensor,
        w: float,
        side: tuple[int, int],
        noising: tuple[NoiseSchedule, float],
    ) -> None:
        channels, height, width = base.shape
        self.base, self.times, self.w, self.side, self.noising = base, times, w, side, noising
        self.shape = (channels * (1 + side[0] * side[1] // (height * width)), height, width)

    def __deepcopy__(self, memo: dict) -> BaseImages:
        return self

    @torch.no_grad()
    def __call__(self, eps: Tensor, c: Condition) -> Tensor:
        channels = self.base.shape[0]
        parts = [
            self._small(eps[first : first + AT_ONCE, :channels], c[first : first + AT_ONCE])
            for first in range(0, len(eps), AT_ONCE)
        ]
        small = torch.cat(parts)
        large = interpolate(small, self.side, mode="bilinear", align_corners=True)
        n = eps[:, channels:].reshape(large.shape)
        schedule, time = self.noising
        t = torch.full((len(eps), 1, 1, 1), time, dtype=torch.float64, device=eps.device)
        return schedule.alpha(t) * large + schedule.sigma(t) * n

    def _small(self, eps: Tensor, c: Condition) -> Tensor:
        """The base's images for the condition `c`, (B,C,h,w) in [-1, 1]."""
        w = None if self.w == 1 else eps.new_full((len(eps), 1, 1, 1), self.w)
        asked = Condition(c.labels, w, text=c.text)
        return ddim(partial(self.base.denoise, c=asked), self.base.schedule, eps, self.times).clamp(-1, 1)


# --- the teacher -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """A pipeline of the cascade, as its configs describe it."""

    index: Index
    reading: SchedulerReading
    shape: tuple[int, int, int]  # C,H,W of its images
    variant: str
    local: bool  # a local folder, not on the hub
    student: bool  # a one-step student


class DeepFloyd(TextPipeline):
    """A stage of a cascade with DeepFloyd IF's layout. The upscaler is conditioned on images of a base."""

    name = "deepfloyd"
    encoders = ("T5EncoderModel",)
    families = ("discrete",)

    @dataclass
    class Config(PipelineConfig):
        stage: int = option(1, "1: the base, from texts to images; 2: the upscaler")
        base: str = option("", "for stage 2: folder of stage 1, or of an exported one-step student of it", path=True)
        base_steps: int = option(50, "DDIM steps of a base that is stage 1; a student takes one step")
        base_guidance: float = option(7.0, "guidance weight w of a base that is stage 1; a student has it built in")
        t_max: float = option(1.0, "largest time; below 1 avoids that one-step students divide by alpha = 1/20,000")
        noise_level: int = option(250, f"noise added to the upscaler's input, an index of the {NOISING}")
        text: str = option("", "folder with the tokenizer and text encoder; empty: path, or base", path=True)

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "stage", (1, 2))
            require_between(self, 1, 1000, "base_steps")
            require_between(self, 0.01, 1, "t_max")
            require_between(self, 0, float("inf"), "base_guidance", "noise_level")
            if (self.stage == 2) != bool(self.base):
                wanted = "stage=2 needs base=FOLDER, which generates the images to upscale"
                raise UserError(wanted if self.stage == 2 else f"base is a setting of stage=2, got stage={self.stage}")

    @property
    def fits_data(self) -> bool:
        return self.config.stage == 1

    def plan(self) -> TeacherPlan:
        stages = self._stages(weights=False)
        encoder = self._encoder(stages, weights=False)
        self._unread = [note for stage in stages for note in unread_settings(stage.index, ("unet",))]
        for stage in stages:
            if stage.local:
                self._unread += check_component(stage.index, "unet", stage.variant)
        if encoder.index.folder.is_dir() and all(stage.local for stage in stages):
            encoder.check()
        return TeacherPlan(" on ".join(stage.index.name for stage in stages))

    def untrained(self) -> Teacher:
        stages = self._stages(weights=False)
        encoder = self._encoder(stages, weights=False)
        texts = PlaceholderPrompts(encoder.length, encoder.width)
        return self._cascade(stages, texts, lambda stage: blank_component(stage.index, "unet"), "untrained")

    def load(self, progress: Progress) -> Teacher:
        stages = self._stages(weights=True)
        encoder = self._encoder(stages, weights=True)
        texts = self._encoded(encoder, progress)
        known = [[identity(s.index, ["unet"], s.variant, s.reading), s.reading.plain] for s in stages]
        recipe = [known, encoder.sha256, self._settings(stages)]
        sha256 = hashlib.sha256(canonical_json(recipe).encode()).hexdigest()
        read = lambda stage: load_component(stage.index, "unet", stage.variant)
        teacher = self._cascade(stages, texts, read, sha256)
        return dataclasses.replace(teacher, encode=encoder, offloaded=(encoder.offloaded,))

    # --- reading the configs ---

    def _stages(self, weights: bool) -> list[_Stage]:
        """The teacher's stage and, for an upscaler, its base. Raises UserError if they do not fit each other."""
        self._prompts()
        config = self.config
        _, height, width = self.dataset.shape
        wanted: tuple[str, ...] = ("unet",) if config.text else ("unet", "text_encoder")
        wanted = wanted if weights else ()
        stage = self._stage(config.path, config.variant, self.dataset.shape, wanted)
        schedule = stage.reading.schedule
        top = schedule.lam(torch.tensor(config.t_max, dtype=torch.float64)).item()
        reading = dataclasses.replace(stage.reading, schedule=schedule.restricted(-math.inf, top))
        stage = dataclasses.replace(stage, reading=reading)
        self._check_channels(stage, "stage", enlarges=config.stage == 2)
        if config.stage == 1:
            return [stage]
        base = self._stage(config.base, "", None, wanted)
        self._check_channels(base, "base", enlarges=False)
        _, low, across = base.shape
        if height % low or width % across or (height, width) == (low, across):
            raise UserError(
                f"dataset.resolution must be a multiple of the base's: {base.index.name!r} makes {low}x{across}, "
                f"got {height}x{width}"
            )
        self._noising(stage.index)
        return [stage, base]

    def _stage(self, path: str, variant: str, shape: tuple[int, int, int] | None, wanted: tuple[str, ...]) -> _Stage:
        """The pipeline at `path`, for images of `shape`, or of its network's own size."""
        index = self._index(path, wanted)
        reading = self._reading(index)
        unet = index.full_config("unet")
        size = unet["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        _, plain = read_schedule(index)
        scheduler = with_defaults(str(plain["_class_name"]), plain)
        made = shape or (self.dataset.shape[0], height, width)
        student = scheduler["num_train_timesteps"] <= STUDENT_TIMES
        return _Stage(index, reading, made, variant, Path(path).is_dir(), student)

    def _check_channels(self, stage: _Stage, setting: str, enlarges: bool) -> None:
        unet, channels = stage.index.full_config("unet"), self.dataset.shape[0]
        name, got = stage.index.name, (unet["in_channels"], unet["out_channels"])
        wanted, takes_level = 2 * channels if enlarges else channels, unet["class_embed_type"] is not None
        if got[0] != wanted or got[1] not in (channels, 2 * channels) or takes_level != enlarges:
            kind = "upscales images (stage 2)" if enlarges else "makes images from texts (stage 1)"
            raise UserError(
                f"teacher.{setting}: the network in {name!r} has {got[0]} input and {got[1]} output channels; one "
                f"that {kind} has {wanted} and {channels}, or {2 * channels} with a variance"
            )

    def _noising(self, index: Index) -> tuple[NoiseSchedule, float]:
        """The schedule of the noise added to the upscaler's input, and its time."""
        index.component((NOISING,))
        schedule = read_config(read_json(index.folder / NOISING / "scheduler_config.json", index.name)).schedule
        level, steps = self.config.noise_level, round(1 / schedule.t_min)
        if level >= steps:
            raise UserError(f"teacher.noise_level must lie between 0 and {steps - 1}, got {level}")
        return schedule, (level + 1) / steps

    def _encoder(self, stages: list[_Stage], weights: bool) -> TextEncoder:
        """The text encoder of the first pipeline that has one. Raises UserError if none has, or it does not fit."""
        places = [(stage.index, stage.variant) for stage in stages]
        if self.config.text:
            places = [(self._index(self.config.text, ("text_encoder",) if weights else ()), self.config.variant)]
        with_one = [place for place in places if "text_encoder" in place[0].components]
        if not with_one:
            names = " and ".join(repr(index.name) for index, _ in places)
            raise UserError(f"no text encoder in {names}: give a pipeline that has one as teacher.text=FOLDER")
        encoder = TextEncoder(*with_one[0], self.device, self.encoders)
        for stage in stages:
            self._check_width(stage.index, encoder.width)
        return encoder

    def _settings(self, stages: list[_Stage]) -> dict[str, Any]:
        """The settings that change the teacher's predictions, as plain values."""
        plain: dict[str, Any] = {"t_max": self.config.t_max}
        for base in stages[1:]:
            steps, w = self._base_sampling(base)
            plain |= {"base_steps": steps, "base_guidance": w, "noise_level": self.config.noise_level}
        return plain

    def _base_sampling(self, base: _Stage) -> tuple[int, float]:
        """The base's number of steps and guidance weight w."""
        return (1, 1.0) if base.student else (self.config.base_steps, self.config.base_guidance)

    # --- building the teacher ---

    def _cascade(self, stages: list[_Stage], texts: Texts, unet: Callable[[_Stage], Any], sha256: str) -> Teacher:
        stage, *bases = stages
        teacher = self._teacher(stage, texts, unet, sha256, Counter())
        teacher.provenance.update(self._provenance(stage.index, stage.reading) | {"stage": self.config.stage})
        teacher.provenance.update(self._settings(stages))
        for base in bases:
            counter = teacher.denoiser.counted.counter  # evaluations of the frozen base count as the teacher's
            steps, w = self._base_sampling(base)
            small = BaseImages(
                self._teacher(base, texts, unet, "base", counter),
                TIME_GRIDS[GRID](base.reading.schedule, steps),
                w,
                (stage.shape[1], stage.shape[2]),
                self._noising(stage.index),
            )
            teacher.provenance["base"] = {"path": base.index.name, "reading": base.reading.plain}
            teacher.conditioning = dataclasses.replace(teacher.conditioning, small=small)
        return teacher

    def _teacher(
        self, stage: _Stage, texts: Texts, unet: Callable[[_Stage], Any], sha256: str, counter: Counter
    ) -> Teacher:
        reading, level = stage.reading, self.config.noise_level
        network = TextUNet(unet(stage), reading.call, level)
        return Teacher(
            self.name,
            Denoiser(network, reading.schedule, reading.prediction, counter).to(self.device),
            stage.shape,
            sha256,
            conditioning=Conditioning(self.conditioning.classes, texts=texts),
            blank=lambda: TextUNet(blank_component(stage.index, "unet"), reading.call, level),
            clip=reading.clip,
        )


@hookimpl(api=2)
def register_teachers(register) -> None:
    register(DeepFloyd)
