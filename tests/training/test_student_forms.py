"""Training of adapters and of other architectures, by every method: what changes, what it costs, how it resumes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from analytic import make_batch, make_workspace, mlp_teacher, same_weights, weights_of
from by_day import by_day
from distillbench import Denoiser, Method, MethodConfig, Teacher, UserError
from distillbench.diffusion import VPCosine
from distillbench.networks import ResidualMLP
from distillbench.networks.adapters import Adapters
from distillbench.system.signals import Interrupted
from distillbench.teachers.students import StudentForm
from distillbench.testing.method_bench import StopAfter
from distillbench.training.budget import BudgetConfig, Meter
from distillbench.training.build import build_method, restored_method
from distillbench.training.flops import count_flops, denoisers_of, measured_flops, network_flops, training_flops
from distillbench.training.loop import Loop, train
from distillbench.training.optimizers import Optimizers
from distillbench.training.resume import Resume, States
from recorded_progress import RecordingProgress
from tiny_training import METHODS, SILENT

pytest.importorskip("peft")

RANK = 2
LORA = StudentForm(Adapters(RANK, 3.0))
BATCH, STEPS = 4, 8
CASES = by_day(METHODS, ("boot", "cm", "pd", "sid"))


def built(name: str, students: StudentForm = LORA) -> Method:
    cls, settings = METHODS[name]
    return build_method(cls, cls.Config(**settings), mlp_teacher().with_students(students), 0, "cpu")


def trained(method: Method, folder, states: States | None = None, stop_after: int = 10**6):
    generator = torch.Generator().manual_seed(7)
    read = (lambda n: (torch.randn(n, 2, 1, 1, generator=generator), None)) if method.needs_data else None
    workspace = make_workspace(method.teacher, folder, BudgetConfig(images=BATCH * STEPS))
    resume = None if states is None else Resume(states, 1e9, {"read": generator}, stop=StopAfter(stop_after))
    return train(method, method.config, workspace, read, Loop(BATCH), SILENT, resume=resume)


@pytest.mark.parametrize("name", CASES)
def test_adapters_are_trained_and_the_teachers_weights_stay(name, tmp_path):
    method = built(name)
    before = weights_of(method)
    trained(method, tmp_path)
    after = weights_of(method)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert any("lora_B" in key for key in changed)
    frozen = {key for key in after if ".base_layer." in key or (key.startswith("student.") and "norm." in key)}
    assert frozen and not frozen & changed
    fake = {key for key, _ in method.named_parameters() if key.startswith("fake.")}
    assert bool(fake) == (name in ("dmd", "sid")) and not any("lora_" in key for key in fake) and fake <= changed


@pytest.mark.parametrize("name", CASES)
def test_a_restored_student_samples_the_same_with_merged_weights(name, tmp_path):
    method = built(name)
    trained(method, tmp_path)
    cls, settings = METHODS[name]
    teacher = mlp_teacher().with_students(LORA)
    merged = restored_method(cls, cls.Config(**settings), teacher, 0, "cpu", method.state_dict())
    assert not merged.training and not any("lora_" in key for key in merged.state_dict())
    eps = torch.randn(5, 2, 1, 1)
    with torch.no_grad():
        samples = [each.sample(lambda k: eps, 1, teacher.conditioning.of_images(range(5), "cpu"))
                   for each in (method.eval(), merged)]  # fmt: skip
    assert torch.allclose(*samples, atol=1e-5)
    plain = sum(weight.numel() for weight in mlp_teacher().denoiser.parameters())
    assert sum(w.numel() for each in denoisers_of(merged.student) for w in each.parameters()) == plain


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_training_of_adapters_ends_with_the_same_weights(name, tmp_path):
    whole, method = built(name), built(name)
    trained(whole, tmp_path / "whole")
    states = States(tmp_path / "states", 1, RecordingProgress())
    with pytest.raises(Interrupted):
        trained(built(name), tmp_path, states, stop_after=3)
    again = trained(method, tmp_path, states)
    assert same_weights(weights_of(whole), weights_of(method)) and again.cost.images == BATCH * STEPS


def test_adam_has_no_state_of_frozen_weights():
    student = mlp_teacher().with_students(LORA).student()
    optimizers = Optimizers(MethodConfig())
    for _ in range(2):
        optimizers.update(student, student(torch.randn(3, 2, 1, 1), torch.full((3, 1, 1, 1), 0.5)).square().mean(), 1.0)
    (optimizer,) = optimizers.by_network.values()
    with_state = {weight for weight, state in optimizer.state.items() if state}
    assert with_state == {weight for weight in student.parameters() if weight.requires_grad}


# --- cost ------------------------------------------------------------------------------------------------------------


def test_adapters_cost_less_backward_by_hand():
    """Of an m x n layer: 2 r (m + n) more forward; backward no 2mn of W's gradient, but those of A and B."""
    teacher = mlp_teacher()
    w, e, p, features = 16, 128, 2, 64  # width, embedding, pixels, features of the time
    first = [(features, e), (p, w)]  # their inputs need no gradient
    later = [(e, e), (e, 2 * w), (w, w), (w, w), (w, p)]
    full = network_flops(teacher.denoiser, teacher.shape)
    lora = network_flops(teacher.with_students(LORA).student(), teacher.shape, all_weights=False)
    ends = sum(m + n for m, n in first + later)
    assert lora.forward == full.forward + 2 * RANK * ends
    # of A and B, of the input of B, of the layer's input through W and through A
    by_hand = sum(2 * RANK * (m + n) + 2 * RANK * n for m, n in first + later)
    by_hand += sum(2 * m * n + 2 * RANK * m for m, n in later)
    assert lora.backward == by_hand < full.backward


@pytest.mark.parametrize("name", by_day(["cm", "direct online", "pd", "sid", "tract"], ("cm", "sid")))
def test_rows_times_flops_per_row_equal_real_steps(name, tmp_path):
    method = built(name)
    read = (lambda n: (torch.randn(n, 2, 1, 1), None)) if method.needs_data else None
    workspace = make_workspace(method.teacher, tmp_path)
    workspace.meter = meter = Meter(BudgetConfig(), method.teacher, "cpu")

    def steps() -> None:
        method.prepare(workspace)
        for phase in range(len(method.phases())):
            method.start_phase(phase)
            for _, loss in method.train_step(make_batch(6, seed=phase, read=read)):
                loss.backward()
            method.end_phase(phase, method.student)

    counted, cost = count_flops(steps), meter.cost()
    flops = measured_flops(cost.networks, method.teacher, denoisers_of(method))
    assert counted.flops == training_flops(cost.networks, flops)
    assert {rows.trained for rows in cost.networks if 0 < rows.trained < rows.weights}  # rows of adapters


# --- another architecture --------------------------------------------------------------------------------------------

SHAPE = (1, 8, 8)
SMALL = StudentForm(
    architecture={
        "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [4],
        "layers_per_block": 1, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
        "norm_num_groups": 2, "attention_head_dim": 4,
    }
)  # fmt: skip


def teacher_of_images() -> Teacher:
    torch.manual_seed(0)
    network = ResidualMLP(SHAPE, width=8, depth=1)
    nn.init.normal_(network.exit.weight, std=0.1)
    return Teacher("pixels", Denoiser(network, VPCosine(), "v"), SHAPE, "pixels").with_students(SMALL)


@pytest.mark.parametrize("name", ["cm", "direct online"])
def test_methods_that_can_start_fresh_train_another_architecture(name, tmp_path):
    pytest.importorskip("diffusers")
    cls, settings = METHODS[name]
    teacher = teacher_of_images()
    method = build_method(cls, cls.Config(**settings), teacher, 0, "cpu")
    generator = torch.Generator().manual_seed(7)
    read = (lambda n: (torch.randn(n, *SHAPE, generator=generator), None)) if method.needs_data else None
    workspace = make_workspace(teacher, tmp_path, BudgetConfig(images=2 * BATCH))
    cost = train(method, method.config, workspace, read, Loop(BATCH), SILENT).cost
    flops = measured_flops(cost.networks, teacher, denoisers_of(method))
    assert training_flops(cost.networks, flops) > 0
    restored = restored_method(cls, cls.Config(**settings), teacher, 0, "cpu", method.state_dict())
    assert same_weights(weights_of(restored), weights_of(method))
    eps = torch.randn(3, *SHAPE)
    c = teacher.conditioning.of_images(range(3), "cpu")
    assert restored.sample(lambda k: eps, 1, c).shape == eps.shape


@pytest.mark.parametrize("name", ["boot", "pd", "sid", "tract"])
def test_methods_that_start_from_the_teacher_refuse_it(name):
    with pytest.raises(UserError, match=rf"the student of {name} starts from the teacher's weights"):
        cls, settings = METHODS[name]
        build_method(cls, cls.Config(**settings), teacher_of_images(), 0, "cpu")


def test_settings_that_contradict_the_form_are_refused(tmp_path):
    cls, _ = METHODS["ct"]
    with pytest.raises(UserError, match="this method is set to start from the teacher's"):
        build_method(cls, cls.Config(start="teacher"), teacher_of_images(), 0, "cpu")
    with pytest.raises(UserError, match="this method is set to start from random ones"):
        build_method(cls, cls.Config(start="fresh"), mlp_teacher().with_students(LORA), 0, "cpu")
