"""``distillbench export``: write a student as a pipeline that diffusers samples in one step, without distillbench.

run folder -> settings, teacher, student (run_export.py) -> its one step, folded into the network (fold.py)
           -> pipeline (forms.py, bundle.py) -> read back and compared -> model card (card.py)
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers.utils import is_accelerate_available
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor

from distillbench.errors import UserError
from distillbench.export.adapters import write_adapters
from distillbench.export.card import Card, write_card
from distillbench.export.fold import OneStep, RecordedStep, fit, fold, record_step
from distillbench.export.forms import EXAMPLES, Form, Parts, form_of, parts_of
from distillbench.export.run_export import Student, find_student
from distillbench.networks.diffusers_wrappers import TextUNet
from distillbench.registry import Registry
from distillbench.system.progress import Progress
from distillbench.teachers.teacher import Teacher
from distillbench.training.method import Method

CHECKED = EXAMPLES  # images that are compared
WATCHED = 4  # other images, on which the step is fitted
ALLOWED = 1e-4  # largest difference of a pixel, in [-1, 1]
ROUNDINGS = 4  # float32 roundings of the step's terms that are allowed, if that is more than ALLOWED
PATHS = {"_name_or_path", "name_or_path"}  # settings with the path that a component was read from
CHECK_SEED, WATCH_SEED = 0, 1
WITH_W = "unet_with_w"  # folder of a U-Net that has the guidance weight as an input


OF_W = (
    f"The guidance weight became part of that embedding, too. `{WITH_W}` has the U-Net as it was trained, with the "
    "weight as its input (`time_cond_proj_dim`), as diffusers' `LatentConsistencyModelPipeline` with an `LCMScheduler` "
    "takes it: its `guidance_scale` is w."
)


def export(
    run_folder: Path, method: str, seed: int | None, output: Path, registry: Registry, progress: Progress
) -> None:
    """Write the student of `method` in the run at `run_folder` to the new folder `output`.

    `seed` is the training seed; it may be None if the run has one student of the method. `method` may also be the name
    of a file in the run's weights/ without its suffix. Raises UserError if the student cannot be found or exported, and
    writes nothing then.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{str(output)!r} exists already: --output must name a new folder")
    student = find_student(run_folder, method, seed, registry, progress)
    with progress.step(f"exporting {student.cell.label}"):
        try:
            difference, pipeline = write_student(student, output)
        except SafetensorError as error:  # such as a full disk
            raise UserError(f"cannot write {str(output)!r}: {error}") from error
    progress.say(
        f"written: {output}, a {pipeline}; largest difference from the student in {CHECKED} images, in [-1, 1]: "
        f"{difference:.1e}"
    )


def write_student(student: Student, output: Path) -> tuple[float, str]:
    """Write the folder; returns its images' largest difference from the student's, and the pipeline's class."""
    shared = student.cell.shared
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / "folder"
        folder.mkdir()
        parts, prompts = parts_of(shared.source), shared.dataset.prompts
        form, difference = write_pipeline(student.method, student.teacher, parts, prompts, folder)
        _write_adapters(student, folder)
        write_card(folder, Card(student, form, difference))
        mode = (folder / "README.md").stat().st_mode  # some libraries write files that only the owner can read
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        os.replace(folder, output)
    return difference, form.pipeline


def _write_adapters(student: Student, folder: Path) -> None:
    """Write the adapters of the network that samples, if the student has any."""
    adapters = student.cell.shared.students.adapters
    if adapters is not None:
        c = student.teacher.conditioning.of_images(range(1), "cpu")
        network = record_step(student.method, noise(CHECK_SEED, 1, student.teacher), c).network
        write_adapters(folder, student.method, network, adapters, student.state)


def write_pipeline(
    method: Method, teacher: Teacher, parts: Parts | None, prompts: Sequence[str] | None, folder: Path
) -> tuple[Form, float]:
    """Write the pipeline of a student into the empty `folder`; returns it and the largest difference of its images.

    `parts` are the components of the teacher's diffusers pipeline, if it has one; `prompts` are the texts by label.
    """
    conditioning = teacher.conditioning
    c = conditioning.of_images(range(CHECKED), "cpu")
    others = conditioning.of_images(range(CHECKED, CHECKED + WATCHED), "cpu")
    seen = record_step(method, noise(WATCH_SEED, WATCHED, teacher), others)
    core = fold(seen)
    step = fit(seen, core)
    checked = record_step(method, noise(CHECK_SEED, CHECKED, teacher), c)
    labels = [] if c.labels is None else c.labels.tolist()
    texts = [] if prompts is None else [prompts[label] for label in labels]
    form = form_of(core, step, teacher, parts, labels, texts)
    form.write(folder)
    if isinstance(seen.network, TextUNet) and seen.network.takes_guidance:
        seen.network.wrapped.save_pretrained(folder / WITH_W)
        form = dataclasses.replace(form, fold=f"{form.fold} {OF_W}")
    for file in folder.rglob("*.json"):
        _forget_paths(file)
    return form, check(folder, form, checked, step, teacher)


def _forget_paths(file: Path) -> None:
    """Remove from a config the path on this machine that its component was read from."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(settings, dict) and not PATHS.isdisjoint(settings):
        kept = {name: value for name, value in settings.items() if name not in PATHS}
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def noise(seed: int, size: int, teacher: Teacher) -> Tensor:
    """eps (size,C,H,W), as diffusers pipelines draw it from a generator with this seed."""
    return torch.randn(size, *teacher.shape, generator=torch.Generator().manual_seed(seed))


def check(folder: Path, form: Form, seen: RecordedStep, step: OneStep, teacher: Teacher) -> float:
    """Load the folder as its user will; returns its images' largest difference from the student's, in [-1, 1].

    Raises UserError if that is above ALLOWED and above the rounding error of the step's terms in float32: a student
    that predicts eps subtracts terms of size a, and its images vary as much between batch sizes.
    """
    got = sample(folder, form, CHECK_SEED)
    with torch.no_grad():
        wanted = (seen.x_0 if teacher.decode is None else teacher.decode(seen.x_0)).clamp(-1, 1)
    difference = float((got - wanted).abs().max()) if got.shape == wanted.shape else float("inf")
    skip = step.a * seen.eps
    rounding = ROUNDINGS * torch.finfo(torch.float32).eps * float(skip.abs().max() + (seen.x_0 - skip).abs().max())
    if not difference <= max(ALLOWED, rounding):
        raise UserError(
            f"the exported {form.pipeline} does not give the student's images: they differ by {difference:.1e}, "
            f"allowed is {max(ALLOWED, rounding):.1e}. Nothing was written"
        )
    return difference


def sample(folder: Path, form: Form, seed: int) -> Tensor:
    """Images (B,C,H,W) in [-1, 1] of an exported folder, with the arguments of its form."""
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        settings = {"low_cpu_mem_usage": is_accelerate_available(), **form.loading}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder), **settings)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        images = pipeline(**form.asks, generator=generator, output_type="np").images
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()
    return torch.as_tensor(images).permute(0, 3, 1, 2) * 2 - 1
