"""Samples are scored from files, a few at a time: the same scores as at once, in bounded memory, with nothing left."""

from __future__ import annotations

import shutil
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch

from distillbench.builtin.pixels import NearestRealRmse, Spread, TeacherRmse
from distillbench.datasets.dataset import to_uint8
from distillbench.diffusion.conditioning import Conditioning
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.samplers import Solver
from distillbench.diffusion.schedules import VPCosine
from distillbench.errors import UserError
from distillbench.evaluation import feature_metrics, stored_images
from distillbench.evaluation.evaluator import Evaluator, features_kept, teacher_sampler
from distillbench.evaluation.features import FeatureNetwork, ImageSet, Networks
from distillbench.evaluation.metric import Samples
from distillbench.evaluation.pretrained_weights import WeightsFile
from distillbench.evaluation.reference_statistics import RealImages
from distillbench.evaluation.settings import EvaluationConfig
from distillbench.evaluation.stored_images import StoredImages
from distillbench.networks.architectures import ResidualMLP
from distillbench.system.progress import Progress, Step
from distillbench.teachers.teacher import Teacher
from random_pictures import Pictures

SHAPE, IMAGES = (3, 4, 4), 120


class Toy(FeatureNetwork):
    """Six linear features."""

    name, protocol, width, batch = "toy", "toy/1", 6, 16
    weights = WeightsFile("toy", "ab", "", "none", 0)

    @classmethod
    def locate(cls, folder):
        return folder

    def __init__(self, file, device) -> None:
        self.matrix = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))

    def __call__(self, images):
        return images.float().flatten(1) @ self.matrix


BASES = [base for base in vars(feature_metrics).values() if isinstance(base, type)]
BASES = [base for base in BASES if issubclass(base, feature_metrics.FeatureMetric) and "score" in vars(base)]
METRICS = {base.__name__: type(base.__name__, (base,), {"name": base.__name__, "network": Toy}) for base in BASES}
METRICS["KernelDistance"].subset = 20
METRICS |= {cls.name: cls for cls in (TeacherRmse, Spread, NearestRealRmse)}
PIXELS = {"teacher_rmse": TeacherRmse}


def judge(folder, metrics=METRICS, conditioning=None) -> Evaluator:
    torch.manual_seed(0)
    conditioning = conditioning or Conditioning()
    network = ResidualMLP(SHAPE, 16, 1, conditioning.classes)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    teacher = Teacher("toy", Denoiser(network, VPCosine(), "v"), SHAPE, "1" * 64, conditioning=conditioning)
    real = RealImages(Pictures(40, SHAPE), Networks(folder, "cpu"), folder / "references", [], features_kept(metrics))
    config = EvaluationConfig(images=IMAGES, batch_size=8, teacher_steps=[1, 4])
    return Evaluator(config, metrics, real, teacher, Progress(None), folder / "answers")


def few(monkeypatch, images: int = 7) -> None:
    monkeypatch.setattr(stored_images, "BYTES_AT_ONCE", images * 4 * 48)


@pytest.mark.parametrize("classes", [0, 3])
def test_every_metric_has_the_same_score_streamed_as_at_once(classes, tmp_path, monkeypatch):
    """At once: all images in one tensor. Only pixels' sums in float64 are taken in another order."""
    few(monkeypatch)
    monkeypatch.setattr("distillbench.builtin.pixels.MOST_VALUES", 2 * 48)  # one class, and two samples, at a time
    evaluator = judge(tmp_path, conditioning=Conditioning(classes) if classes else None)
    sampler = teacher_sampler(evaluator.teacher, Solver.parse("ddim"))
    measured = evaluator.measure(sampler, 2, 0, True, "two steps")
    monkeypatch.undo()

    images = []
    evaluator._sample(sampler, 2, 0, Step(lambda *_: None), None, images.append)
    x_0, teacher_x_0 = torch.cat(images), evaluator.teacher_samples(0)[0].tensor
    sets = [
        ImageSet(lambda x=x: [to_uint8(x)], IMAGES, SHAPE, evaluator.networks, features_kept(METRICS))
        for x in (x_0, teacher_x_0)
    ]
    labels = torch.arange(IMAGES) % classes if classes else None
    whole = Samples(x_0, teacher_x_0, *sets, evaluator.real, True, labels)
    assert len(METRICS) == 14 and set(measured.missing) == set()
    for name, cls in METRICS.items():
        rel = 1e-13 if name in ("teacher_rmse", "spread") else 0
        assert measured.scores[name] == pytest.approx(cls().score(whole), rel=rel, abs=0), name
    assert torch.equal(measured.shown, to_uint8(x_0[:64]))


def test_samples_are_never_all_in_memory(tmp_path, monkeypatch):
    """Of 120 images, 8 are sampled and 7 read at a time; the network waits for 16."""
    few(monkeypatch)
    monkeypatch.setattr("distillbench.builtin.pixels.MOST_VALUES", 7 * 48)
    alive, most = weakref.WeakSet(), []
    to_images, batches = Teacher.to_images, StoredImages.batches

    def watched(images):
        alive.add(images.untyped_storage())
        most.append(sum(storage.nbytes() for storage in alive) // (4 * 48))
        return images

    monkeypatch.setattr(Teacher, "to_images", lambda self, x_0: watched(to_images(self, x_0)))
    monkeypatch.setattr(StoredImages, "batches", lambda self: map(watched, batches(self)))
    evaluator = judge(tmp_path)
    evaluator.measure(teacher_sampler(evaluator.teacher, Solver.parse("ddim")), 2, 0, True, "two steps")
    assert len(most) > 50 and 8 <= max(most) <= 40


def test_after_an_error_no_part_of_the_teachers_samples_stays_and_the_next_run_makes_them(tmp_path):
    metrics, calls = PIXELS, []
    evaluator, clean = judge(tmp_path / "a", metrics), judge(tmp_path / "b", metrics)
    two_steps = teacher_sampler(evaluator.teacher, Solver.parse("ddim"))

    def fails(noise, nfe, c):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no luck")
        return two_steps(noise, nfe, c)

    def files():
        return [path.suffix for path in (tmp_path / "a" / "answers").iterdir() if not path.name.endswith(".claim")]

    evaluator._solver = lambda: fails
    with pytest.raises(RuntimeError, match="no luck"):
        evaluator.measure(two_steps, 2, 0, True, "two steps")
    assert files() == []
    del evaluator._solver
    calls.clear()
    evaluator.teacher_samples(0)
    with pytest.raises(RuntimeError, match="no luck"):
        evaluator.measure(fails, 2, 0, True, "two steps")
    assert sorted(files()) == [".json", ".npy"]
    again = evaluator.measure(two_steps, 2, 0, True, "two steps")
    theirs = teacher_sampler(clean.teacher, Solver.parse("ddim"))
    assert again.scores == clean.measure(theirs, 2, 0, True, "two steps").scores
    assert sorted(files()) == [".json", ".npy"]


def test_a_disk_without_room_is_found_before_sampling(tmp_path, monkeypatch):
    """120 images of 3x4x4 in float32 are 23,040 bytes: the teacher's and those of a row are twice as many."""
    usage = namedtuple("usage", "total used free")
    free = lambda size: monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(size, 0, size))
    evaluator = judge(tmp_path, PIXELS)
    solver = teacher_sampler(evaluator.teacher, Solver.parse("ddim"))
    free(46_079)
    with pytest.raises(
        UserError, match=r"scoring a row, .* takes 0\.0 GiB on disk, and 0\.0 GiB are free in '.*answers'"
    ):
        evaluator.measure(solver, 2, 0, True, "two steps")
    free(46_080)
    evaluator.teacher_samples(0)
    free(23_039)
    with pytest.raises(UserError, match=r"fewer evaluation\.images or another results_dir"):
        evaluator.measure(solver, 2, 0, True, "two steps")
    free(23_040)
    assert evaluator.measure(solver, 2, 0, True, "two steps").scores["teacher_rmse"] > 0


def test_a_file_of_images_reads_what_was_added(tmp_path):
    images = torch.randn(9, 2, 3, 3, dtype=torch.float32)
    stored = StoredImages(tmp_path)
    for part in images.split(4):
        stored.add(part)
    assert torch.equal(stored.tensor, images) and torch.equal(stored.first(5), images[:5])
    stored.tensor.zero_()  # changes a copy
    assert torch.equal(torch.cat(list(stored.batches())), images)
    with pytest.raises(ValueError, match="got float64"):
        stored.add(images.double())
    np.save(tmp_path / "images.npy", images.numpy())
    there = StoredImages.in_npy(tmp_path / "images.npy")
    (tmp_path / "images.npy").unlink()
    assert torch.equal(there.tensor, images)
