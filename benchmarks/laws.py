"""Distributions in two dimensions: every method's map and samples beside those of the exact teacher.

    python benchmarks/laws.py train --results results/laws     # trains; a finished student is found again
    python benchmarks/laws.py keep --results results/laws      # samples to results/reference/laws/*.npz
    python docs/generate_laws.py                               # pictures for docs/gallery.md

A point is an image of two pixels (2,1,1). The teachers are exact denoisers, so whatever is wrong in a picture is the
student's. Students start from a network that was trained on samples of the distribution.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "results" / "reference" / "laws"
CHECKERBOARD = ROOT / "examples" / "distillbench-checkerboard" / "src"
POINTS = 3000  # samples of each row that are kept
SAMPLER, TEACHER_STEPS = "ddim", 256
METHODS = (
    "boot", "cm", "ct", "ctm", "direct", "dmd", "ect", "imm", "lcm", "meanflow", "moment", "pd", "reflow", "scm", "sid",
    "tract",
)  # fmt: skip
MODES, TURNS, COMPONENTS = 8, 1.75, 96


def mixture() -> list[str]:
    """Eight equal normal distributions on a circle."""
    angles = [2 * math.pi * k / MODES for k in range(MODES)]
    return gmm([(0.7 * math.cos(a), 0.7 * math.sin(a)) for a in angles], 0.06)


def spiral() -> list[str]:
    """An arc of a spiral, r proportional to the angle, as normal distributions at equal distances along it."""
    fine = np.linspace(0.25, 1, 10_000)
    angle, radius = 2 * math.pi * TURNS * fine, 0.88 * fine
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    length = np.concatenate([[0], np.hypot(np.diff(x), np.diff(y)).cumsum()])
    at = np.linspace(0, length[-1], COMPONENTS)
    return gmm(list(zip(np.interp(at, length, x), np.interp(at, length, y), strict=True)), 0.03)


def gmm(means: list[tuple[float, float]], std: float) -> list[str]:
    """The settings of an equal mixture of N(m, std^2)."""
    rows = json.dumps([[round(float(x), 5), round(float(y), 5)] for x, y in means], separators=(",", ":"))
    weights = json.dumps([1 / len(means)] * len(means), separators=(",", ":"))
    stds = json.dumps([[std]] * len(means), separators=(",", ":"))
    return [
        "dataset=gmm", "teacher=gmm",
        f"dataset.weights={weights}", f"dataset.means={rows}", f"dataset.stds={stds}",
    ]  # fmt: skip


LAWS = {
    "mixture": mixture(),
    "checkerboard": ["dataset=checkerboard", "teacher=checkerboard"],
    "spiral": spiral(),
}


def command(law: str, methods: str, results: Path, images: int) -> list[str]:
    """The words of the run that trains `methods` on `law`."""
    fit = ["teacher.fit_images=500000"] if law != "checkerboard" else []
    return [
        "run", f"methods=[{methods}]", *LAWS[law], *fit, f"run_name={law}", f"results_dir={results}",
        f"budget.images={images}", "dataset.count=50000", f"evaluation.images={POINTS}",
        f"evaluation.teacher_steps=[1,4,{TEACHER_STEPS}]", "evaluation.metrics=[teacher_rmse,spread]",
        "evaluation.timing=off",
    ]  # fmt: skip


def train(results: Path, methods: str, images: int, laws: list[str]) -> int:
    """Run all laws, one after another. Returns the exit code of the last that failed, or 0."""
    worst = 0
    for law in laws:
        words = [*command(law, methods, results, images), f"--plugins-dir={CHECKERBOARD}"]
        worst = subprocess.run([sys.executable, "-m", "distillbench", *words], check=False).returncode or worst
    return worst


def keep(results: Path, laws: list[str]) -> None:
    """Write, for each law, points of the noise, the distribution, the teacher, and every student's rows."""
    from distillbench.diffusion.conditioning import UNCONDITIONAL
    from distillbench.diffusion.noise import Noise, stream_key
    from distillbench.evaluation.evaluator import EVALUATION, teacher_sampler
    from distillbench.export.run_export import find_student, find_teacher
    from distillbench.registry import in_folders, installed, load_registry
    from distillbench.system.progress import Progress

    registry = load_registry([*installed(), *in_folders([CHECKERBOARD])])
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for law in laws:
        run, progress = results / law, Progress(None)
        noise = Noise(stream_key(EVALUATION, 0), range(POINTS), (2, 1, 1))
        cell, teacher = find_teacher(run, f"teacher:{SAMPLER}", registry, progress)
        real = cell.shared.dataset.read(torch.arange(POINTS))
        solver = cell.sampler()
        with torch.no_grad():
            points = {"noise": noise(0), "real": real, "teacher": teacher_sampler(teacher, solver)(
                noise, solver.evaluations(TEACHER_STEPS), UNCONDITIONAL
            )}  # fmt: skip
            rows = pd.read_csv(run / "table.csv").query("status == 'ok'")
            for method, nfe in rows[["method", "nfe"]].drop_duplicates().itertuples(index=False):
                if method.startswith("teacher:"):
                    continue
                student = find_student(run, method, None, registry, progress, nfe)
                points[f"{method}@{nfe}"] = student.method.sample(noise, nfe, UNCONDITIONAL)
        rounded = {name: array.reshape(POINTS, 2).to(torch.float16).numpy() for name, array in points.items()}
        np.savez_compressed(REFERENCE / f"{law}.npz", **rounded)
        print(f"{law}: {len(points) - 3} rows kept")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "keep"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--images", type=int, default=400_000)
    parser.add_argument("--laws", nargs="+", choices=LAWS, default=list(LAWS))
    given = parser.parse_args()
    if given.what == "train":
        raise SystemExit(train(given.results, given.methods, given.images, given.laws))
    keep(given.results, given.laws)


if __name__ == "__main__":
    main()
