"""``dataset=digits conditional=true``: samples show the class asked for, as an independent classifier sees it."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from distillbench.diffusion.noise import Noise, stream_key
from distillbench.diffusion.samplers import Solver
from distillbench.errors import UserError
from distillbench.registry import load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.runs.shared_context import make_source
from distillbench.system.progress import Progress

IMAGES = 200


@pytest.fixture(scope="module")
def classify():
    """(N,1,8,8) in [-1, 1] to classes, by a support-vector machine on the real digits (99 % right on held-out ones)."""
    digits = load_digits()
    machine = SVC(gamma=0.001).fit(digits.data, digits.target)
    return lambda x_0: torch.from_numpy(machine.predict(((x_0.clamp(-1, 1) + 1) * 8).round().flatten(1).numpy()))


def answers(*words, steps: int = 16):
    """Samples of the shipped teacher, and the classes that were asked for."""
    (config,) = compose_runs(["methods=[direct]", "dataset=digits", "conditional=true", *words], load_registry())
    _, source, conditioning = make_source(config, load_registry(), "cpu")
    teacher = dataclasses.replace(source.load(Progress(None)), conditioning=conditioning)
    c = conditioning.of_images(range(IMAGES), "cpu")
    eps = Noise(stream_key("test", 0), range(IMAGES), teacher.shape)(0)
    with torch.no_grad():
        x_0 = Solver.parse("ddim").solve(partial(teacher.denoise, c=c), teacher.schedule, eps, steps)
    return x_0, c.labels, teacher


@pytest.mark.parametrize(("w", "right"), [(1.0, 0.95), (3.0, 0.98)])
def test_the_shipped_teacher_draws_the_class_asked_for(classify, w, right):
    x_0, labels, teacher = answers(f"guidance={w}")
    assert labels[:12].tolist() == [*range(10), 0, 1]
    assert (classify(x_0) == labels).double().mean() > right
    assert teacher.teacher_rows.rows == IMAGES * 16 * (1 if w == 1 else 2)


def test_without_its_class_it_draws_any(classify):
    """w = 0 leaves the class out: right by chance only, and every digit is there."""
    x_0, labels, _ = answers("guidance=0")
    drawn = classify(x_0)
    assert (drawn == labels).double().mean() < 0.3 and len(drawn.unique()) == 10


def test_a_teacher_that_knows_no_classes_is_refused(tmp_path):
    registry = load_registry()
    (config,) = compose_runs(["methods=[boot]", "dataset=digits"], registry)
    file = make_source(config, registry, "cpu")[1]._file()
    words = ["methods=[boot]", "dataset=digits", f"teacher.path={file}", f"results_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"has no classes and does not support conditional=true with 10 classes"):
        plan(compose_runs([*words, "conditional=true"], registry), registry)


def test_images_without_labels_are_refused(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    registry = load_registry()
    words = ["methods=[boot]", "dataset=folder", f"dataset.path={tmp_path}", "conditional=true"]
    with pytest.raises(UserError, match="conditional=true needs class labels, and dataset=folder has none"):
        plan(compose_runs([*words, f"results_dir={tmp_path / 'results'}"], registry), registry)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["guidance=3"], "guidance=3 needs conditional=true"),
        (["guidance_range=[1,3]"], "guidance_range needs conditional=true"),
        (["conditional=true", "guidance=-1"], "guidance must be at least 0, got -1"),
        (["conditional=true", "guidance_range=[3,1]"], "0 <= LOW < HIGH"),
        (["conditional=true", "guidance_range=[1,2,3]"], "0 <= LOW < HIGH"),
        (["conditional=true", "guidance_range=[2,3]"], "guidance must lie between 2.0 and 3.0, got 1.0"),
    ],
)
def test_guidance_that_means_nothing_is_refused(words, message):
    with pytest.raises(UserError) as error:
        compose_runs(["methods=[boot]", "dataset=digits", *words], load_registry())
    assert message in str(error.value)
