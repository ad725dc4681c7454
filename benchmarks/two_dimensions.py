"""Distributions in two dimensions: every method's map and samples beside those of the exact teacher.

    python benchmarks/two_dimensions.py train --results results/two_dimensions   # a finished student is found again
    python benchmarks/two_dimensions.py keep --results results/two_dimensions    # writes results/reference/two_dimensions
    python docs/generate_two_dimensions.py                                       # writes the pictures and the page

A point is an image of two pixels (2,1,1). The teachers are exact denoisers, so what is wrong in a picture is the
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

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "results" / "reference" / "two_dimensions"
CHECKERBOARD = ROOT / "examples" / "distillbench-checkerboard" / "src"
POINTS = 4096  # samples of each row that are scored
TEACHER_STEPS = 256
METHODS = (
    "boot", "cm", "ct", "ctm", "direct", "dmd", "ect", "imm", "lcm", "meanflow", "moment", "pd", "reflow", "scm", "sid",
    "tract",
)  # fmt: skip
DISTRIBUTIONS = "mixture", "checkerboard", "spiral"
MODES, TURNS, COMPONENTS = 8, 1.75, 96
MODE_STD, CURVE_STD = 0.06, 0.03
FIELDS, REACH = 4, 0.8  # the defaults of dataset=checkerboard


def centres(name: str) -> np.ndarray:
    """The means (K,2) of the mixture, eight on a circle, or of the spiral, at equal distances along r = c angle."""
    if name == "mixture":
        angle = 2 * math.pi * np.arange(MODES) / MODES
        return 0.7 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    fine = np.linspace(0.25, 1, 10_000)
    angle, radius = 2 * math.pi * TURNS * fine, 0.88 * fine
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    length = np.concatenate([[0], np.hypot(np.diff(x), np.diff(y)).cumsum()])
    at = np.linspace(0, length[-1], COMPONENTS)
    return np.stack([np.interp(at, length, x), np.interp(at, length, y)], axis=1)


def dataset(name: str) -> list[str]:
    """The settings of a distribution's dataset."""
    if name == "checkerboard":
        return ["dataset=checkerboard"]
    means, std = centres(name), MODE_STD if name == "mixture" else CURVE_STD
    columns = {
        "weights": [1 / len(means)] * len(means),
        "means": [[round(float(x), 5) for x in mean] for mean in means],
        "stds": [[std]] * len(means),
    }
    return ["dataset=gmm", *(f"dataset.{key}={json.dumps(c, separators=(',', ':'))}" for key, c in columns.items())]


def command(name: str, methods: str, results: Path, images: int) -> list[str]:
    """The words of the run that trains `methods` on the distribution `name`."""
    return [
        "run", f"methods=[{methods}]", *dataset(name), "dataset.count=50000", "teacher=gmm", "teacher.fit_images=500000",
        "teacher.width=128", f"run_name={name}", f"results_dir={results}", f"budget.images={images}",
        f"evaluation.images={POINTS}", f"evaluation.teacher_steps=[1,4,{TEACHER_STEPS}]",
        "evaluation.metrics=[teacher_rmse,spread]", "evaluation.timing=off", "evaluation.progress_every=0",
        f"--plugins-dir={CHECKERBOARD}",
    ]  # fmt: skip


def train(results: Path, methods: str, images: int, names: list[str]) -> int:
    """Run all distributions, one after another. Returns the exit code of the last that failed, or 0."""
    worst = 0
    for name in names:
        words = command(name, methods, results, images)
        worst = subprocess.run([sys.executable, "-m", "distillbench", *words], check=False).returncode or worst
    return worst


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "keep"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--images", type=int, default=300_000)
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS))
    given = parser.parse_args()
    if given.what == "train":
        raise SystemExit(train(given.results, given.methods, given.images, given.distributions))


if __name__ == "__main__":
    main()
