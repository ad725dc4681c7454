"""The settings of augmentation in a run: keys, rows, refusals, and trainings that see other images."""

from dataclasses import replace

import pytest
import torch

from distillbench import Batch
from distillbench.builtin.trained import Trained
from distillbench.errors import UserError
from distillbench.networks.edm import SongUNet
from distillbench.registry import load_registry
from distillbench.runs.cell_keys import train_inputs
from distillbench.runs.cell_result import describe_cell
from distillbench.runs.cell_training import train_cell
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.runs.shared_context import build, make_source
from distillbench.system.progress import Progress
from distillbench.system.signals import Stop
from edm_files import DDPM

SILENT = Progress(None)
WORDS = ["dataset=digits", "budget.images=32", "batch_size=16", "device=cpu", "evaluation.timing=off", "isolate=false"]


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def planned(registry, *words):
    return plan(compose_runs([*WORDS, *words], registry), registry)


def described(cells):
    """(method, settings, what the key has of augmentation) of the students' cells."""
    found = []
    for cell in cells:
        if cell.entry is not None:
            teacher = cell.shared.load_teacher(SILENT)
            settings = describe_cell(cell, teacher).columns["settings"]
            found.append((cell.name, settings, train_inputs(cell, teacher).get("augment")))
    return found


def test_drawn_latents_are_part_of_keys(registry):
    """Those of means, and of methods that read no images, are as they have always been."""
    _, boot, ect = planned(registry, "methods=[boot,ect]")
    for cell, told in ((boot, {}), (ect, {"latents": "drawn"})):
        teacher = cell.shared.load_teacher(SILENT)
        plain = train_inputs(cell, teacher)
        drawn = train_inputs(cell, replace(teacher, to_posterior=torch.abs))
        assert drawn == plain | told and "latents" not in plain


def test_flips_are_part_of_keys_and_rows_where_real_images_are_read(registry, tmp_path):
    """boot reads none: it is trained once, with the key that it has always had. Scores are made in the same way."""
    cells = planned(registry, "methods=[boot,ect]", "augment.flip=true,false", "augment.probability=0")
    assert described(cells) == [("boot", "", None), ("ect", "augment.flip=True", {"flip": True}), ("ect", "", None)]
    assert [cell.label for cell in cells][1:] == [
        "boot (seed 0)", "ect augment.flip=True (seed 0)", "ect augment.flip=False (seed 0)",
    ]  # fmt: skip
    flipped, plain = cells[2:]
    assert len({describe_cell(cell, cell.shared.load_teacher(SILENT)).columns["protocol"] for cell in cells}) == 1
    records = [train_cell(cell, {}, tmp_path / str(k), SILENT, Stop()) for k, cell in enumerate((flipped, plain))]
    assert records[0].weights_sha256 != records[1].weights_sha256 and records[0].cost.images == 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["methods=[ect]", "augment.probability=0.1"],
            "augmented images have 9 labels, and this ResidualMLP takes none",
        ),
        (
            ["methods=[sid]", "methods.sid.adversarial=0.1", "methods.sid.layer=blocks.0", "augment.probability=0.1"],
            "sid compares generated images with real ones, which must not be augmented alone",
        ),
    ],
)
def test_augmentation_that_cannot_be_right_is_refused_in_the_plan(registry, words, message):
    with pytest.raises(UserError, match=message):
        planned(registry, *words)


def edm_teacher(edm_writer):
    _, path = edm_writer.network(settings=DDPM | {"in_channels": 1, "out_channels": 1}, img_channels=1)
    return ["teacher=edm", f'teacher.path="{path}"']


@pytest.mark.parametrize("name", ["ect", "sid"])
def test_edm_s_augmentation_is_planned_and_trains_the_weights_of_its_labels(registry, name, edm_writer):
    """Of the student, or of SiD's fake score alone. Each of the nine labels of some image is not 0."""
    own = ["methods.sid.augment=1"] if name == "sid" else ["augment.probability=1"]
    cell = planned(registry, f"methods=[{name}]", *edm_teacher(edm_writer), *own)[-1]
    ((_, settings, augment),) = described([cell])
    assert settings == ("augment=1.0" if name == "sid" else "augment.probability=1.0")
    assert augment == (None if name == "sid" else {"probability": 1.0}) and cell.cost.images == 32
    method = build(cell, cell.shared.load_teacher(SILENT))
    method.start_phase(0)
    generator, augment = torch.Generator().manual_seed(0), cell.shared.config.augment
    read = lambda size: (torch.rand(size, 1, 8, 8, generator=generator), None)
    batch = Batch(16, (1, 8, 8), generator, "cpu", read, augment=augment)
    for network, loss in method.train_step(batch):
        loss.backward()
        trained = network.modules()
        (weights,) = (module.map_augment.weight for module in trained if isinstance(module, SongUNet))
        told = name != "sid" or network is method.fake
        assert (weights.grad is not None and weights.grad.abs().sum(dim=0).min() > 0) == told
        method.zero_grad()


def test_flips_of_latents_are_refused(registry, monkeypatch):
    """They are encoded once, before training."""
    untrained = Trained.untrained
    monkeypatch.setattr(Trained, "untrained", lambda self: replace(untrained(self), to_latents=lambda x: x))
    with pytest.raises(UserError, match=r"augment.flip changes images, and teacher=trained trains students on latents"):
        planned(registry, "methods=[ect]", "augment.flip=true")


def test_a_teacher_s_flips_are_part_of_its_recipe(registry):
    """Without them the recipe, and so the file's name, is what it was."""

    def recipe(*words):
        (config,) = compose_runs([*WORDS, "methods=[boot]", *words], registry)
        return make_source(config, registry, "cpu")[1].recipe()

    plain = recipe()
    assert "flip" not in plain and recipe("teacher.flip=true") == plain | {"flip": True}
