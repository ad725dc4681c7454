"""teacher=edm: files in the format of NVIDIA's EDM release, written here as its training script writes them."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillbench.builtin import edm
from distillbench.builtin.edm import PUBLISHED, Edm
from distillbench.diffusion.conditioning import UNCONDITIONAL, WITHOUT_CLASSES, Condition, Conditioning
from distillbench.diffusion.samplers import Solver
from distillbench.errors import UserError
from distillbench.networks.edm import DhariwalUNet, SongUNet
from distillbench.registry import check_class
from distillbench.system.progress import Progress
from edm_files import DDPM, EDMPrecond, edm_source

SILENT = Progress(None)
NCSN = DDPM | {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "dropout": np.float64(0.13),
}


def batch(labels: list[int] | None = None) -> tuple[Tensor, Tensor, Condition]:
    """x_t, t and c of four images at noise levels between the ends."""
    t = torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=torch.float64).view(-1, 1, 1, 1)
    x_t = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * (0.25 + t**2).sqrt().float()
    return x_t, t, UNCONDITIONAL if labels is None else Condition(torch.tensor(labels))


ARCHITECTURES = [(SongUNet, DDPM), (SongUNet, NCSN), (DhariwalUNet, DDPM | {"label_dim": 5, "model_channels": 64})]


@pytest.mark.parametrize("cls, settings", ARCHITECTURES)
def test_a_file_denoises_as_the_network_that_it_was_written_from(edm_writer, cls, settings):
    wrapper, path = edm_writer.network(cls, settings)
    classes = settings.get("label_dim", 0)
    family = edm_source(path, conditioning=Conditioning(classes))
    assert family.plan().origin == path.name
    teacher = family.load(SILENT)
    x_t, t, c = batch([0, 4, 2, 5] if classes else None)
    with torch.no_grad():
        assert torch.allclose(teacher.denoise(x_t, t, c), wrapper(x_t, t.float(), c), rtol=1e-5, atol=1e-5)
    assert not edm_writer.marker.exists()
    assert (teacher.shape, teacher.conditioning.classes, teacher.denoiser.prediction) == ((3, 8, 8), classes, "edm")
    assert (teacher.schedule.t_min, teacher.schedule.t_max) == (0.002, 80.0)
    assert teacher.provenance["settings"]["model_channels"] == settings["model_channels"]


def test_the_code_in_the_test_file_would_run_in_an_unpickler(edm_writer):
    _, path = edm_writer.network()
    with pytest.raises(Exception):  # noqa: B017
        pickle.loads(path.read_bytes()).ema  # noqa: B018
    assert edm_writer.marker.exists()


def test_other_objects_in_the_file_obey_the_same_rules(edm_writer):
    wrapper, _ = edm_writer.network()
    with pytest.raises(UserError, match=r"asks for 'functools\.partial'"):
        edm_source(edm_writer.write({"ema": wrapper, "augment_pipe": partial(print)})).plan()


def test_it_is_registered_by_name():
    check_class("teachers", Edm)
    found = []
    edm.register_teachers(found.append)
    assert found == [Edm] and Edm.name == "edm" and Edm.reads == "classes"


# --- students --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls, settings", ARCHITECTURES)
def test_students_start_as_copies_and_train(edm_writer, cls, settings):
    classes = settings.get("label_dim", 0)
    teacher = edm_source(edm_writer.network(cls, settings)[1], conditioning=Conditioning(classes)).load(SILENT)
    x_t, t, c = batch([0, 4, 2, 5] if classes else None)
    student = teacher.student()
    before = teacher.denoise(x_t, t, c)
    assert torch.equal(student(x_t, t, c), before)  # nothing is forgotten: students drop no features
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    student(x_t, t, c).square().mean().backward()
    optimizer.step()
    assert not torch.equal(student(x_t, t, c), before) and torch.equal(teacher.denoise(x_t, t, c), before)
    copied = copy.deepcopy(student)
    assert torch.equal(copied(x_t, t, c), student(x_t, t, c))


def test_students_may_start_random_and_get_a_second_time(edm_writer):
    teacher = edm_source(edm_writer.network()[1]).load(SILENT)
    x_t, t, c = batch()
    fresh = teacher.student(fresh=True)
    assert not torch.allclose(fresh(x_t, t, c), teacher.denoise(x_t, t, c))
    embedding = torch.randn(4, fresh.network.embedding_channels)
    student = teacher.student()
    assert not torch.allclose(student(x_t, t, c, embedding), student(x_t, t, c))


def test_students_use_dropout_if_asked_to(edm_writer):
    path = edm_writer.network(settings=NCSN)[1]
    teacher = edm_source(path, dropout=0.5).load(SILENT)
    x_t, t, c = batch()
    assert torch.equal(teacher.denoise(x_t, t, c), teacher.denoise(x_t, t, c))
    student = teacher.student()
    assert not torch.equal(student(x_t, t, c), student(x_t, t, c))
    with pytest.raises(UserError, match="dropout must be at least 0 and below 1"):
        edm_source(path, dropout=1.0)


def test_a_dry_run_has_the_same_architecture(edm_writer):
    family = edm_source(edm_writer.network(settings=NCSN)[1])
    untrained, teacher = family.untrained(), family.load(SILENT)
    shapes = [{n: w.shape for n, w in one.denoiser.network.state_dict().items()} for one in (untrained, teacher)]
    assert shapes[0] == shapes[1] and untrained.sha256 == "untrained"
    assert untrained.denoise(*batch()).shape == (4, 3, 8, 8)


def test_the_hash_is_that_of_the_weights_and_their_reading(edm_writer):
    (wrapper, path), content = edm_writer.network(), {}
    first = edm_source(path).load(SILENT).sha256
    content["ema"] = wrapper
    assert edm_source(edm_writer.write(content, "other-name.pkl")).load(SILENT).sha256 == first
    wrapper.sigma_max = 40.0
    assert edm_source(edm_writer.write(content)).load(SILENT).sha256 != first
    wrapper.sigma_max = math.inf
    wrapper.model.map_layer1.bias.data[0] += 1e-3
    assert edm_source(edm_writer.write(content)).load(SILENT).sha256 != first


def test_half_precision_weights_are_read_in_float32(edm_writer):
    wrapper, _ = edm_writer.network()
    built_with = wrapper.model.built_with
    wrapper.half().model.built_with = built_with
    teacher = edm_source(edm_writer.write({"ema": wrapper})).load(SILENT)
    assert {w.dtype for w in teacher.denoiser.state_dict().values()} == {torch.float32}


def test_noise_levels_are_those_of_the_network(edm_writer):
    wrapper, _ = edm_writer.network(sigma_min=0.01, sigma_max=50)
    teacher = edm_source(edm_writer.write({"ema": wrapper})).load(SILENT)
    assert (teacher.schedule.t_min, teacher.schedule.t_max) == (0.01, 50.0)


def test_positional_arguments_are_known_by_their_order(edm_writer):
    wrapper, _ = edm_writer.network()
    path = edm_writer.write({"ema": wrapper})
    kwargs = wrapper.model.built_with

    content = edm.read_pickle(path)
    record = content["ema"].state["_modules"]["model"]
    first = ("img_resolution", "in_channels", "out_channels")
    record.state["_init_args"] = tuple(kwargs[name] for name in first)
    record.state["_init_kwargs"] = {name: value for name, value in kwargs.items() if name not in first}
    assert edm._settings(path, record) == kwargs


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_a_missing_file_gives_the_command_and_what_is_accepted():
    with pytest.raises(UserError, match=r"teacher\.path: no file 'nowhere/edm\.pkl'\. Possible") as caught:
        edm_source("nowhere/edm.pkl", name="afhqv2").plan()
    message = str(caught.value)
    assert all(published in message for published in PUBLISHED.values()) and "NVlabs/edm on GitHub" in message
    command = "distillbench run 'methods=[boot,cm]' dataset=afhqv2 teacher=edm teacher.path=FOLDER/"
    assert message.endswith(command + "edm-afhqv2-64x64-uncond-vp.pkl")


def test_without_a_path_the_released_network_that_fits_is_named_with_the_line_that_downloads_it():
    def message(shape=(3, 64, 64), conditioning=WITHOUT_CLASSES, **settings):
        with pytest.raises(UserError) as caught:
            edm_source("", shape, conditioning, **settings).plan()
        return str(caught.value)

    line = "distillbench run 'methods=[boot,cm]' dataset=ffhq teacher=edm"
    found = message()
    assert found.startswith(
        "teacher=edm has no file yet: EDM, FFHQ at 64x64, unconditional, vp (DDPM++) (licence: CC BY-NC-"
    )
    assert f"{line} teacher.download=true\n" in found and "/edm-ffhq-64x64-uncond-vp.pkl, by NVIDIA" in found
    found = message(release="edm-ffhq-64-ve")
    assert f"{line} teacher.release=edm-ffhq-64-ve teacher.download=true\n" in found
    assert "edm-imagenet-64x64-cond-adm.pkl" in message(name="imagenet64", conditioning=Conditioning(1000))
    found = message(name="imagenet64")
    assert "for dataset=imagenet64 at 64x64 and conditional=false (for conditional=true there is edm-imag" in found
    assert "no released network is known for dataset=digits at 8x8" in message((1, 8, 8), name="digits")


def test_a_teacher_of_other_images_or_classes_is_refused(edm_writer):
    _, path = edm_writer.network(settings=DDPM | {"label_dim": 5})
    for call in ("plan", "untrained"):
        with pytest.raises(UserError, match=r"its images are \(C,H,W\) = \(3, 8, 8\), the dataset's are \(1, 8, 8\)"):
            getattr(edm_source(path, (1, 8, 8), Conditioning(5)), call)()
    with pytest.raises(UserError, match="has 5 classes and does not support conditional=false"):
        edm_source(path).plan()
    with pytest.raises(UserError, match="has 5 classes and does not support conditional=true with 7 classes"):
        edm_source(path, conditioning=Conditioning(7)).plan()


def test_guidance_needs_an_unconditional_prediction(edm_writer):
    _, path = edm_writer.network(settings=DDPM | {"label_dim": 5})
    for guided in (Conditioning(5, w=2.0), Conditioning(5, w_range=(1.0, 4.0))):
        with pytest.raises(UserError, match=r"trained without label dropout \(label_dropout=0\)"):
            edm_source(path, conditioning=guided).plan()
    _, path = edm_writer.network(settings=DDPM | {"label_dim": 5, "label_dropout": 0.1})
    teacher = edm_source(path, conditioning=Conditioning(5)).load(SILENT).conditioned(Conditioning(5, w=2.0))
    x_t, t, _ = batch()
    c = Condition(torch.tensor([0, 1, 2, 3]), torch.full((4, 1, 1, 1), 2.0))
    none, plain = Condition(torch.full((4,), 5)), Condition(c.labels)
    expected = 2 * teacher.denoiser(x_t, t, plain) - teacher.denoiser(x_t, t, none)
    assert torch.allclose(teacher.denoise(x_t, t, c), expected, atol=1e-4)


@pytest.mark.parametrize("attributes, words", [
    ({"sigma_data": 1.0}, r"its sigma_data is 1\. Possible: 0\.5"),
    ({"sigma_data": "0.5"}, "its sigma_data is not a number"),
    ({"sigma_max": 0.001}, "its noise levels do not overlap 0.002 to 80"),
    ({"sigma_min": math.nan}, "its sigma_min is not a number"),
])  # fmt: skip
def test_other_preconditioning_is_refused(edm_writer, attributes, words):
    with pytest.raises(UserError, match=words):
        edm_source(edm_writer.network(**attributes)[1]).plan()


@pytest.mark.parametrize("settings, words", [
    ({"resample_mode": 1}, "SongUNet: got an unexpected keyword argument 'resample_mode'"),
    ({"encoder_type": "wavelet"}, "cannot be built: encoder_type must be one of standard, skip, residual"),
    ({"model_channels": 16}, r"its enc.8x8_conv.weight has shape \(8, 3, 3, 3\), expected \(16, 3, 3, 3\)"),
    ({"model_channels": 10**9}, "its model_channels is '1000000000'"),
    ({"model_channels": 65536, "channel_mult_emb": 65536}, "cannot be built|has shape"),
    ({"num_blocks": 2}, "it has a tensor 'dec.4x4_block1.norm2.bias', unlike the SongUNet that it describes"),
    ({"num_blocks": 10**4}, "its num_blocks is 10000"),
    ({"num_blocks": "many"}, "its num_blocks is many"),
    ({"num_blocks": 1.5}, "its num_blocks is 1.5"),
    ({"channel_mult": [1] * 100}, "its channel_mult is"),
    ({"channel_mult": None}, "its channel_mult is 'None'"),
    ({"channel_mult": [[1], 2]}, "its channel_mult is"),
    ({"channel_mult": 2}, "cannot be built"),
    ({"dropout": -1}, "its dropout is '-1'"),
    ({"img_resolution": 9}, "cannot be halved 1 times"),
    ({"img_resolution": "8"}, "cannot be built"),
    ({"label_dim": 3}, "it has no 'map_label.bias'"),
    ({"augment_dim": 0}, "it has a tensor 'map_augment.weight'"),
    ({"out_channels": 6}, "it has 3 input and 6 output channels"),
])  # fmt: skip
def test_a_description_that_does_not_match_the_weights_is_refused(edm_writer, settings, words):
    wrapper, _ = edm_writer.network()
    wrapper.model.built_with = wrapper.model.built_with | settings
    with pytest.raises(UserError, match=words) as caught:
        edm_source(edm_writer.write({"ema": wrapper})).plan()
    assert str(caught.value).startswith("teacher.path: 'network-snapshot-001000.pkl' is not an EDM network: ")


@pytest.mark.parametrize("change, words", [
    (lambda content: [content], "not a dict with a network as 'ema'"),
    (lambda content: {"model": content["ema"]}, "not a dict with a network as 'ema'"),
    (lambda content: {"ema": {"weights": torch.ones(2)}}, "not a dict with a network as 'ema'"),
    (lambda content: {"ema": content["ema"].model}, "its preconditioning is 'SongUNet'. Possible: EDMPrecond"),
    (lambda content: {"ema": EDMPrecond(linear())}, "its architecture is 'Linear'. Possible: SongUNet, Dhariwal"),
])  # fmt: skip
def test_other_contents_are_refused(edm_writer, change, words):
    wrapper, _ = edm_writer.network()
    with pytest.raises(UserError, match=words):
        edm_source(edm_writer.write(change({"ema": wrapper}))).plan()


def linear() -> nn.Module:
    layer = nn.Linear(1, 1)
    layer.classes = 0
    return layer


def test_a_module_that_occurs_twice_is_refused(edm_writer):
    """Doubling modules would take exponential time to walk through."""
    wrapper, _ = edm_writer.network()
    inner: nn.Module = nn.ModuleDict()
    for _ in range(60):
        inner = nn.ModuleDict({"a": inner, "b": inner})
    wrapper.model.extra = inner
    with pytest.raises(UserError, match="not made of modules, parameters and buffers"):
        edm_source(edm_writer.write({"ema": wrapper})).plan()


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "edm.pkl"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"'edm\.pkl' is (refused|not a readable pickle)"):
        edm_source(path).plan()


def test_sampling_from_a_file_gives_finite_images(edm_writer):
    teacher = edm_source(edm_writer.network(settings=NCSN)[1]).load(SILENT)
    eps = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        images = Solver.parse("heun").solve(teacher.denoise, teacher.schedule, eps, 3)
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
