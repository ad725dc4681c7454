"""What a row of a network is counted as, and that rows times FLOPs per row are the FLOPs of the step that ran.

Truth is torch's own FLOP counter over the same step.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from analytic import mlp_teacher, time
from distillbench.diffusion.denoiser import Counter, Denoiser
from distillbench.diffusion.modes import frozen_weights
from distillbench.diffusion.schedules import VPCosine
from distillbench.errors import Unavailable
from distillbench.networks.architectures import DiT, ResidualMLP, UNet
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import BudgetConfig, Limit, Meter, TrainingCost
from distillbench.training.flops import count_flops, measured_flops, network_flops, training_flops

B = 4
LAYERS = {"ResidualMLP": "blocks.0.inner", "UNet": "unet.mid_block", "DiT": "inner.transformer.transformer_blocks.0"}


def counts(counter: Counter) -> tuple[int, int, int, int]:
    """Rows in units of B: forward, with a backward pass to weights, to the input only, with a tangent."""
    rows = counter.kinds.values()
    found = [sum(getattr(r, name) for r in rows) // B for name in ("forward", "to_weights", "to_input", "along")]
    assert counter.rows == B * found[0] and counter.rows_along == B * found[3]
    assert counter.rows_with_gradient == B * (found[1] + found[2])
    return tuple(found)


def inputs(shape):
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(B, *shape, generator=generator) for _ in range(2))
    t = torch.rand(B, 1, 1, 1, generator=generator, dtype=torch.float64)
    return x, 0.1 + 0.8 * t, direction


# Each takes a step of one evaluation (or two) of `f` in its own way. The loss is differentiated if there is one.


def evaluated(f, x, t, v):
    with torch.no_grad():
        f(x, t)


def trained(f, x, t, v):
    return f(x, t).square().mean()


def through_the_input(f, x, t, v):
    x = x.clone().requires_grad_()
    with frozen_weights(f):
        return f(x, t).square().mean()


def tangent_alone(f, x, t, v):
    with torch.no_grad():
        jvp(f, (x, t), (v, torch.ones_like(t)))


def tangent_within_no_grad(f, x, t, v):
    def frozen(x, t):
        with torch.no_grad():
            return f(x, t)

    jvp(frozen, (x, t), (v, torch.ones_like(t)))


def trained_through_the_primal(f, x, t, v):
    """MeanFlow: one pass gives the prediction, which is trained, and its derivative, which is not."""
    u, du = jvp(f, (x, t), (v, torch.ones_like(t)))
    return (u - (v - du).detach()).square().mean()


def dual_numbers(f, x, t, v):
    with forward_ad.dual_level():
        u, du = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v), forward_ad.make_dual(t, torch.ones_like(t))))
        return (u - du.detach()).square().mean()


def captured(f, x, t, v):
    """Evaluated within jvp, but not on what the derivative is along."""
    u, _ = jvp(lambda y: f(x, t) + y, (v,), (v,))
    return u.square().mean()


def reverse_in_the_input(f, x, t, v):
    with torch.no_grad():
        vjp(lambda x: f(x, t), x)[1](v)


def through_features(f, x, t, v):
    """The gradient reaches the layers before a feature."""
    _, features = f.features([LAYERS[type(f.network).__name__]], x, t, f_gradient=False)
    return sum(feature.square().mean() for feature in features.values())


def through_features_and_f(f, x, t, v):
    out, features = f.features([LAYERS[type(f.network).__name__]], x, t)
    return out.square().mean() + sum(feature.square().mean() for feature in features.values())


def through_features_to_the_input(f, x, t, v):
    with frozen_weights(f):
        return through_features(f, x.clone().requires_grad_(), t, v)


def both_ways(f, x, t, v):
    trained(f, x, t, v).backward()
    tangent_alone(f, x, t, v)
    return through_the_input(f, x, t, v)


WAYS = {  # forward, to weights, to input, along
    evaluated: (1, 0, 0, 0),
    trained: (1, 1, 0, 0),
    through_the_input: (1, 0, 1, 0),
    tangent_alone: (1, 0, 0, 1),
    tangent_within_no_grad: (1, 0, 0, 1),
    trained_through_the_primal: (1, 1, 0, 1),
    dual_numbers: (1, 1, 0, 1),
    captured: (1, 1, 0, 0),
    reverse_in_the_input: (1, 0, 1, 0),
    both_ways: (3, 1, 1, 1),
    through_features: (1, 1, 0, 0),
    through_features_and_f: (1, 1, 0, 0),
    through_features_to_the_input: (1, 0, 1, 0),
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_rows_are_counted_by_what_is_computed_with_them(way):
    student = mlp_teacher().student()
    loss = way(student, *inputs((2, 1, 1)))
    assert counts(student.counted.counter) == WAYS[way]
    assert loss is None or loss.requires_grad


def test_weights_given_to_a_functional_call_are_counted_too():
    student, (x, t, _) = mlp_teacher().student(), inputs((2, 1, 1))
    weights = {name: weight.detach() for name, weight in student.named_parameters()}
    grad(lambda weights: functional_call(student, weights, (x, t)).square().mean())(weights)
    assert counts(student.counted.counter) == (1, 1, 0, 0)


NETWORKS = {
    "mlp": lambda: ResidualMLP((2, 1, 1), width=16, depth=1),
    "unet": lambda: UNet((1, 8, 8), width=8, depth=1),
    "dit": lambda: DiT((1, 8, 8), width=64, depth=2),
}
SHAPES = {"mlp": (2, 1, 1), "unet": (1, 8, 8), "dit": (1, 8, 8)}


class Adapter(nn.Module):
    """W x + B A x with a constant W: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.A, self.B = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.B(self.A(x))


def adapt(network: nn.Module) -> None:
    """Constant weights, and an adapter of rank 2 beside each layer of a block."""
    network.requires_grad_(False)
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and not isinstance(module, Adapter) and layer.in_features >= 16:
                setattr(module, name, Adapter(layer, 2))


def first_block_frozen(network: nn.Module) -> None:
    for parameter in list(network.parameters())[::2]:
        parameter.requires_grad_(False)


CHANGES = {"all": lambda network: None, "adapters": adapt, "half": first_block_frozen}


def step(kind, change, way):
    """(meter's cost, teacher, student, FLOPs that torch counted) of one step."""
    torch.manual_seed(0)
    blank = NETWORKS[kind]
    teacher = Teacher("t", Denoiser(blank(), VPCosine(), "v"), SHAPES[kind], "t", blank=blank)
    student = teacher.student()
    CHANGES[change](student.network)
    meter = Meter(BudgetConfig(), teacher, "cpu")

    def run() -> None:
        loss = way(student, *inputs(SHAPES[kind]))
        if loss is not None:
            loss.backward()

    forward_mode = WAYS[way][3] > 0 and kind != "mlp"
    with sdpa_kernel(SDPBackend.MATH) if forward_mode else nullcontext():
        true = count_flops(run).flops
    return meter.cost(), teacher, student, true


COSTS = [
    *(
        (way, kind, "all")
        for way in (trained, both_ways, tangent_alone, trained_through_the_primal)
        for kind in NETWORKS
    ),
    *((way, kind, "all") for way in (through_features, through_features_to_the_input) for kind in NETWORKS),
    *((way, "mlp", change) for way in (through_features_and_f, through_features) for change in ("adapters", "half")),
    *((way, kind, "adapters") for way in (trained, trained_through_the_primal) for kind in NETWORKS),
    *((way, "mlp", "half") for way in (trained, through_the_input, trained_through_the_primal)),
    *((way, "mlp", "all") for way in (evaluated, tangent_within_no_grad, dual_numbers, captured)),
]  # torch's counter cannot look into vjp


@pytest.mark.parametrize(
    ("way", "kind", "change"), COSTS, ids=lambda each: each if isinstance(each, str) else each.__name__
)
def test_rows_times_flops_are_what_torch_counts(way, kind, change):
    """Exactly, or within 2 % where the attention of another backend has another backward pass."""
    cost, teacher, student, true = step(kind, change, way)
    counted = training_flops(cost.networks, measured_flops(cost.networks, teacher, [student]))
    assert counted == pytest.approx(true, rel=0.02 if kind != "mlp" else 1e-12)


@pytest.mark.parametrize("kind", NETWORKS)
def test_adapters_cost_less_than_full_training_and_a_tangent_two_forward_passes(kind):
    """torch computes W dx and dW x for each layer, although dW = 0."""
    full, adapted = (step(kind, change, trained)[3] for change in ("all", "adapters"))
    assert adapted < 0.9 * full
    forward, tangent = (step(kind, "all", way)[3] for way in (evaluated, tangent_alone))
    assert 2.9 * forward < tangent < 3.3 * forward


def test_a_backward_pass_from_features_costs_less_than_one_from_f():
    """And rows of both are counted apart."""
    teacher = mlp_teacher()
    student, meter = teacher.student(), Meter(BudgetConfig(), teacher, "cpu")
    for way in (through_features, through_features_and_f, trained):
        way(student, *inputs((2, 1, 1)))
    rows = {each.features: each for each in meter.cost().networks}
    assert rows["blocks.0.inner"].to_weights == B and rows[""].to_weights == 2 * B
    (part, whole) = (measured_flops([rows[name]], teacher, [student]).popitem()[1] for name in ("blocks.0.inner", ""))
    assert part.forward == whole.forward and 0 < part.backward < whole.backward
    again = TrainingCost.from_plain(json.loads(json.dumps(asdict(meter.cost()))))  # as a training state has it
    assert again.networks == meter.cost().networks


def test_a_network_whose_class_or_weights_are_gone_has_no_flops():
    cost, teacher, student, _ = step("mlp", "adapters", trained)
    with pytest.raises(Unavailable, match="left none of its class and size"):
        measured_flops(cost.networks, teacher, [])
    student.requires_grad_(True)
    with pytest.raises(Unavailable, match="no longer trains the same weights"):
        measured_flops(cost.networks, teacher, [student])


def test_which_weights_are_trained_is_looked_up_again_in_each_phase():
    teacher = mlp_teacher()
    student, meter = teacher.student(), Meter(BudgetConfig(), teacher, "cpu")
    x, t, _ = inputs((2, 1, 1))
    student(x, t)
    first_block_frozen(student.network)
    meter.look_again()
    student(x, t)
    whole, half = meter.cost().networks
    assert 0 < half.trained < whole.trained == whole.weights == half.weights
    assert whole.to_weights == half.to_weights == B


def test_an_operator_without_a_forward_mode_derivative_is_named():
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return 2 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    class Doubled(nn.Module):
        def forward(self, x, time, embedding=None, c=None):
            return Backward.apply(x)

    denoiser = Denoiser(Doubled(), VPCosine(), "v")
    assert network_flops(denoiser, (2, 1, 1)).along == 0
    with pytest.raises(Unavailable, match="no forward-mode derivative"):
        network_flops(denoiser, (2, 1, 1), along=True)


def test_a_budget_of_evaluations_counts_a_tangent_as_one_more():
    teacher = mlp_teacher()
    meter = Meter(BudgetConfig(limit=Limit.nfe, nfe=10 * B), teacher, "cpu")
    tangent_alone(teacher.denoise, *inputs((2, 1, 1)))
    evaluated(teacher.student(), *inputs((2, 1, 1)))
    cost = meter.cost()
    assert (cost.teacher_nfe, cost.teacher_along, cost.student_nfe, cost.student_along) == (B, B, B, 0)
    assert meter.spent() == 3 * B and meter.progress() == 0.3


def test_what_is_paused_and_what_is_charged_is_in_the_rows_of_networks():
    teacher = mlp_teacher()
    x, t = torch.zeros(B, 2, 1, 1), time([0.5] * B)
    teacher.denoise(x, t)  # before training
    meter = Meter(BudgetConfig(), teacher, "cpu")
    teacher.denoise(x, t)
    with meter.pause():
        teacher.denoise(x, t)
        teacher.student()(x, t)
    meter.charge(1.0, 100)
    (only,) = meter.cost().networks
    assert (only.counted, only.forward, only.trained) == ("teacher", B + 100, 0)
