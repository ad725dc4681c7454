"""Distributions in two dimensions: every method's map and samples beside those of the exact teacher.

    python benchmarks/two_dimensions.py train --results results/two_dimensions  # a finished student is found again
    python benchmarks/two_dimensions.py keep --results results/two_dimensions   # to results/reference/two_dimensions
    python docs/generate_two_dimensions.py                                      # the pictures and the page

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
import pandas as pd
from scipy.spatial import cKDTree
from scipy.stats import wasserstein_distance

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "results" / "reference" / "two_dimensions"
CHECKERBOARD = ROOT / "examples" / "distillbench-checkerboard" / "src"
SAMPLER = "ddim"
POINTS, KEPT = 4096, 2000  # samples of each row that are scored, and that the pictures show
REFERENCE_POINTS, DRAWS, DIRECTIONS = 20_000, 20, 64
TEACHER_ROWS = 1, 4, 16, 64, 256  # DDIM's steps; the last are what maps are compared with
METHODS = (
    "boot", "cm", "ct", "ctm", "direct", "dmd", "ect", "imm", "lcm", "meanflow", "moment", "pd", "reflow", "scm", "sid",
    "tract",
)  # fmt: skip
DISTRIBUTIONS = "mixture", "checkerboard", "spiral"
MODES, TURNS, COMPONENTS = 8, 1.75, 96
STDS = {"mixture": 0.06, "spiral": 0.03}  # of each component
FIELDS, REACH = 4, 0.8  # the defaults of dataset=checkerboard
COUNTS = "train_images", "train_teacher_nfe", "train_student_nfe"


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
    means = centres(name)
    columns = {
        "weights": [1 / len(means)] * len(means),
        "means": [[round(float(x), 5) for x in mean] for mean in means],
        "stds": [[STDS[name]]] * len(means),
    }
    return ["dataset=gmm", *(f"dataset.{key}={json.dumps(c, separators=(',', ':'))}" for key, c in columns.items())]


def command(name: str, methods: str, results: Path, images: int, settings: list[str]) -> list[str]:
    """The words of the run that trains `methods` on the distribution `name`, with further `settings`."""
    return [
        "run", f"methods=[{methods}]", *dataset(name), "dataset.count=50000", "teacher=gmm",
        "teacher.fit_images=500000", "teacher.width=128", f"run_name={name}", f"results_dir={results}",
        f"budget.images={images}", f"evaluation.images={POINTS}", f"evaluation.teacher_steps=[1,4,{TEACHER_ROWS[-1]}]",
        "evaluation.metrics=[teacher_rmse,spread]", "evaluation.timing=off", "evaluation.progress_every=0",
        *settings, f"--plugins-dir={CHECKERBOARD}",
    ]  # fmt: skip


def train(commands: list[list[str]]) -> int:
    """Run them one after another. Returns the exit code of the last that failed, or 0."""
    codes = [
        subprocess.run([sys.executable, "-m", "distillbench", *words], check=False).returncode for words in commands
    ]
    return next((code for code in reversed(codes) if code), 0)


def draw(name: str, count: int, random: np.random.Generator) -> np.ndarray:
    """Points (count,2) of the distribution, without the code of distillbench."""
    if name == "checkerboard":
        dark = np.array([(i, j) for i in range(FIELDS) for j in range(FIELDS) if (i + j) % 2 == 0])
        return (dark[random.integers(len(dark), size=count)] + random.random((count, 2))) * 2 * REACH / FIELDS - REACH
    means = centres(name)
    return means[random.integers(len(means), size=count)] + STDS[name] * random.standard_normal((count, 2))


def sliced_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over directions of the Wasserstein-1 distance between both projections, in pixel values."""
    angle = math.pi * (np.arange(DIRECTIONS) + 0.5) / DIRECTIONS
    directions = np.stack([np.cos(angle), np.sin(angle)])
    pairs = zip((a @ directions).T, (b @ directions).T, strict=True)
    return float(np.mean([wasserstein_distance(ours, theirs) for ours, theirs in pairs]))


class Truth:
    """What samples are compared with: `REFERENCE_POINTS` points of the distribution."""

    def __init__(self, name: str) -> None:
        random = np.random.default_rng(0)
        self.points = draw(name, REFERENCE_POINTS, random)
        self.tree = cKDTree(self.points)
        fresh = [draw(name, POINTS, random) for _ in range(DRAWS)]
        self.beyond = np.quantile([self.tree.query(points)[0] for points in fresh], 0.99)
        self.apart = np.quantile([cKDTree(points).query(self.points)[0] for points in fresh], 0.99)
        self.floor = float(np.quantile([sliced_wasserstein(points, self.points) for points in fresh], 0.95))

    def scores(self, points: np.ndarray) -> dict[str, float]:
        """Of points (N,2), a part of a row of the table."""
        return {
            "sliced_wasserstein": sliced_wasserstein(points, self.points),
            "sliced_wasserstein_floor": self.floor,
            "outside": float((self.tree.query(points)[0] > self.beyond).mean()),
            "missed": float((cKDTree(points).query(self.points)[0] > self.apart).mean()),
        }


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    """The root mean square difference of two sets of points (N,2), over points and both values."""
    return float(np.sqrt(((a - b) ** 2).mean()))


def keep(results: Path, names: list[str], folder: Path) -> None:
    """Write the points of the pictures, the environments and the scores. Rows of other distributions stay."""
    folder.mkdir(parents=True, exist_ok=True)
    table, environments = folder / "scores.csv", folder / "environment.json"
    rows = pd.read_csv(table).query("distribution not in @names").to_dict("records") if table.exists() else []
    found = json.loads(environments.read_text()) if environments.exists() else {}
    for name in names:
        points, facts = samples(results / name)
        truth = Truth(name)
        teacher = points[f"teacher@{TEACHER_ROWS[-1]}"]
        unrelated = rmse(teacher, np.roll(teacher, 1, axis=0))
        for label, fact in facts.items():
            scores = truth.scores(points[label]) | {"teacher_rmse": rmse(points[label], teacher)}
            rows.append({"distribution": name, **fact, **scores, "unrelated_rmse": unrelated})
        points["true"] = draw(name, KEPT, np.random.default_rng(1))
        rounded = {label: points[label][:KEPT].astype(np.float16) for label in ("noise", "true", *shown(facts))}
        np.savez_compressed(folder / f"{name}.npz", **rounded)
        found[name] = json.loads((results / name / "environment.json").read_text())
        print(f"{name}: {len(facts)} rows")
    kept = pd.DataFrame(rows).astype(dict.fromkeys(COUNTS, "Int64"))
    kept = kept.sort_values("distribution", key=lambda column: column.map(DISTRIBUTIONS.index), kind="stable")
    kept.to_csv(table, index=False, float_format="%.4g", lineterminator="\n")
    environments.write_text(json.dumps({name: found[name] for name in DISTRIBUTIONS if name in found}, indent=2) + "\n")


def shown(facts: dict[str, dict]) -> list[str]:
    """The rows that pictures show: two of the teacher, and of a method its fewest and its most evaluations."""
    nfe = {method: [fact["nfe"] for fact in facts.values() if fact["method"] == method] for method in METHODS}
    ends = [f"{method}@{n}" for method, found in nfe.items() if found for n in dict.fromkeys((min(found), max(found)))]
    return ["teacher@4", f"teacher@{TEACHER_ROWS[-1]}", *ends]


def samples(run: Path) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Points (N,2) of the noise and of every row of a finished run, and the facts about each row, named METHOD@NFE."""
    import torch

    from distillbench.diffusion.conditioning import UNCONDITIONAL
    from distillbench.diffusion.noise import Noise, stream_key
    from distillbench.evaluation.evaluator import EVALUATION, teacher_sampler
    from distillbench.export.run_export import find_student, find_teacher
    from distillbench.registry import in_folders, installed, load_registry
    from distillbench.system.progress import Progress
    from distillbench.testing.method_kinds import kind_of

    registry, progress = load_registry([*installed(), *in_folders([CHECKERBOARD])]), Progress(None)
    noise = Noise(stream_key(EVALUATION, 0), range(POINTS), (2, 1, 1))
    points, facts = {"noise": noise(0)}, {}
    cell, teacher = find_teacher(run, f"teacher:{SAMPLER}", registry, progress)
    solve = teacher_sampler(teacher, cell.sampler())
    table = pd.read_csv(run / "table.csv").query("status == 'ok'")
    with torch.no_grad():
        for nfe in TEACHER_ROWS:
            points[f"teacher@{nfe}"] = solve(noise, nfe, UNCONDITIONAL)
            facts[f"teacher@{nfe}"] = {"method": "teacher", "nfe": nfe, "kind": "", "keeps_noise": True}
        for row in table[~table["method"].str.startswith("teacher:")].itertuples(index=False):
            student = find_student(run, row.method, None, registry, progress, row.nfe).method
            points[f"{row.method}@{row.nfe}"] = student.sample(noise, row.nfe, UNCONDITIONAL)
            facts[f"{row.method}@{row.nfe}"] = {
                "method": row.method, "nfe": row.nfe, "kind": kind_of(student),
                "keeps_noise": student.keeps_noise(row.nfe), **{name: getattr(row, name) for name in COUNTS},
            }  # fmt: skip
    return {label: array.reshape(POINTS, 2).double().numpy() for label, array in points.items()}, facts


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "keep"))
    parser.add_argument("settings", nargs="*", help="of train: further settings, such as methods.scm.lr=5e-4")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--images", type=int, default=300_000)
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS))
    parser.add_argument("--to", type=Path, default=REFERENCE, help="of keep: the folder that is written")
    given = parser.parse_args()
    if given.what == "train":
        wanted = (given.methods, given.results, given.images, given.settings)
        raise SystemExit(train([command(name, *wanted) for name in given.distributions]))
    keep(given.results, given.distributions, given.to)


if __name__ == "__main__":
    main()
