"""Noise-image pairs: reproducible from the seed, cached, charged equally, and computed again when damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from analytic import gaussian_teacher, make_workspace, mlp_teacher
from distillbench.diffusion.conditioning import UNCONDITIONAL, Conditioning
from distillbench.diffusion.noise import Noise, stream_key
from distillbench.errors import UserError
from distillbench.metering.energy import Energy
from distillbench.storage.files import signed
from distillbench.system.progress import Progress
from distillbench.training import pairs as pairs_module
from distillbench.training.budget import Meter
from distillbench.training.pairs import BATCH, PairStore, Workspace
from pair_requests import RECIPE, Solver, read_all, request_pairs


def same(a: PairStore, b: PairStore) -> bool:
    return all(torch.equal(x, y) for x, y in zip(read_all(a), read_all(b), strict=True))


def test_pairs_are_the_solver_at_the_noise_of_the_stream(tmp_path):
    """Bit for bit: eps is the i-th noise of the stream, x_0 the solver's result, in float32, not quantised."""
    pairs, solved, meter, _ = request_pairs(tmp_path)
    teacher = gaussian_teacher()
    eps = Noise(stream_key("pairs", 0), range(12), teacher.shape)(0)
    read_eps, read_x_0 = read_all(pairs)
    assert torch.equal(read_eps, eps)
    assert torch.equal(read_x_0, Solver(teacher)(eps, UNCONDITIONAL).float())
    assert solved == len(pairs) == 12 and read_x_0.dtype is torch.float32
    assert meter.teacher_nfe == 36


def test_reading_follows_the_indices_of_any_shape(tmp_path):
    pairs, *_ = request_pairs(tmp_path)
    eps, x_0 = read_all(pairs)
    some_eps, some_x_0 = pairs.read(torch.tensor([5, 0, 5]).view(3, 1, 1, 1))[:2]
    assert torch.equal(some_eps, eps[[5, 0, 5]]) and torch.equal(some_x_0, x_0[[5, 0, 5]])


def test_cached_pairs_are_charged_like_new_ones(tmp_path):
    made, solved, meter, _ = request_pairs(tmp_path)
    manifest = json.loads(next(tmp_path.glob("*/manifest.json")).read_text())
    found, solved_again, meter_again, lines = request_pairs(tmp_path)
    assert (solved, solved_again) == (12, 0) and not lines
    assert same(made, found)
    assert meter.teacher_nfe == meter_again.teacher_nfe == manifest["teacher_nfe"] == 36
    assert meter_again.charged.seconds == manifest["seconds"] > 0
    assert meter_again.cost().seconds >= manifest["seconds"]
    assert manifest["seconds"] <= meter.cost().seconds


def test_the_manifest_has_teacher_seconds_and_energy(tmp_path):
    """All seconds but those of the noise are the teacher's. On a CPU the energy is unknown, also for later users."""
    _, _, meter, _ = request_pairs(tmp_path)
    file = next(tmp_path.glob("*/manifest.json"))
    manifest = json.loads(file.read_text())
    assert 0 < manifest["teacher_seconds"] < manifest["seconds"]
    assert meter.cost().teacher_seconds == pytest.approx(manifest["teacher_seconds"], abs=1e-9)
    assert (manifest["joules"], manifest["no_joules"]) == (None, "no GPU in use")
    cost = request_pairs(tmp_path)[2].cost()
    assert cost.teacher_seconds == manifest["teacher_seconds"] and cost.student_seconds == 0
    assert request_pairs(tmp_path)[2].charged_energy == Energy(None, "the cached pairs: no GPU in use")
    file.write_text(json.dumps(signed(manifest | {"joules": 12.5})))
    assert request_pairs(tmp_path)[2].charged_energy == Energy(12.5)


def test_pairs_do_not_depend_on_the_batch_size(tmp_path):
    pairs, solved, meter, _ = request_pairs(tmp_path, count=BATCH + 5)
    teacher = gaussian_teacher()
    tail = Noise(stream_key("pairs", 0), range(BATCH, BATCH + 5), teacher.shape)(0)
    eps, x_0 = pairs.read(torch.arange(BATCH, BATCH + 5))[:2]
    assert torch.equal(eps, tail) and torch.equal(x_0, Solver(teacher)(tail, UNCONDITIONAL).float())
    assert solved == len(pairs) == BATCH + 5 and meter.teacher_nfe == 3 * (BATCH + 5)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"count": 13}, {"recipe": {**RECIPE, "steps": 4}}, {"sha256": "other"}]
)
def test_another_recipe_is_another_cache_entry(tmp_path, change):
    request_pairs(tmp_path)
    _, solved, *_ = request_pairs(tmp_path, **change)
    assert solved == change.get("count", 12)
    assert request_pairs(tmp_path)[1] == 0  # these are still cached
    assert request_pairs(tmp_path, **change)[1] == 0


def test_pairs_of_different_seeds_differ_and_are_not_the_evaluation_noise(tmp_path):
    eps, _ = read_all(request_pairs(tmp_path)[0])
    assert not torch.equal(eps, read_all(request_pairs(tmp_path, seed=1)[0])[0])
    assert not torch.equal(eps, Noise(stream_key("evaluation", 0), range(12), (2, 1, 1))(0))


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "targets.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "targets.safetensors").write_bytes(data)


def cut(folder: Path) -> None:
    os.truncate(folder / "targets.safetensors", 40)


def edit_manifest(sign=signed, **values):
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(sign(manifest | values)))

    return edit


DAMAGES = {
    "a byte of the targets": flip_a_byte,
    "half a file": cut,
    "no targets": lambda folder: (folder / "targets.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 25),
    "a manifest of another kind": lambda folder: (folder / "manifest.json").write_text("[]"),
    "a manifest of other pairs": edit_manifest(recipe={}),
    "another cost": edit_manifest(sign=dict, seconds=0.5),
    "a cost that is no number": edit_manifest(seconds="long"),
    "energy that is no number": edit_manifest(joules="much"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_pairs_are_computed_again(tmp_path, damage):
    good, *_ = request_pairs(tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    DAMAGES[damage](folder)
    again, solved, meter, lines = request_pairs(tmp_path)
    assert solved == 12 and same(again, good)
    assert meter.teacher_nfe == 36 and meter.charged.seconds == 0
    if damage not in ("no targets", "no manifest", "a manifest of other pairs"):
        assert len(lines) == 1 and "computed again" in lines[0]
    assert request_pairs(tmp_path)[1] == 0  # repaired


def test_a_dry_run_has_the_cost_without_the_work(tmp_path):
    _, solved, meter, _ = request_pairs(tmp_path, count=1000, dry=True)
    assert meter.teacher_nfe == 3000 and solved < 10
    assert not list(tmp_path.iterdir())


def test_cached_pairs_are_found_without_reading_them(tmp_path):
    workspace = make_workspace(gaussian_teacher(), tmp_path)
    assert not workspace.has_pairs(12, RECIPE)
    request_pairs(tmp_path)
    assert workspace.has_pairs(12, RECIPE) and not workspace.has_pairs(13, RECIPE)


def test_making_pairs_leaves_no_gradients(tmp_path):
    teacher = gaussian_teacher()
    workspace = Workspace(teacher, Meter(make_workspace(teacher, tmp_path).meter.budget, teacher, "cpu"), tmp_path,
                          "cpu", 0, Progress(None))  # fmt: skip
    seen = []
    workspace.pairs(lambda eps, c: seen.append(torch.is_grad_enabled()) or eps, 3, RECIPE)
    assert seen == [False]


def solved_by(teacher, network, folder, told=None, **settings):
    """One request of pairs whose images are those of `network`."""
    workspace = make_workspace(teacher, folder)
    workspace.__dict__ |= settings
    return workspace.pairs(lambda eps, c: network(eps, torch.full((len(eps), 1, 1, 1), 0.5)), 3, RECIPE, told)


@pytest.mark.parametrize("dry", [False, True])
def test_pairs_of_a_student_must_be_named_and_frozen(dry, tmp_path):
    teacher = mlp_teacher()
    student = teacher.student()
    with pytest.raises(RuntimeError, match="not told: cached pairs"):
        solved_by(teacher, student, tmp_path, dry=dry)
    with pytest.raises(RuntimeError, match="a network that is being trained"):
        solved_by(teacher, student, tmp_path, student, dry=dry)
    frozen = student.freeze()
    with pytest.raises(
        UserError, match=r"compute\.shard=true does not go with noise-image pairs that a student computes"
    ):
        solved_by(teacher, frozen, tmp_path, frozen, dry=dry, shard=True)
    assert len(solved_by(teacher, frozen, tmp_path, frozen, dry=dry)) == (2 if dry else 3)


class Numbered:
    """The encoding of text i is the number i at each token."""

    def __call__(self, labels, device=None):
        return labels.view(-1, 1, 1).expand(-1, 2, 3).float()

    def empty(self, count, device):
        return torch.zeros(count, 2, 3)


def test_texts_are_the_same_for_pairs_on_the_device_and_drawn_at_each_read(monkeypatch):
    targets, asked = torch.randn(10, 2, 1, 1), Conditioning(4, w_range=(1.0, 3.0), texts=Numbered())
    held = PairStore(7, targets, "cpu", asked)
    monkeypatch.setattr(pairs_module, "HELD_BYTES", 0)
    made = PairStore(7, targets, "cpu", asked)
    assert held._holds and not made._holds
    for indices in (torch.tensor([3, 9, 0]).view(3, 1, 1, 1), torch.arange(10)):
        (eps, x_0, c), (made_eps, made_x_0, made_c) = held.read(indices), made.read(indices)
        assert torch.equal(eps, made_eps) and torch.equal(x_0, made_x_0)
        for name in ("labels", "w", "text"):
            assert torch.equal(getattr(c, name), getattr(made_c, name))
    assert c.text[:, 0, 0].tolist() == [i % 4 for i in range(10)]
