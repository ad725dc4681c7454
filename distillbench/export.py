"""``distillbench export``: a trained student as a folder that diffusers samples in one step, without distillbench.

run folder -> settings, teacher, student (export_run) -> its one step, folded into its network (export_fold)
           -> pipeline (export_forms, export_bundle) -> read back and compared -> model card (export_card)
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers.utils import is_accelerate_available
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from distillbench.errors import UserError
from distillbench.export_card import Card, write_card
from distillbench.export_fold import OneStep, Seen, fit, fold, watch
from distillbench.export_forms import EXAMPLES, Form, Parts, form_of, parts_of
from distillbench.export_run import Student, find_student
from distillbench.method import Method
from distillbench.progress import Progress
from distillbench.registry import Registry
from distillbench.teachers import Teacher

CHECKED = EXAMPLES  # images
WATCHED = 4  # others, on which the step is found
ALLOWED = 1e-4  # largest difference of a pixel in [-1, 1]
ROUNDINGS = 4  # of float32, of the terms of a step, that are allowed where that is more
PATHS = {"_name_or_path", "name_or_path"}  # where components keep where they were read from
CHECK_SEED, WATCH_SEED = 0, 1


def export(
    run_folder: Path, method: str, seed: int | None, output: Path, registry: Registry, progress: Progress
) -> None:
    """Write the student of `method` in the run at `run_folder` to the new folder `output`.

    `seed` tells trainings of one method apart and may be None where there is one; `method` may also be the name of a
    file in the run's weights/ (less its ending), which tells all of them apart. Raises UserError for whatever does not
    fit, and leaves nothing then.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{str(output)!r} exists already: export writes a new folder")
    student = find_student(run_folder, method, seed, registry, progress)
    with progress.step(f"exporting {student.cell.label}"):
        difference, pipeline = write_student(student, output)
    progress.say(
        f"written: {output}, a {pipeline}; largest difference from the student in {CHECKED} images, in [-1, 1]: "
        f"{difference:.1e}"
    )


def write_student(student: Student, output: Path) -> tuple[float, str]:
    """Write the folder; returns the largest difference that its images have, and the pipeline's class."""
    shared = student.cell.shared
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / "folder"
        folder.mkdir()
        parts, prompts = parts_of(shared.source), shared.dataset.prompts
        form, difference = write_pipeline(student.method, student.teacher, parts, prompts, folder)
        write_card(folder, Card(student, form, difference))
        mode = (folder / "README.md").stat().st_mode  # some libraries write for the owner alone
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        os.replace(folder, output)
    return difference, form.pipeline


def write_pipeline(
    method: Method, teacher: Teacher, parts: Parts | None, prompts: Sequence[str] | None, folder: Path
) -> tuple[Form, float]:
    """Write the pipeline of a student into the empty `folder`; returns it and the largest difference of its images.

    `parts` are those of the teacher's pipeline, where it is one of diffusers; `prompts` are the texts by label.
    """
    asked = teacher.conditioning
    others, c = asked.of_images(range(CHECKED, CHECKED + WATCHED), "cpu"), asked.of_images(range(CHECKED), "cpu")
    seen = watch(method, noise(WATCH_SEED, WATCHED, teacher), others)
    core = fold(seen)
    step = fit(seen, core)
    checked = watch(method, noise(CHECK_SEED, CHECKED, teacher), c)
    labels = [] if c.labels is None else c.labels.tolist()
    texts = [] if prompts is None else [prompts[label] for label in labels]
    form = form_of(core, step, teacher, parts, labels, texts)
    form.write(folder)
    for file in folder.rglob("*.json"):
        _forget_paths(file)
    return form, check(folder, form, checked, step, teacher)


def _forget_paths(file: Path) -> None:
    """Take from a config where on this machine its component was read from."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(settings, dict) and not PATHS.isdisjoint(settings):
        kept = {name: value for name, value in settings.items() if name not in PATHS}
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def noise(seed: int, size: int, teacher: Teacher) -> Tensor:
    """eps (size,C,H,W), as pipelines of diffusers draw it from a generator with this seed."""
    return torch.randn(size, *teacher.shape, generator=torch.Generator().manual_seed(seed))


def check(folder: Path, form: Form, seen: Seen, step: OneStep, teacher: Teacher) -> float:
    """Read the folder as its user will; the largest difference between its images and the student's, in [-1, 1].

    Raises UserError if that is above ALLOWED, or above what float32 leaves of the terms of the step if that is more: a
    student that predicts eps subtracts terms of size a, and varies as much from one batch size to another.
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
    """Images of an exported folder in [-1, 1], (B,C,H,W), for what its form asks."""
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
