"""Features of networks: against a hook of the test and against layers called by hand; what they leave as it was."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from adversarial import Adversarial
from analytic import time
from distillbench import Condition, Conditioning, Teacher, UserError
from distillbench.diffusion import ExactDenoiser, FlowMatching, VPCosine, mixture
from distillbench.diffusion.denoiser import Denoiser, NetworkCall
from distillbench.diffusion.modes import frozen_weights
from distillbench.networks import ResidualMLP, TwoTimes, UNet, calls
from distillbench.networks.adapters import Adapters, inject
from distillbench.networks.calls import ConfiguredCall
from distillbench.networks.cuda_graphs import Captured
from distillbench.teachers.encoded_prompts import PlaceholderPrompts
from distillbench.testing import methods
from distillbench.testing.conformance import check_method
from distillbench.testing.method_bench import CONDITIONINGS, MethodBench
from distillbench.testing.methods_flops import flops
from distillbench.testing.methods_steps import gradients
from every_network import LAYERS, NETWORKS, denoiser, image_shape, inputs
from faults import failed

SHAPE, LAYER = (3, 4, 4), "blocks.1.inner"


def conditioning(name: str) -> Conditioning:
    """With classes, which networks without classes ignore, and texts of the width of the text network."""
    return (
        Conditioning(classes=2, texts=PlaceholderPrompts(5, 6))
        if name == "diffusers, text"
        else Conditioning(classes=2)
    )


def perceptron(dropout: float = 0.0, classes: int = 0) -> Denoiser:
    torch.manual_seed(0)
    made = (Forgetful if dropout else ResidualMLP)(SHAPE, width=16, depth=3, classes=classes)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.2)
    return Denoiser(made, VPCosine(), "v")


def points(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(1)), time([0.3, 0.5, 0.7, 0.9][:size])


class Forgetful(ResidualMLP):
    """Drops half of the pixels in training."""

    def forward(self, x, time, embedding=None, c=None):
        return super().forward(torch.nn.functional.dropout(x, 0.5, self.training), time, embedding, c)


# --- values and shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_features_of_every_network(name):
    """They are what a hook sees in a plain evaluation, their shapes are known before, and f is the same to the bit."""
    f = denoiser(name).train()
    x_t, t, _, c = inputs(name, f)
    module, seen = f.network.get_submodule(LAYERS[name]), []
    before, state = copy.deepcopy(f.state_dict()), torch.get_rng_state()
    modes = {each: each.training for each in f.modules()}
    shapes = f.feature_shapes([LAYERS[name]], image_shape(name), conditioning(name))
    assert f.counted.counter.rows == 0 and torch.equal(torch.get_rng_state(), state)
    assert modes == {each: each.training for each in f.modules()}
    assert all(torch.equal(tensor, before[key]) for key, tensor in f.state_dict().items())
    handle = module.register_forward_hook(lambda module, given, output: seen.append(output))
    f_alone = f(x_t, t, c)
    handle.remove()
    f_beside, features = f.features([LAYERS[name]], x_t, t, c)
    assert torch.equal(f_beside, f_alone) and torch.equal(features[LAYERS[name]], seen[0])
    assert {key: tuple(value.shape[1:]) for key, value in features.items()} == shapes
    assert f.counted.counter.rows == 2 * len(x_t) and not module._forward_hooks


LAST = {
    "mlp": "exit",
    "unet": "unet.conv_out",
    "edm, ddpm++": "dec.8x8_aux_conv",
    "edm, ncsn++": "dec.8x8_aux_conv",
    "edm, adm": "out_conv",
    "diffusers, dit": "transformer.proj_out_2",
}


@pytest.mark.parametrize("name", [*LAST, "diffusers, text"])
def test_the_last_weight_of_every_network(name):
    """That of the layer which makes the output, though some networks register others later (their classes)."""
    f, key = denoiser(name).requires_grad_(True), f"{LAST.get(name, 'unet.conv_out')}.weight"
    state = torch.get_rng_state()
    for _ in range(2):
        assert f.last_weight(image_shape(name), conditioning(name)) is f.network.get_parameter(key)
    assert f.counted.counter.rows == 0 and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in f.modules())


def test_the_last_weight_is_trained():
    pytest.importorskip("peft")
    f = perceptron()
    inject(f.network, Adapters(2, 2.0))
    assert f.last_weight(SHAPE) is f.network.get_parameter("exit.lora_B.default.weight")
    with pytest.raises(UserError, match="ResidualMLP has no last layer: it calls none with a weight to train"):
        perceptron().freeze().last_weight(SHAPE)


def test_a_sharded_network_has_no_last_weight(monkeypatch):
    monkeypatch.setattr("distillbench.diffusion.denoiser.is_sharded", lambda weight: weight.ndim > 1)
    with pytest.raises(UserError, match=r"has no gradient if the network is sharded. Possible: compute.shard=false"):
        perceptron().last_weight(SHAPE)


def by_hand(f: Denoiser, x_t: Tensor, t: Tensor, embedding: Tensor | None = None) -> Tensor:
    """The inner layer of the second block."""
    net = f.network
    e = net.time(t.flatten().to(x_t.dtype))
    e = silu(e if embedding is None else e + embedding)
    h = net.blocks[0](net.entry(x_t.flatten(1)), e)
    scale, shift = net.blocks[1].modulation(e).chunk(2, dim=-1)
    return net.blocks[1].inner(net.blocks[1].norm(h) * (1 + scale) + shift)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_through_features_are_those_of_the_layers_before(recompute):
    f, (x_t, t) = perceptron(), points()
    by_hand(f, x_t, t).square().sum().backward()
    expected = {name: weight.grad for name, weight in f.named_parameters()}
    f.zero_grad()
    with f.counted.counter.calling(ConfiguredCall("cpu", recompute=recompute)):
        answer, features = f.features([LAYER], x_t, t, f_gradient=False)
        features[LAYER].square().sum().backward()
    assert not answer.requires_grad and torch.equal(answer, f(x_t, t).detach())
    for name, weight in f.named_parameters():
        if expected[name] is None:  # the layers after
            assert weight.grad is None, name
        else:
            torch.testing.assert_close(weight.grad, expected[name])
    assert expected["counted.network.exit.weight"] is None


def test_of_a_frozen_network_the_gradient_reaches_the_input():
    f, (x_t, t) = perceptron(), points()
    x, y = x_t.clone().requires_grad_(), x_t.clone().requires_grad_()
    with frozen_weights(f):
        _, features = f.features([LAYER], x, t)
    features[LAYER].sum().backward()
    by_hand(f, y, t).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_features_of_a_network_of_two_times():
    student, (x_t, t) = TwoTimes(perceptron(classes=2)), points()
    nn.init.normal_(student.target_time[-1].weight)
    c = Condition(torch.tensor([0, 1, 2, 0]))
    f, features = student.features([LAYER], x_t, t, t / 2, c)
    assert torch.equal(f, student(x_t, t, t / 2, c))
    classes = student.denoiser.network.classes(c.labels)
    expected = by_hand(student.denoiser, x_t, t, classes + student.target_time(t / 2))
    torch.testing.assert_close(features[LAYER], expected)


def test_features_under_guidance_and_on_another_schedule():
    """The embedding of w is added, and the network sees its own time and scale."""
    f = perceptron(classes=2)
    drawn = Conditioning(2, 2.0, (1.0, 3.0))
    student = Teacher("t", f, SHAPE, "t", conditioning=drawn).on(FlowMatching()).student()
    nn.init.normal_(student.guidance[-1].weight)
    x_t, t = points()
    c = drawn.of_images(range(4), "cpu")
    seen: list[tuple] = []
    hook = student.network.register_forward_hook(lambda module, given, output: seen.append(given))
    _, features = student.features([LAYER], x_t, t, c)
    hook.remove()
    x, when, embedding, _ = seen[0]
    assert embedding.any() and not torch.equal(x, x_t) and not torch.equal(when, t.flatten().float())
    own = embedding + student.network.classes(c.labels)
    torch.testing.assert_close(features[LAYER], by_hand(student, x, when, own))
    assert student.feature_shapes([LAYER], SHAPE, drawn) == {LAYER: (16,)}


class Normalised(nn.Module):
    """With batch statistics."""

    embedding_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.loud = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.pair, self.weights = Pair(), nn.Linear(1, 1)

    def forward(self, x, time, embedding=None, c=None):
        return self.weights(self.pair(self.loud(self.drop(self.norm(x))))[0][..., None])[..., 0]


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_shapes_are_found_without_touching_batch_statistics():
    f = Denoiser(Normalised(), VPCosine(), "v").train()
    before = copy.deepcopy(f.state_dict())
    assert f.feature_shapes(["loud"], SHAPE) == {"loud": SHAPE}
    assert all(torch.equal(tensor, before[name]) for name, tensor in f.state_dict().items())
    assert f.training and f.network.norm.training


# --- how networks are computed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"precision": "fp16"}, {"channels_last": True}])
@pytest.mark.parametrize("recompute", [False, True])
def test_features_are_in_float32_and_contiguous_whatever_the_network_is_computed_in(settings, recompute):
    torch.manual_seed(0)
    f = Denoiser(UNet((3, 8, 8), width=8, depth=1), VPCosine(), "v")
    x_t, layers = torch.randn(4, 3, 8, 8), ["unet.mid_block", "unet.up_blocks.0.resnets.0.conv1"]
    t = time([0.5] * 4)
    _, plain = f.features(layers, x_t, t)
    gradient = torch.autograd.grad(plain[layers[1]].square().mean(), f.network.unet.conv_in.weight)[0]
    with f.counted.counter.calling(ConfiguredCall("cpu", recompute=recompute, **settings)):
        answer, features = f.features(layers, x_t, t)
    features[layers[1]].square().mean().backward()  # outside of autocast, as a method's own layers are
    assert answer.dtype == torch.float32
    for name in layers:
        assert features[name].dtype == torch.float32 and features[name].is_contiguous()
        torch.testing.assert_close(features[name], plain[name], rtol=0.05, atol=0.05)
    theirs = f.network.unet.conv_in.weight.grad
    assert ((theirs - gradient).norm() / gradient.norm()).item() < 0.1


@pytest.fixture
def eager_backend(monkeypatch):
    """torch's compiler traces as usual and then runs plain torch."""
    compiled = functools.cache(lambda forward: torch.compile(forward, dynamic=False, backend="eager"))
    monkeypatch.setattr(calls, "compiled", compiled)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("compile", "layer"), [("whole", LAYER), ("blocks", LAYER), ("blocks", "blocks.1"), ("blocks", "norm")]
)
def test_features_of_compiled_networks(compile, layer, eager_backend):
    """What is compiled runs no hooks: it was compiled before there were any."""
    f, (x_t, t) = perceptron(), points()
    _, plain = f.features([layer], x_t, t)
    with f.counted.counter.calling(ConfiguredCall("cpu", compile=compile)):
        f(x_t, t)
        seen: list[Tensor] = []
        hook = f.network.get_submodule(LAYER).register_forward_hook(lambda module, given, output: seen.append(output))
        f(x_t, t)
        hook.remove()
        assert not seen
        answer, features = f.features([layer], x_t, t)
        features[layer].sum().backward()
        torch.testing.assert_close(f(x_t, t), answer)
    torch.testing.assert_close(features[layer], plain[layer])
    assert f.network.blocks[0].inner.weight.grad is not None


def test_only_the_blocks_around_a_feature_run_uncompiled():
    f = perceptron()
    call = ConfiguredCall("cpu", compile="blocks").observing([f.network.get_submodule(LAYER), f.network.blocks[2]])
    with call._changed(f.network):
        assert ["forward" in block.__dict__ for block in f.network.blocks] == [True, False, True]
    with ConfiguredCall("cpu", compile="whole").observing([f.network.norm])._changed(f.network):
        assert "forward" not in f.network.__dict__


def test_no_graph_is_replayed_for_features():
    f, (x_t, t) = perceptron(), points()
    with torch.no_grad(), f.counted.counter.calling(Captured(NetworkCall(), "cuda")):  # would fail without a GPU
        _, features = f.features([LAYER], x_t, t)
    torch.testing.assert_close(features[LAYER], by_hand(f, x_t, t))


def test_dropout_acts_on_features_where_it_acts_on_f():
    f, (x_t, t) = perceptron(dropout=0.5), points()
    feature = lambda: f.features([LAYER], x_t, t)[1][LAYER].detach()
    assert not torch.equal(feature(), feature())
    with torch.no_grad():
        assert torch.equal(feature(), feature())
    with frozen_weights(f):
        assert torch.equal(feature(), feature())


def test_copies_have_features_of_their_own():
    f, (x_t, t) = perceptron(), points()
    other = copy.deepcopy(f)
    nn.init.zeros_(other.network.blocks[1].inner.weight)
    _, ours = f.features([LAYER], x_t, t)
    _, theirs = other.features([LAYER], x_t, t)
    torch.testing.assert_close(theirs[LAYER], other.network.blocks[1].inner.bias.expand(4, -1))
    torch.testing.assert_close(ours[LAYER], by_hand(f, x_t, t))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.iner", "ResidualMLP has no submodule 'blocks.1.iner'. Possible, for example: blocks.1.inner, "),
        ("xyz", "no submodule 'xyz'. Possible, for example: time, entry, blocks, norm, exit"),
        ("", "no submodule ''"),
        ("blocks", "'blocks' of ResidualMLP is not called, so it has no output. Possible within it: blocks.0, "),
    ],
)
def test_wrong_names_are_errors(name, message):
    f, (x_t, t) = perceptron(), points()
    with pytest.raises(UserError) as error:
        f.feature_shapes([name], SHAPE)
    assert message in str(error.value)
    with pytest.raises(UserError):
        f.features([name], x_t, t)
    assert not any(module._forward_hooks for module in f.modules()) and f.counted.recorder is None
    f(x_t, t)


def test_outputs_that_are_not_one_tensor_for_each_image_are_errors():
    f, (x_t, t) = Denoiser(Normalised(), VPCosine(), "v"), points()
    with pytest.raises(UserError, match="'pair' of Normalised must be one tensor, got a tuple of 2"):
        f.features(["pair"], x_t, t)
    with pytest.raises(UserError, match="'drop' of Normalised is changed in place"):
        f.features(["drop"], x_t, t)
    f = Denoiser(UNet((3, 8, 8), width=8, depth=1), VPCosine(), "v")
    with pytest.raises(UserError, match=r"is called \d times in one evaluation"):
        f.feature_shapes(["unet.mid_block.resnets.0.nonlinearity"], (3, 8, 8))
    with pytest.raises(UserError, match=r"a tuple of 2\. Possible within it: unet.down_blocks.0.resnets"):
        f.feature_shapes(["unet.down_blocks.0"], (3, 8, 8))
    with pytest.raises(TypeError, match="must be a list of names of submodules, got the text 'unet'"):
        f.feature_shapes("unet", (3, 8, 8))
    exact = ExactDenoiser(mixture([1.0], [[0.0]], [[1.0]]), VPCosine())
    with pytest.raises(UserError, match=r"ClosedFormNetwork has no submodule 'exit'\. It has none"):
        exact.feature_shapes(["exit"], (1, 1, 1))


def test_an_error_within_the_network_leaves_no_hook():
    f, (x_t, t) = perceptron(), points()
    with pytest.raises(RuntimeError):
        f.features([LAYER], x_t[:, :1], t)
    assert not any(module._forward_hooks for module in f.modules()) and f.counted.recorder is None


# --- a method that trains on features --------------------------------------------------------------------------------


class HalfPrecision(MethodBench):
    """Whose networks run in bf16."""

    def teacher(self) -> Teacher:
        teacher = super().teacher()
        for counter in (teacher.teacher_rows, teacher.student_rows):
            counter.call = ConfiguredCall("cpu", "bf16")
        return teacher


@pytest.mark.parametrize("bench", [MethodBench, HalfPrecision])
def test_gradients_and_flops_of_an_adversarial_method(bench):
    """torch's counter says that they are those of the step that ran."""
    about = bench("guided", Adversarial, None, CONDITIONINGS["guidance drawn"], 0)
    assert "students 4 with gradient and 4 without" in gradients(about)
    assert "MFLOP counted" in flops(about)


def test_where_f_is_not_used_its_backward_pass_is_not_counted():
    class Dear(Adversarial):
        def logits(self, x_t, t, c):
            _, features = self.fake.features([self.config.layer], x_t, t, c)
            return self.head(features[self.config.layer])

    config = Adversarial.Config(layer="entry")
    about = [MethodBench("one", cls, config, CONDITIONINGS["unconditional"], 0) for cls in (Adversarial, Dear)]
    assert "MFLOP counted" in flops(about[0])
    with pytest.raises(Exception, match="is a network evaluated with gradient whose output is detached"):
        flops(about[1])


@pytest.mark.nightly
@pytest.mark.parametrize("bench", [MethodBench, HalfPrecision])
def test_an_adversarial_method_conforms(bench, monkeypatch):
    monkeypatch.setattr(methods, "MethodBench", bench)
    found = check_method(Adversarial, distribution_images=0)
    assert not failed(found)
    assert [finding.check for finding in found if finding.ok is None] == ["matches"]
