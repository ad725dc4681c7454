"""Precision, compilation and memory settings of networks: what each changes and does not change, keys and rows."""

from __future__ import annotations

import copy
import functools
import gc
import shutil
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from analytic import gaussian_images, gaussian_teacher, make_batch, make_workspace, mlp_teacher, weights_of
from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition
from distillbench.diffusion.denoiser import CountedNetwork, Counter, Denoiser, NetworkCall
from distillbench.diffusion.schedules import VPCosine
from distillbench.errors import UserError
from distillbench.evaluation.sampling_speed import Measurement, Subject, measure_subject
from distillbench.evaluation.timing import CpuTimer
from distillbench.metering.stopwatch import Account, CompileWatch, Stopwatch
from distillbench.networks import calls
from distillbench.networks.architectures import DiT, ResidualMLP, UNet
from distillbench.networks.calls import ConfiguredCall, networks_below, repeated_blocks
from distillbench.networks.cuda_graphs import Captured
from distillbench.networks.diffusers_wrappers import DiffusersNetwork
from distillbench.registry import load_registry
from distillbench.runs.cell_keys import evaluation_inputs, protocol_key, speed_inputs, train_inputs
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.system.progress import Progress
from distillbench.system.transfers import to_device, to_host
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import BudgetConfig, Meter
from distillbench.training.compute import (
    ComputeConfig,
    Sampling,
    applied,
    changed,
    check_compute,
    check_sampling,
    grad_scaler,
    in_words,
    last_batch,
    sampling,
    sampling_identity,
    training_identity,
)
from distillbench.training.method import Read
from distillbench.training.optimizer_config import OptimizerConfig
from distillbench.training.optimizers import Optimizers
from distillbench.training.pairs import Workspace
from distillbench.training.resume import State
from two_ranks import METHODS, SETTINGS, method_class

SHAPE = (1, 8, 8)
MAKERS = {
    "mlp": lambda: ResidualMLP(SHAPE, 16, 3),
    "unet": lambda: UNet(SHAPE, 8, 1),
    "dit": lambda: DiT(SHAPE, 32, 3),
}
CHANGES = [
    {"precision": "bf16"},
    {"teacher_precision": "bf16"},
    {"channels_last": True},
    {"compile": "whole"},
    {"recompute": True},
    {"deterministic": True},
]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@functools.cache
def network(kind: str) -> nn.Module:
    """A network with random weights, none of them zero. Tests must not change it."""
    torch.manual_seed(0)
    made = MAKERS[kind]()
    for parameter in made.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made


def inputs(made: nn.Module, seed: int = 0, embedded: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Condition]:
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    embedding = draw(4, made.embedding_channels) if embedded else None
    return draw(4, *SHAPE), torch.rand(4, generator=generator), embedding, UNCONDITIONAL


def answer(made: nn.Module, call: NetworkCall, *given) -> Tensor:
    """The output and all gradients of its mean square, as one vector."""
    for parameter in made.parameters():
        parameter.grad = None
    out = call(made, *given)
    out.square().mean().backward()
    gradients = [p.grad.flatten() for p in made.parameters() if p.grad is not None]
    return torch.cat([out.detach().flatten(), *gradients])


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / a.norm()).item()


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("precision", "digits"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_half_precision_differs_from_float32_by_its_rounding(kind, precision, digits):
    made = network(kind)
    given = inputs(made)
    exact, half = (answer(made, call, *given) for call in (NetworkCall(), ConfiguredCall("cpu", precision)))
    assert digits / 20 < difference(exact, half) < 20 * digits
    assert half.dtype == torch.float32 and ConfiguredCall("cpu", precision)(made, *given).dtype == torch.float32
    assert {p.dtype for p in made.parameters()} == {p.grad.dtype for p in made.parameters() if p.grad is not None}


class Recording(nn.Module):
    """Records its inputs and the precision of its products."""

    embedding_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.times, self.dtypes, self.products = [], [], []

    def forward(self, x, time, embedding=None, c=None):
        out = self.layer(x.flatten(1))
        self.times.append(time)
        self.dtypes.append(x.dtype)
        self.products.append(out.dtype)
        return out.view(x.shape)


def recording_teacher() -> Teacher:
    return Teacher("recording", Denoiser(Recording(), VPCosine(), "v"), (1, 2, 2), "recording")


def method_of(teacher: Teacher) -> SimpleNamespace:
    """The parts of a method that `applied` needs: teacher and modules."""
    held = nn.ModuleDict({"student": teacher.student(), "deputy": teacher.frozen_copy()})
    return SimpleNamespace(teacher=teacher, modules=held.modules, student=held["student"], frozen_copy=held["deputy"])


def test_times_and_outputs_stay_in_float32():
    """Times near t_max differ by less than the resolution of bf16."""
    teacher = recording_teacher()
    method = method_of(teacher)
    t = (1 - torch.linspace(1e-3, 1.004e-3, 4, dtype=torch.float64)).view(-1, 1, 1, 1)
    with applied(ComputeConfig(precision="bf16"), method, "cpu"):
        f = method.student(torch.randn(4, 1, 2, 2), t)
    seen = method.student.network
    assert f.dtype == torch.float32 and seen.dtypes == [torch.float32] and seen.products == [torch.bfloat16]
    assert torch.equal(seen.times[0], t.flatten().float()) and len(set(seen.times[0].tolist())) == 4


def test_precision_of_students_teachers_and_their_copies():
    teacher = recording_teacher()
    method = method_of(teacher)
    x, t = torch.randn(4, 1, 2, 2), torch.full((4, 1, 1, 1), 0.5, dtype=torch.float64)

    def product(denoiser: Denoiser) -> torch.dtype:
        denoiser(x, t)
        return denoiser.network.products[-1]

    with applied(ComputeConfig(precision="bf16", teacher_precision="fp32"), method, "cpu"):
        later = [copy.deepcopy(method.student), teacher.student(), teacher.on(VPCosine()).student()]
        assert {product(d) for d in [method.student, *later]} == {torch.bfloat16}
        assert {product(d) for d in (teacher.denoiser, method.frozen_copy, teacher.frozen_copy())} == {torch.float32}
        with torch.autocast("cpu", dtype=torch.bfloat16):  # by the method itself
            assert product(teacher.denoiser) == torch.float32
    assert {product(d) for d in [method.student, *later, teacher.denoiser]} == {torch.float32}
    with applied(ComputeConfig(precision="bf16"), method, "cpu"):
        assert product(teacher.denoiser) == product(method.frozen_copy) == torch.bfloat16


def test_a_closed_form_stays_exact():
    teacher = gaussian_teacher()
    x, t = torch.randn(4, 2, 1, 1), torch.full((4, 1, 1, 1), 0.5, dtype=torch.float64)
    expected = teacher.denoise(x, t)
    with sampling(Sampling("bf16"), teacher, "cpu"):
        assert torch.equal(teacher.denoise(x, t), expected)


def test_only_fp16_has_a_loss_scaler():
    assert grad_scaler(ComputeConfig(), "cpu") is None and grad_scaler(ComputeConfig(precision="bf16"), "cpu") is None
    scaler = grad_scaler(ComputeConfig(precision="fp16"), "cpu")
    assert scaler is not None and scaler.is_enabled() and scaler.get_scale() == 2.0**16


# --- memory format, recomputation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_channels_last_changes_only_rounding_and_is_undone(kind):
    made = network(kind)
    given, call = inputs(made, embedded=True), ConfiguredCall("cpu", channels_last=True)
    expected = answer(made, NetworkCall(), *given)
    assert difference(expected, answer(made, call, *given)) < 1e-5
    assert call(made, *given).is_contiguous()
    convolutions = [
        m.weight for m in copy.deepcopy(made).modules() if isinstance(m, nn.Conv2d) and m.kernel_size > (1, 1)
    ]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions if w.shape[1] > 1)
    call.undo()
    assert all(p.is_contiguous() for p in made.parameters())
    assert torch.equal(answer(made, NetworkCall(), *given), expected)


def test_a_training_in_channels_last_resumes():
    """A state holds contiguous tensors; fused Adam needs weights, gradients and moments of the same strides."""

    def made() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"student": nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)})

    def updates(method: nn.ModuleDict, optimizers: Optimizers, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
            optimizers.update(method["student"], method["student"](x).square().mean(), 1.0)

    whole, cut, resumed = made(), made(), made()
    first, second = Optimizers(OptimizerConfig(lr=0.1)), Optimizers(OptimizerConfig(lr=0.1))
    updates(whole, Optimizers(OptimizerConfig(lr=0.1)), range(4))
    updates(cut, first, range(2))
    kept = first.state(cut)
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in kept.tensors.items()}  # as resume.py writes
    resumed.load_state_dict(cut.state_dict())
    second.restore(State(plain, kept.values), resumed)
    updates(resumed, second, range(2, 4))
    torch.testing.assert_close(resumed["student"].weight, whole["student"].weight)


def kept_bytes(run) -> int:
    """Bytes that autograd saves for the backward pass, without weights."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_recomputation_gives_the_same_and_saves_memory(kind, embedded):
    """Also with an embedding that is added within a block by an override that ends before the backward pass."""
    made = network(kind)
    given, call = inputs(made, embedded=embedded), ConfiguredCall("cpu", recompute=True)
    assert difference(answer(made, NetworkCall(), *given), answer(made, call, *given)) < 1e-6
    assert kept_bytes(lambda: call(made, *given)) < 0.8 * kept_bytes(lambda: made(*given))
    assert not any("forward" in module.__dict__ for module in made.modules())


@pytest.mark.parametrize("way", ["functional_call", "requires_grad"])
def test_frozen_weights_stay_frozen_when_recomputed(way):
    made, call = copy.deepcopy(network("mlp")), ConfiguredCall("cpu", recompute=True)
    x, *rest = inputs(made)
    gradients = []
    for how in (NetworkCall(), call):
        given = x.clone().requires_grad_()
        if way == "functional_call":
            counted = CountedNetwork(made, Counter())
            counted.counter.call = how
            held = {name: 2 * weight.detach() for name, weight in counted.named_parameters()}
            out = functional_call(counted, held, (given, *rest))
        else:
            made.requires_grad_(False)
            out = how(made, given, *rest)
            made.requires_grad_(True)
        out.square().mean().backward()
        gradients.append(given.grad)
        assert all(p.grad is None and p.requires_grad for p in made.parameters())
    assert difference(*gradients) < 1e-6 and gradients[0].abs().max() > 0


def test_repeated_blocks():
    names = lambda made: [type(block).__name__ for block in repeated_blocks(made)]
    assert names(network("mlp")) == ["_ResidualBlock"] * 3
    assert set(names(network("unet"))) == {"ResnetBlock2D", "Attention"}
    assert names(network("dit")) == ["BasicTransformerBlock"] * 3
    assert (
        names(ResidualMLP(SHAPE, 8, 2)) == [] == names(nn.Sequential(*(nn.Sequential(nn.Linear(1, 1)) for _ in "abc")))
    )


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """The number of compiled graphs; the backend traces and guards as usual and then runs plain torch."""
    from torch._dynamo.utils import counters

    compiled = functools.cache(lambda forward: torch.compile(forward, dynamic=False, backend="eager"))
    monkeypatch.setattr(calls, "compiled", compiled)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    yield lambda: counters["stats"]["unique_graphs"] - before
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "how", "recompute"),
    [
        ("mlp", "whole", False),
        ("mlp", "blocks", False),
        ("mlp", "blocks", True),
        pytest.param("dit", "blocks", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_networks_give_the_same_with_and_without_embedding(kind, how, recompute, graphs):
    made, call = network(kind), ConfiguredCall("cpu", compile=how, recompute=recompute)
    for seed, embedded in enumerate([False, True, True, False]):
        given = inputs(made, seed, embedded)
        assert difference(answer(made, NetworkCall(), *given), answer(made, call, *given)) < 1e-5
    many = graphs()
    answer(made, call, *inputs(made, 4, True))
    answer(copy.deepcopy(made), call, *inputs(made, 5))
    assert many > 0 and (graphs() == many or kind == "dit")  # diffusers' blocks have guards for each block


def test_a_last_batch_of_fewer_images_is_not_compiled_for(graphs):
    made, config = network("mlp"), ComputeConfig(compile="whole")
    x, time, embedding, c = inputs(made)
    call = ConfiguredCall("cpu", compile="whole")
    answer(made, call, x, time, embedding, c)
    many = graphs()
    with last_batch(config):
        cut = answer(made, call, x[:3], time[:3], embedding, c)
    assert graphs() == many and difference(answer(made, NetworkCall(), x[:3], time[:3], embedding, c), cut) < 1e-6
    with last_batch(ComputeConfig()):
        answer(made, call, x[:2], time[:2], embedding, c)
    assert graphs() > many


class OneLayer(nn.Module):
    embedding_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, time, embedding=None, c=None):
        return self.layer(x.flatten(1)).sin().view(x.shape)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compilation_is_charged_apart(tmp_path, monkeypatch):
    """For forward passes, and for backward passes, which are compiled when they first run."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    teacher = Teacher("layer", Denoiser(OneLayer(), VPCosine(), "v"), (1, 2, 2), "layer")
    import torch._dynamo

    meter = Meter(BudgetConfig(), teacher, "cpu")
    method = method_of(teacher)
    x, t = torch.randn(3, 1, 2, 2), torch.full((3, 1, 1, 1), 0.5, dtype=torch.float64)
    with torch.no_grad():
        expected = teacher.denoise(x, t)
    seconds = []
    with applied(ComputeConfig(compile="whole"), method, "cpu"):
        for _ in range(2):
            f = method.student(x, t)
            seconds.append(meter.cost().compile_seconds)
            with meter.stopwatch.charging(Account.student):
                f.square().mean().backward()
            seconds.append(meter.cost().compile_seconds)
    cost = meter.cost()
    assert torch.allclose(f, expected, atol=1e-6)
    assert 0 < seconds[0] < seconds[1] == seconds[2] == seconds[3]
    assert cost.student_seconds < seconds[3] < cost.seconds
    meter.stop()


def test_compiler_time_is_charged_to_its_own_account(monkeypatch):
    from torch._dynamo.callback import CallbackTrigger, callback_handler

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(Stopwatch, "now", staticmethod(lambda: clock.now))
    stopwatch = Stopwatch()
    watch = CompileWatch(stopwatch)
    with stopwatch.charging(Account.teacher):
        clock.now += 1
        with callback_handler.install_callbacks(CallbackTrigger.DYNAMO, "0/0"):
            clock.now += 10
            with callback_handler.install_callbacks(CallbackTrigger.LAZY_BACKWARD, "0/1"):
                clock.now += 10
        clock.now += 2
    assert stopwatch.read() == {Account.teacher: 3, Account.student: 0, Account.compile: 20, Account.other: 0}
    watch.stop()
    with callback_handler.install_callbacks(CallbackTrigger.DYNAMO, "0/2"):
        clock.now += 4
    assert watch.reason == "" and stopwatch.read()[Account.other] == 4


def test_without_compiler_callbacks_there_is_a_reason(monkeypatch):
    import torch._dynamo

    monkeypatch.delattr(torch._dynamo.callback, "callback_handler")
    meter = Meter(BudgetConfig(), mlp_teacher(), "cpu")
    cost = meter.cost()
    meter.stop()
    assert cost.compile_seconds is None and "does not report when its compiler runs" in meter.no_compile_seconds
    assert cost.teacher_seconds + cost.student_seconds + cost.other_seconds == pytest.approx(cost.seconds)


# --- methods ---------------------------------------------------------------------------------------------------------


def float_images(read: Read, count: int) -> tuple[Tensor, None]:
    return read(count)[0].float(), None


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_a_step_in_bf16_with_recomputation(name, tmp_path):
    torch.manual_seed(0)
    made = ResidualMLP((2, 1, 1), 16, 3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    teacher = Teacher("mlp", Denoiser(made, VPCosine(), "v"), (2, 1, 1), "mlp", blank=lambda: copy.deepcopy(made))
    entry = method_class(name)
    few = {"pairs": 8, "steps": 2}
    settings = SETTINGS | {"direct": few, "reflow": few, "pd": {"steps": 2}, "tract": {"steps": [4, 2, 1]}}
    settings = settings.get(name, {})
    losses: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        method = entry(entry.Config(**settings), teacher)
        before = weights_of(method.student)
        with applied(ComputeConfig(precision=precision, recompute=precision == "bf16"), method, "cpu"):
            method.prepare(make_workspace(teacher, tmp_path))
            method.start_phase(0)
            read = functools.partial(float_images, gaussian_images())
            for step in range(method.phases()[0].cycle):
                for trained, loss in method.train_step(make_batch(32, read=read, step=step)):
                    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-2)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses.setdefault(precision, []).append(loss.item())
                method.after_step()
            assert {p.dtype for p in method.parameters()} == {torch.float32}
        assert any(not torch.equal(before[n], w) for n, w in weights_of(method.student).items())
        assert not any("forward" in module.__dict__ for module in method.modules())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05, abs=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_pairs_of_another_precision_are_another_cache_entry(tmp_path):
    teacher = mlp_teacher()
    method = method_of(teacher)
    solve = lambda eps, c: teacher.denoise(eps, torch.full((len(eps), 1, 1, 1), 0.5, dtype=torch.float64), c)
    found = {}
    for name in ("fp32", "bf16"):
        with applied(ComputeConfig(precision=name), method, "cpu"):
            space = Workspace(teacher, Meter(BudgetConfig(), teacher, "cpu"), tmp_path, "cpu", 0, Progress(None))
            found[name] = space.pairs(solve, 4, {"steps": 1}).targets
    assert len(list(tmp_path.glob("*/manifest.json"))) == 2 and not torch.equal(*found.values())


def test_networks_with_other_counters_are_left_alone():
    teacher = mlp_teacher()
    method = method_of(teacher)
    own = Denoiser(network("mlp"), VPCosine(), "v")
    modules = [*method.modules(), *own.modules()]
    method.modules = lambda: iter(modules)
    with applied(ComputeConfig(precision="bf16"), method, "cpu"):
        assert type(own.counted.counter.call) is NetworkCall
    assert len(networks_below(own, own)) == 1


# --- sampling --------------------------------------------------------------------------------------------------------


def test_timing_uses_the_precision_of_scores_but_flops_are_of_the_plain_network():
    teacher = recording_teacher()

    def sample(noise, nfe, c):
        x = noise(0)
        return teacher.denoise(x, torch.full((len(x), 1, 1, 1), 0.5, dtype=torch.float64), c)

    brief = Measurement((1,), "cpu", 2, 1, 0.001, Sampling("bf16"))
    rows = measure_subject(Subject(sample, teacher), brief, CpuTimer())
    products = teacher.denoiser.network.products
    assert products[0] == torch.bfloat16 and products[-1] == torch.float32
    plain = measure_subject(Subject(sample, teacher), replace(brief, sampling=Sampling()), CpuTimer())
    assert rows[0].gflops == plain[0].gflops > 0


def test_nothing_is_copied_on_the_cpu():
    batches = [torch.randn(2, 1), torch.randn(1, 1)]
    assert all(a is b for (a,), b in zip(to_host(((b,) for b in batches), "cpu"), batches, strict=True))
    assert to_device(batches[0], "cpu") is batches[0]


def test_a_call_with_gradient_is_not_captured():
    made = network("mlp")
    given = inputs(made)
    assert torch.equal(Captured(NetworkCall(), "cuda")(made, *given), made(*given))


class Recorded(Captured):
    """Records captures without a GPU. A replay computes with the weights of its capture."""

    def __init__(self) -> None:
        super().__init__(NetworkCall(), "cuda")
        self.captures: list[tuple[int, ...]] = []

    def _capture(self, network, inputs, c):
        self.captures.append(tuple(inputs[0].shape))
        weights = {name: value.data for name, value in network.named_parameters()}  # the same memory
        known = weakref.ref(network)
        answer = lambda given: functional_call(known(), weights, (*given[:3], c))
        return SimpleNamespace(replay=answer)


def test_a_network_is_captured_again_only_for_new_shapes_or_moved_weights():
    made, captured = copy.deepcopy(network("mlp")), Recorded()
    given = inputs(made)

    def answers(network, x, time, *more):
        captured.begin()
        with torch.no_grad():
            assert torch.equal(captured(network, x, time, *more), network(x, time, *more))
        return len(captured.captures)

    assert answers(made, *given) == answers(made, *given) == 1
    assert answers(made, given[0][:2], given[1][:2], None, UNCONDITIONAL) == 2
    made.load_state_dict({name: value + 0.1 for name, value in made.state_dict().items()})
    assert answers(made, *given) == 2  # weights changed in place
    for parameter in made.parameters():
        parameter.data = parameter.data + 0.1
    assert answers(made, *given) == 3
    alive = weakref.ref(made)
    del made
    gc.collect()
    assert alive() is None and not len(captured.graphs)


@GPU
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_network_follows_inputs_and_weights(precision):
    made = copy.deepcopy(network("unet")).cuda()
    call = ConfiguredCall("cuda", precision)
    captured = Captured(call, "cuda")
    with torch.no_grad():
        for seed in range(3):
            given = [
                None if i is None else i.cuda() if isinstance(i, Tensor) else i for i in inputs(made, seed, seed > 0)
            ]
            torch.testing.assert_close(captured(made, *given), call(made, *given), rtol=1e-3, atol=1e-3)
            for parameter in made.parameters():
                parameter.add_(0.01)
    assert len(captured.graphs[made]) == 2


@GPU
def test_batches_are_copied_to_the_host():
    batches = [torch.full((4, 1000), float(k), device="cuda") for k in range(8)]
    sent = [(batch, batch.sum() > 0) for batch in batches]
    for arrived, tensors in zip(to_host(iter(sent), "cuda"), sent, strict=True):
        for there, here in zip(tensors, arrived, strict=True):
            assert here.device.type == "cpu" and torch.equal(here, there.cpu())
    assert torch.equal(to_device(torch.arange(4), "cuda").cpu(), torch.arange(4))


# --- rows and keys ---------------------------------------------------------------------------------------------------


def test_the_column_compute():
    assert in_words(ComputeConfig(), Sampling()) == in_words(None, Sampling()) == "fp32"
    everything = ComputeConfig("bf16", "fp16", True, True, "blocks", True)
    words = "bf16, teacher fp16, tf32, channels_last, compile=blocks, recompute"
    assert in_words(everything, Sampling()) == f"{words}; sampling fp32"
    assert in_words(ComputeConfig(), Sampling("bf16", True)) == "fp32; sampling bf16, cuda_graphs"
    assert in_words(None, Sampling("bf16")) == "sampling bf16"
    assert changed(ComputeConfig(), Sampling()) == changed(None, Sampling()) == []
    asked = changed(ComputeConfig(compile="whole", prefetch=0), Sampling("fp16"))
    assert asked == ["compute.compile=whole", "compute.prefetch=0", "evaluation.precision=fp16"]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_settings_are_in_the_identity(change):
    assert training_identity(ComputeConfig(), "cpu") == {}
    assert training_identity(ComputeConfig(**change), "cpu") == change


def test_on_a_gpu_tf32_and_the_sampling_precision_are_always_in_the_identity():
    assert training_identity(ComputeConfig(), "cuda") == {"tf32": False}
    assert training_identity(ComputeConfig(prefetch=0), "cuda") == {"prefetch": 0, "tf32": False}
    assert training_identity(ComputeConfig(prefetch=0), "cpu") == {} == sampling_identity(Sampling(), "cpu")
    assert sampling_identity(Sampling(), "cuda") == {"precision": "fp32"}
    assert sampling_identity(Sampling("bf16", True), "cuda") == {"cuda_graphs": True, "precision": "bf16"}


def test_the_keys_of_a_cell_change_with_the_settings_and_with_nothing_else(tmp_path):
    def keys(*words: str):
        common = [
            "dataset=digits",
            "methods=[boot]",
            f"results_dir={tmp_path}",
            "device=cpu",
            "evaluation.metrics=[teacher_rmse]",
        ]
        cell = plan(compose_runs([*common, *words], load_registry()), load_registry())[-1]
        teacher = cell.shared.source.untrained()
        parts = train_inputs(cell, teacher), evaluation_inputs(cell, "k"), speed_inputs(cell, "k")
        return *parts, protocol_key(cell.shared, teacher)

    plain = keys()
    assert not any("compute" in part or "precision" in part for part in plain[:3])
    train, *others = keys("compute.precision=bf16", "compute.recompute=true")
    assert train == plain[0] | {"compute": {"precision": "bf16", "recompute": True}} and tuple(others) == plain[1:]
    train, evaluation, speed, protocol = keys("evaluation.precision=bf16")
    assert train == plain[0] and protocol != plain[3]
    assert evaluation["compute"] == speed["compute"] == {"precision": "bf16"} and evaluation["precision"] == "bf16"


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "compute.precision=bf61",
            "compute.precision must be one of fp32, bf16, fp16, got 'bf61'. Did you mean 'bf16'?",
        ),
        ("compute.teacher_precision=half", "compute.teacher_precision must be one of same, fp32, bf16, fp16"),
        ("compute.compile=on", "compute.compile must be one of off, whole, blocks"),
        ("compute.prefetch=-1", "compute.prefetch must lie between 0 and 1000"),
        ("evaluation.precision=fp8", "evaluation.precision must be one of fp32, tf32, bf16, fp16"),
    ],
)
def test_unknown_values_are_errors(words, message):
    with pytest.raises(UserError) as error:
        compose_runs(["dataset=digits", "methods=[boot]", words], load_registry())
    assert message in str(error.value)


def test_settings_for_gpus_are_errors_on_the_cpu():
    with pytest.raises(UserError, match=r"evaluation\.cuda_graphs=true needs a GPU"):
        check_sampling(Sampling(cuda_graphs=True), "cpu")
    with pytest.raises(UserError, match=r"evaluation\.precision=tf32 needs an NVIDIA GPU"):
        check_sampling(Sampling("tf32"), "cpu")
    with pytest.raises(UserError, match=r"compute\.tf32=true needs an NVIDIA GPU"):
        check_compute(ComputeConfig(tf32=True), "cpu")
    with pytest.raises(UserError, match=r"compute\.cudnn_benchmark=true needs a GPU"):
        check_compute(ComputeConfig(cudnn_benchmark=True), "cpu")


def test_networks_of_diffusers_take_an_embedding_without_hooks():
    made = next(m for m in network("dit").modules() if isinstance(m, DiffusersNetwork))
    seen: list[int] = []
    handles = [
        m.register_forward_hook(lambda m, i, o: seen.append(len(m._forward_hooks))) for m in made._time_embeddings()
    ]
    network("dit")(*inputs(network("dit"), embedded=True))
    for handle in handles:
        handle.remove()
    assert set(seen) == {1}
