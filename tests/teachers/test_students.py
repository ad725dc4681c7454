"""The students that a teacher makes: its copies, adapters of it, or another architecture."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from analytic import mlp_teacher, same_weights, time, weights_of
from distillbench import Conditioning, Denoiser, Teacher, UserError
from distillbench.diffusion import SCHEDULES, VPCosine
from distillbench.networks import ResidualMLP
from distillbench.networks.adapters import Adapters
from distillbench.teachers.students import AS_TEACHER, StudentConfig, StudentForm

X, T = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(1)), time([0.2, 0.5, 0.7, 1.0])
SHAPE = (1, 8, 8)
SMALL = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.35.0", "sample_size": 8, "in_channels": 1, "out_channels": 1,
    "block_out_channels": [8], "layers_per_block": 1, "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"], "norm_num_groups": 4,
}  # fmt: skip


def adapters(**settings) -> StudentForm:
    pytest.importorskip("peft")
    return StudentForm.of(StudentConfig(lora_rank=2, **settings))


def architecture(tmp_path, **changes) -> StudentForm:
    (tmp_path / "config.json").write_text(json.dumps(SMALL | changes))
    return StudentForm.of(StudentConfig(architecture=str(tmp_path / "config.json")))


def pixels(prediction: str = "v", schedule: str = "vp_cosine", **more) -> Teacher:
    network = ResidualMLP(SHAPE, width=8, depth=1, classes=more["conditioning"].classes if more else 0)
    return Teacher("pixels", Denoiser(network, SCHEDULES[schedule](), prediction), SHAPE, "pixels", **more)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": -1}, "lora_rank must lie between 0 and 65536, got -1"),
        ({"lora_alpha": 2.0}, "lora_alpha needs lora_rank above 0"),
        ({"lora_targets": ["to_q"]}, "lora_targets needs lora_rank above 0"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha must be positive"),
        ({"lora_rank": 2, "architecture": "x.json"}, "use one of them"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        StudentConfig(**settings)


def test_a_form_names_what_it_changes(tmp_path):
    assert StudentForm.of(StudentConfig()) == AS_TEACHER and AS_TEACHER.plain() == {}
    assert (AS_TEACHER.rank, AS_TEACHER.architecture_label) == (None, "")
    form = StudentForm.of(StudentConfig(lora_rank=4))
    assert form.adapters == Adapters(4, 4.0) and form.adapters.scale == 1
    assert form.plain() == {"lora_rank": 4, "lora_alpha": 4.0, "lora_targets": []}
    assert StudentForm.of(StudentConfig(lora_rank=4, lora_alpha=8.0)).adapters.scale == 2
    small = architecture(tmp_path)
    assert small.plain() == {"architecture": {k: v for k, v in SMALL.items() if k != "_diffusers_version"}}
    assert all(StudentForm.from_plain(each.plain()) == each for each in (AS_TEACHER, form, small))
    assert small.architecture_label.startswith("UNet2DModel-")
    assert small.architecture_label != architecture(tmp_path, layers_per_block=2).architecture_label


def test_a_missing_or_strange_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"student\.architecture: cannot read '/nowhere/x\.json'"):
        StudentForm.of(StudentConfig(architecture="/nowhere/x.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match=r"student\.architecture: 'list\.json' is not a diffusers config\.json"):
        StudentForm.of(StudentConfig(architecture=str(tmp_path / "list.json")))


# --- the default -----------------------------------------------------------------------------------------------------


def test_by_default_a_student_is_a_copy_and_draws_no_random_number():
    teacher = mlp_teacher()
    before = torch.get_rng_state()
    for student in (teacher.student(), teacher.student(fresh=False), teacher.trainable_copy()):
        assert same_weights(weights_of(student), weights_of(teacher.denoiser))
        assert student.training and all(weight.requires_grad for weight in student.parameters())
        assert student.counted.counter is teacher.student_rows
    assert torch.equal(torch.get_rng_state(), before)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_start_as_the_teacher_and_only_they_are_trained():
    teacher = mlp_teacher().with_students(adapters())
    student = teacher.student()
    assert torch.equal(student(X, T), teacher.denoise(X, T))
    trained = [name for name, weight in student.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not any("lora_" in name for name, _ in teacher.denoiser.named_parameters())


def test_other_networks_are_no_adapters_and_frozen_copies_of_students_are():
    teacher = mlp_teacher().with_students(adapters())
    copy, frozen = teacher.trainable_copy(), teacher.frozen_copy()
    assert same_weights(weights_of(copy), weights_of(teacher.denoiser))
    assert all(weight.requires_grad for weight in copy.parameters())
    assert frozen.state_dict().keys() == teacher.student().state_dict().keys()
    assert not any(weight.requires_grad for weight in frozen.parameters())
    assert frozen.counted.counter is teacher.teacher_rows


def test_the_embedding_of_a_guidance_weight_is_trained_beside_the_adapters():
    network = ResidualMLP((2, 1, 1), width=8, depth=1, classes=3)
    conditioning = Conditioning(3, 2.0, (1.0, 3.0))
    teacher = Teacher("w", Denoiser(network, VPCosine(), "v"), (2, 1, 1), "w", conditioning=conditioning)
    student = teacher.with_students(adapters()).student()
    assert student.guidance is not None and all(weight.requires_grad for weight in student.guidance.parameters())


def test_adapters_need_the_teachers_weights():
    teacher = mlp_teacher().with_students(adapters())
    with pytest.raises(UserError, match=r"student\.lora_rank=2: adapters need the teacher's weights"):
        teacher.student(fresh=True)


# --- another architecture --------------------------------------------------------------------------------------------


def test_another_architecture_has_random_weights_and_the_teachers_inputs(tmp_path):
    pytest.importorskip("diffusers")
    teacher = pixels().with_students(architecture(tmp_path))
    torch.manual_seed(3)
    one = teacher.student()
    torch.manual_seed(3)
    assert same_weights(weights_of(one), weights_of(teacher.student(fresh=True)))
    assert not same_weights(weights_of(one), weights_of(teacher.student()))
    x = torch.randn(4, *SHAPE)
    assert one(x, T).shape == x.shape and all(weight.requires_grad for weight in one.parameters())
    assert teacher.frozen_copy().state_dict().keys() == one.state_dict().keys()
    assert same_weights(weights_of(teacher.trainable_copy()), weights_of(teacher.denoiser))
    with pytest.raises(UserError, match="starts from random weights, and this method is set to start from the teacher"):
        teacher.student(fresh=False)


@pytest.mark.parametrize(("prediction", "schedule"), [("v", "vp_cosine"), ("edm", "ve"), ("flow", "flow_matching")])
def test_its_times_reach_at_most_1000(prediction, schedule, tmp_path):
    pytest.importorskip("diffusers")
    student = pixels(prediction, schedule).with_students(architecture(tmp_path)).student()
    given = []
    student.network.inner.wrapped.time_proj.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    for t in (student.schedule.t_min, student.schedule.t_max):
        assert torch.isfinite(student(torch.zeros(2, *SHAPE), time([t, t]))).all()
    assert torch.cat(given).abs().max().item() == pytest.approx(1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 3}, r"student\.architecture: an architecture of 3 to 1 channels, 8 does not fit images"),
        ({"sample_size": 16}, r"1 to 1 channels, 16 does not fit images of \(C,H,W\) = \(1, 8, 8\)"),
        ({"_class_name": "AutoencoderKL"}, "_class_name must be one of UNet2DModel, DiTTransformer2DModel, got 'Auto"),
        ({"num_class_embeds": 4}, "a UNet2DModel of 3 or 4 classes, and the teacher has no classes"),
        ({"time_embedding_type": "fourier"}, "embeds the logarithm of the time"),
        ({"down_block_types": ["NoBlock"]}, r"student\.architecture: NoBlock does not exist"),
        ({"norm_num_groups": 3}, r"student\.architecture: num_channels \(8\) must be divisible"),
    ],
)
def test_an_architecture_that_does_not_fit(changes, message, tmp_path):
    pytest.importorskip("diffusers")
    with pytest.raises(UserError, match=message):
        pixels().with_students(architecture(tmp_path, **changes)).student()


def test_classes_need_a_row_each_and_one_for_none(tmp_path):
    pytest.importorskip("diffusers")
    teacher = pixels(conditioning=Conditioning(3))
    with pytest.raises(UserError, match="of no classes, and the teacher has 3 classes and a row for no class"):
        teacher.with_students(architecture(tmp_path)).student()
    student = teacher.with_students(architecture(tmp_path, num_class_embeds=4)).student()
    c = teacher.conditioning.of_images(range(4), "cpu")
    assert student(torch.randn(4, *SHAPE), T, c).shape == (4, *SHAPE)


def test_a_text_to_image_teacher_has_no_small_students(tmp_path):
    texts = dataclasses.replace(Conditioning(3), texts=SimpleNamespace())
    with pytest.raises(UserError, match=r"take no texts and no images to enlarge.*student\.lora_rank"):
        pixels(conditioning=texts).with_students(architecture(tmp_path)).student()
