"""Teachers of any architecture that diffusers has, trained by the harness."""

import json

import pytest
import torch

from distillbench.builtin import trained
from distillbench.builtin.trained import Trained
from distillbench.cli import commands
from distillbench.diffusion.conditioning import Condition, Conditioning
from distillbench.errors import UserError
from distillbench.networks.architectures import DiT
from distillbench.registry import load_registry
from distillbench.system.progress import Progress

UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.35.0",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
TRANSFORMER = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
    "norm_num_groups": 1,
}


def digits():
    cls = load_registry().get("datasets", "digits").cls
    return cls(cls.Config(kind="digits"))


def source(folder, classes=0, **settings):
    settings = {"batch_size": 32, **settings}
    config = Trained.Config(kind="trained", **settings)
    config.budget.images = 64
    return Trained(config, digits(), folder, "cpu", Conditioning(classes))


def test_keys_of_an_architecture_that_are_not_understood_are_named(tmp_path):
    assert source(tmp_path, architecture=written(tmp_path, UNET)).notes() == []
    asked = source(tmp_path, architecture=written(tmp_path, UNET | {"twist": 3}))
    assert asked.notes() == ["config.json: UNet2DModel has no parameter twist: ignored"]
    assert list(source(tmp_path).notes()) == []


def written(folder, config):
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return str(file)


@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        ({"network": "dit", "width": 16, "depth": 1}, 0),
        ({"network": "dit", "width": 16, "depth": 1}, 10),
        ({"architecture": UNET}, 0),
        ({"architecture": UNET | {"num_class_embeds": 11}}, 10),
        ({"architecture": TRANSFORMER}, 10),
        ({"architecture": TRANSFORMER | {"num_embeds_ada_norm": 1}}, 0),
    ],
    ids=["dit", "dit-classes", "unet-file", "unet-file-classes", "dit-file-classes", "dit-file"],
)
def test_it_is_trained_kept_and_found_again(settings, classes, tmp_path):
    if "architecture" in settings:
        settings = settings | {"architecture": written(tmp_path, settings["architecture"])}
    made = source(tmp_path, classes, **settings)
    assert made.plan().origin == "to be trained"
    teacher = made.load(Progress(None))
    again = source(tmp_path, classes, **settings)
    assert again.plan().origin.endswith(".safetensors")
    x, t = torch.randn(4, 1, 8, 8), torch.full((4, 1, 1, 1), 0.4).double()
    c = Condition(torch.tensor([0, 3, 9, 10])) if classes else Condition()
    f = teacher.denoise(x, t, c)
    assert torch.equal(again.load(Progress(None)).denoise(x, t, c), f) and torch.isfinite(f).all()
    if classes:
        assert not torch.allclose(teacher.denoise(x, t, Condition(torch.tensor([1, 4, 8, 9]))), f)
    student = teacher.student()
    e = torch.zeros(4, student.network.embedding_channels, requires_grad=True)
    torch.testing.assert_close(student(x, t, c, e), f)
    student(x, t, c, e).sum().backward()
    assert e.grad is not None and e.grad.abs().sum() > 0
    assert all(p.grad is not None for n, p in student.named_parameters() if "proj_attn" not in n)


def test_a_dit_sees_time_and_place():
    network = DiT((1, 8, 8), width=16, depth=1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 1, 8, 8)
    out = network(x, torch.tensor([0.1, 0.1]))
    assert not torch.allclose(out, network(x, torch.tensor([0.9, 0.9])))
    turned = network(x.flip(-1), torch.tensor([0.1, 0.1])).flip(-1)
    assert not torch.allclose(out, turned)


@pytest.mark.parametrize(
    ("config", "classes", "message"),
    [
        (UNET | {"in_channels": 3}, 0, "does not fit images of"),
        (UNET | {"sample_size": 16}, 0, "does not fit images of"),
        (
            UNET | {"_class_name": "UNet3D"},
            0,
            "_class_name must be one of UNet2DModel, DiTTransformer2DModel, got 'UNet3D'",
        ),
        (UNET, 10, "cannot serve conditional=true with 10 classes"),
        (TRANSFORMER, 0, "cannot serve conditional=false"),
        ([], 0, "is not a diffusers config.json"),
    ],
)
def test_an_architecture_that_does_not_fit_is_one_message(config, classes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        source(tmp_path, classes, architecture=written(tmp_path, config)).untrained()


def test_an_architecture_is_the_whole_network(tmp_path, capsys):
    with pytest.raises(SystemExit):
        commands.main(
            ["score", "dataset=digits", "teacher.architecture=x.json", "teacher.width=8", f"results_dir={tmp_path}"]
        )
    assert "teacher.architecture describes the whole network" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot read"):
        source(tmp_path, architecture=str(tmp_path / "none.json")).untrained()


def test_a_teachers_training_that_is_cut_off_goes_on(tmp_path, monkeypatch):
    """Every step keeps a state; the third step's process dies before it."""
    monkeypatch.setattr(trained, "SECONDS_BETWEEN_STATES", 0.0)
    config = {"width": 8, "depth": 1, "network": "mlp", "batch_size": 16}
    whole = source(tmp_path / "whole", **config).load(Progress(None))
    losses, step = [], trained.DenoisingTraining.train_step

    def dies(self, batch):
        losses.append(batch)
        if len(losses) == 3:
            raise KeyboardInterrupt
        yield from step(self, batch)

    monkeypatch.setattr(trained.DenoisingTraining, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        source(tmp_path / "cut", **config).load(Progress(None))
    monkeypatch.setattr(trained.DenoisingTraining, "train_step", step)
    assert list(tmp_path.glob("cut/*.states/state-000000000032-*"))
    assert source(tmp_path / "cut", **config).load(Progress(None)).sha256 == whole.sha256
    assert [path.suffix for path in (tmp_path / "cut").iterdir()] == [".safetensors"]
