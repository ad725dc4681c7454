"""Where dropout acts in training, held against the released algorithms written out with train(), eval() and masks.

The networks of these tests drop features inside their blocks, as EDM's do, from torch's own generator. Every comparison
is to the bit: the same masks are drawn, or none.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, silu

from adversarial import Adversarial
from analytic import make_batch, time
from continuous_time import ContinuousTime
from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Condition
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.dropout import one_mask, seed_masks
from distillbench.diffusion.embeddings import TimeEmbedding
from distillbench.diffusion.modes import evaluating, frozen_weights
from distillbench.diffusion.samplers import ddim_step, x_at_t_max
from distillbench.diffusion.schedules import VPCosine
from distillbench.diffusion.training_times import karras_time, lognormal_time
from distillbench.teachers.teacher import Teacher
from distillbench.testing.bench_networks import SHAPE
from distillbench.testing.method_bench import IMAGES, MethodBench, calls_of, changed, weights_of
from distillbench.testing.methods_steps import check_masks
from distillbench.testing.methods_steps import dropout as check_dropout
from distillbench.training.compute import ComputeConfig, applied
from distillbench.training.method import Batch, Method, MethodConfig
from distillbench.training.resume import restore_torch_generators, torch_generators_state
from distillbench_boot import Boot
from distillbench_cm import ConsistencyDistillation
from distillbench_ct import ConsistencyTraining
from distillbench_direct import Direct
from distillbench_pd import ProgressiveDistillation
from distillbench_sid import ScoreIdentityDistillation
from distillbench_tract import Tract

METHODS = (Boot, ConsistencyDistillation, ConsistencyTraining, Direct, ProgressiveDistillation)
METHODS = (*METHODS, ScoreIdentityDistillation, Tract)
ALL = [*METHODS, ContinuousTime, pytest.param(Adversarial, marks=pytest.mark.nightly)]


class Block(nn.Module):
    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.inner, self.outer, self.p = nn.Linear(width, width), nn.Linear(width, width), p

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return h + self.outer(dropout(silu(self.inner(h) + e), self.p, self.training))


class Forgetful(nn.Module):
    """Three blocks with dropout, which are repeated: they can be computed again in backward passes."""

    embedding_channels = 16

    def __init__(self, p: float, pixels: int = 2) -> None:
        super().__init__()
        self.time, self.entry, self.exit = TimeEmbedding(16), nn.Linear(pixels, 16), nn.Linear(16, pixels)
        self.blocks = nn.ModuleList(Block(16, p) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor, embedding: Tensor | None = None, c: Condition | None = None) -> Tensor:
        e = self.time(t) if embedding is None else self.time(t) + embedding
        h = self.entry(x.flatten(1))
        for block in self.blocks:
            h = block(h, e)
        return self.exit(h).view(x.shape)


def teacher(p: float = 0.3) -> Teacher:
    """The same weights whatever `p` is."""
    torch.manual_seed(0)
    return Teacher(
        "forgetful", Denoiser(Forgetful(p), VPCosine(), "v"), (2, 1, 1), "forgetful", blank=lambda: Forgetful(p)
    )


def made(cls: type[Method], p: float = 0.3, **settings) -> Method:
    """With weights that differ between its networks; the same whatever `p` is."""
    method = cls(cls.Config(**settings), teacher(p))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in method.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return method


def stepped(method: Method, batch: Batch, seed: int = 5) -> list[tuple[float, dict[str, Tensor]]]:
    """(loss, gradients) of each update of a step, with masks from `seed`."""
    found = []
    torch.manual_seed(seed)
    for network, loss in method.train_step(batch):
        loss.backward()
        found.append((loss.item(), {n: w.grad.clone() for n, w in network.named_parameters() if w.grad is not None}))
        method.zero_grad()
    return found


def same(a: list[tuple[float, dict[str, Tensor]]], b: list[tuple[float, dict[str, Tensor]]]) -> bool:
    return len(a) == len(b) and all(
        x == y and g.keys() == h.keys() and all(torch.equal(g[n], h[n]) for n in g)
        for (x, g), (y, h) in zip(a, b, strict=True)
    )


def by_hand(network: nn.Module, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    loss.backward()
    gradients = {name: w.grad.clone() for name, w in network.named_parameters() if w.grad is not None}
    network.zero_grad()
    return loss.item(), gradients


# --- SiD -------------------------------------------------------------------------------------------------------------


def released_sid(method: ScoreIdentityDistillation, batch: Batch, seed: int = 5):
    """The loop of sid_training_loop.py: G in eval() makes images for psi, and phi and psi are in eval() for G."""
    G, psi, phi, schedule = method.student, method.fake, method.teacher.denoiser, method.teacher.schedule
    t_init = schedule.t_of_lam(time([math.log(2.5)] * batch.size))
    generate = lambda z: G(schedule.alpha(t_init) * 2.5 * z, t_init)
    torch.manual_seed(seed)
    G.eval().requires_grad_(False)
    psi.train().requires_grad_(True)
    x = generate(batch.noise())
    t = lognormal_time(schedule, batch.uniform(), -1.2, 1.2)
    tau = schedule.noise_level(t)
    x_t = schedule.alpha(t) * x + schedule.sigma(t) * batch.noise()
    first = by_hand(psi, ((1 / tau**2 + 1 / 0.5**2) * (psi(x_t, t) - x).square()).mean())
    psi.eval().requires_grad_(False)
    G.train().requires_grad_(True)
    x = generate(batch.noise())
    t = karras_time(schedule, batch.uniform(), method.low, method.high)
    x_t = schedule.alpha(t) * x + schedule.sigma(t) * batch.noise()
    D_phi, D_psi = phi(x_t, t), psi(x_t, t)
    scale = (x - D_phi).abs().mean(dim=(1, 2, 3), keepdim=True).detach().clamp(min=1e-5)
    second = by_hand(G, ((D_phi - D_psi) * (D_phi - x - 1.2 * (D_phi - D_psi)) / scale).mean())
    psi.train().requires_grad_(True)
    return [first, second]


def near(a, b, rtol: float = 1e-9) -> bool:
    return all(
        math.isclose(x, y, rel_tol=rtol)
        and g.keys() == h.keys()
        and all(torch.allclose(g[n], h[n], rtol=rtol, atol=1e-12) for n in g)
        for (x, g), (y, h) in zip(a, b, strict=True)
    )


@pytest.mark.usefixtures("float64")
def test_sid_is_in_the_modes_of_the_release():
    method = made(ScoreIdentityDistillation)
    expected = released_sid(method, make_batch(16))
    assert near(stepped(method, make_batch(16)), expected)
    assert not near(stepped(method, make_batch(16), seed=6), expected)  # the masks matter, where they are


@pytest.mark.usefixtures("float64")
def test_sid_has_no_loss_where_the_fake_score_is_the_teacher():
    method = made(ScoreIdentityDistillation)
    method.fake.load_state_dict(method.teacher.denoiser.state_dict())
    (_, _), (loss, gradients) = stepped(method, make_batch(16))
    assert loss == 0 and all(gradient.abs().max() < 1e-14 for gradient in gradients.values())


# --- consistency models ----------------------------------------------------------------------------------------------


def released_consistency(method, batch: Batch, seed: int = 5, shared: bool = True):
    """Of both: student and target in train(), the generator's state put back between them (karras_diffusion.py)."""
    schedule = method.teacher.schedule
    x_0, eps = batch.x_0, batch.noise()
    if isinstance(method, ConsistencyTraining):
        grid, n = method.grid, torch.searchsorted(method.cumulative, batch.uniform(), right=True)
    else:
        grid, n = method.grid, batch.integers(0, len(method.grid) - 1)
    t, s = grid[n + 1], grid[n]
    x_t = schedule.alpha(t) * x_0 + schedule.sigma(t) * eps
    x_s = schedule.alpha(s) * x_0 + schedule.sigma(s) * eps
    if isinstance(method, ConsistencyDistillation):
        f = method.teacher.denoiser.network.eval()
        assert not f.training
        x_s = ddim_step(schedule, x_t, method.teacher.denoise(x_t, t).detach(), t, s)
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    # called on the networks themselves, in training mode, round the harness's rule
    with torch.no_grad():
        target = plain(method.target, x_s, s)
    if shared:
        torch.set_rng_state(state)
    F = plain(method.student, x_t, t)
    step = (schedule.noise_level(t) - schedule.noise_level(s)).to(F.dtype)
    return [by_hand(method.student, ((F - target).square() / step).mean())]


def plain(F, x: Tensor, t: Tensor) -> Tensor:
    """The consistency function of eq. 5 from the bare network, on VP: D = alpha x - sigma v."""
    schedule, e, sd = F.schedule, F.e, F.sd
    tau, alpha, sigma = schedule.noise_level(t), schedule.alpha(t), schedule.sigma(t)
    D = alpha * x - sigma * F.denoiser.network(x, t.flatten())
    k_skip, k_out = sd**2 / (tau**2 + sd**2), tau * sd / (tau**2 + sd**2).sqrt()
    NN = (D - k_skip * x / alpha) / k_out
    return sd**2 / ((tau - e) ** 2 + sd**2) * x / alpha + (tau - e) * sd / (tau**2 + sd**2).sqrt() * NN


def real(size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(2)
    read = lambda n: (torch.rand(n, 2, 1, 1, generator=generator) * 2 - 1, None)
    return Batch(size, (2, 1, 1), torch.Generator().manual_seed(3), "cpu", read)


CONSISTENCY = [
    (ConsistencyDistillation, {"solver": "ddim"}),
    (ConsistencyDistillation, {"solver": "ddim", "mu": 0.0}),
    (ConsistencyTraining, {"start": "teacher"}),
    (ConsistencyTraining, {"start": "teacher", "mu": 0.0}),
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("cls", "settings"), CONSISTENCY)
def test_student_and_target_share_a_mask_as_released(cls, settings):
    method = made(cls, **settings)
    method.start_phase(0)
    expected = released_consistency(method, real())
    assert near(stepped(method, real()), expected, 1e-7)
    after = torch.get_rng_state()
    released_consistency(method, real())
    assert torch.equal(after, torch.get_rng_state())  # as after one evaluation
    apart = released_consistency(method, real(), shared=False)
    assert abs(apart[0][0] / expected[0][0] - 1) > 0.05


@pytest.mark.usefixtures("float64")
def test_under_one_mask_a_loss_stays_what_it_is_without_however_many_levels_there_are():
    """With masks of their own it grows: the difference of neighbouring levels falls with N, that of masks does not."""
    ratios = {}
    for levels in (21, 151, 1281):
        settings = {"start": "teacher", "mu": 0.0, "s0": levels - 1, "s1": levels - 1}
        losses = []
        for p in (0.0, 0.3):
            method = made(ConsistencyTraining, p, **settings)
            method.start_phase(0)
            losses.append(stepped(method, real(256))[0][0])
            if p:
                losses.append(released_consistency(method, real(256), shared=False)[0][0])
        ratios[levels] = losses[1] / losses[0], losses[2] / losses[0]
    assert all(0.7 < shared < 1.5 for shared, _ in ratios.values()), ratios
    assert ratios[1281][1] > 2 * ratios[151][1] > 4 * ratios[21][1] > 4, ratios


# --- the others ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("cls", [Boot, ProgressiveDistillation, Tract])
def test_targets_drop_nothing(cls):
    """They are those of networks without dropout; what is trained does drop."""
    targets, losses = [], []
    for p, seed in ((0.0, 5), (0.3, 5), (0.3, 6)):
        method = made(cls, p)
        method.start_phase(len(method.phases()) - 1)  # whose teacher is another student
        original = method.target
        method.target = lambda *args, original=original: targets.append(original(*args)) or targets[-1]
        losses.append(stepped(method, real(), seed)[0][0])
    assert torch.equal(targets[0], targets[1]) and torch.equal(targets[0], targets[2])
    assert len(set(losses)) == 3


@pytest.mark.usefixtures("float64")
def test_pairs_drop_nothing_and_the_student_does():
    methods = [made(Direct, p, online=True, steps=3) for p in (0.0, 0.3)]
    for method in methods:
        method.store = None
    (_, x_0, _), (_, again, _) = (method.pair(make_batch(16)) for method in methods)
    assert torch.equal(x_0, again)
    torch.manual_seed(5)
    student, schedule, eps = methods[1].student, VPCosine(), make_batch(16).noise()
    t = time([schedule.t_max] * 16)
    answer = schedule.alpha(t) * x_at_t_max(schedule, eps) - schedule.sigma(t) * student.network(
        x_at_t_max(schedule, eps), t.flatten()
    )
    assert student.network.training
    assert stepped(methods[1], make_batch(16))[0][0] == pytest.approx((answer - x_0).square().mean().item(), rel=1e-9)


EVALUATIONS = {
    Boot: [1.25, 0, 3.25],
    ConsistencyDistillation: [1, 1, 2],
    ConsistencyTraining: [1, 1, 0],
    Direct: [1, 0, 0],
    ProgressiveDistillation: [1, 0, 2],
    ScoreIdentityDistillation: [2, 0, 3],
    Tract: [1, 0, 2],
}


@pytest.mark.parametrize("cls", ALL)
def test_the_check_of_methods_finds_dropout_in_order(cls):
    told = check_dropout(MethodBench("first", cls, None, WITHOUT_CLASSES, 0))
    assert (told.startswith("evaluations per image: ") and ", 0 without" not in told) or cls in (
        ConsistencyTraining,
        Direct,
    )


@pytest.mark.parametrize("cls", ALL)
def test_a_training_with_dropout_goes_on_with_the_same_masks(cls):
    bench = MethodBench("first", cls, None, WITHOUT_CLASSES, 0, dropout=0.3)
    assert not changed(weights_of(bench.train().method), weights_of(bench.train_interrupted(bench.steps() - 1)))


# --- the rule --------------------------------------------------------------------------------------------------------


def test_dropout_acts_where_the_gradient_reaches_the_weights_and_nowhere_else():
    made_of = teacher(0.5)
    student, t = made_of.student(), time([0.5] * 8)
    x = torch.randn(8, 2, 1, 1)
    drops = lambda f: not torch.equal(f(), f())
    answer = lambda: student(x, t).detach()
    assert student.network.training and drops(answer)
    with torch.no_grad():
        assert not drops(answer)
    with torch.inference_mode():
        assert not drops(answer)
    with frozen_weights(student):
        assert not drops(answer)
    with evaluating(student):
        assert not drops(answer)
    student.requires_grad_(False)
    assert not drops(answer)
    student.requires_grad_(True)
    assert drops(answer) and student.network.training and all(m.training for m in student.modules())
    for frozen in (made_of.denoise, made_of.frozen_copy().forward, made_of.student().freeze().forward):
        assert not drops(lambda frozen=frozen: frozen(x, t).detach())
    student.eval()
    assert not drops(answer) and not student.network.training  # whoever says eval() gets it


def test_the_gradient_through_a_network_that_is_held_is_that_of_evaluation_mode():
    student = teacher(0.5).student()
    x, t = torch.randn(8, 2, 1, 1), time([0.5] * 8)
    gradients = []
    for block in (frozen_weights(student), evaluating(student)):
        at = x.clone().requires_grad_()
        with block:
            out = student(at, t)
        out.square().sum().backward()
        gradients.append(at.grad)
    assert torch.equal(*gradients) and gradients[0].any()


def test_blocks_give_back_what_they_took_also_when_an_error_ends_them():
    student = teacher().student()
    first = next(student.parameters()).requires_grad_(False)
    student.network.blocks[0].eval()
    before = {name: module.training for name, module in student.named_modules()}
    for block in (frozen_weights, evaluating, one_mask):
        with pytest.raises(KeyError), block(student):
            raise KeyError
        assert [w for w in student.parameters() if not w.requires_grad] == [first]
        assert {name: module.training for name, module in student.named_modules()} == before
        assert student.counted.mask is None


def test_weights_come_back_where_two_blocks_end_in_another_order():
    """As they do where parts of a step yield within one."""
    student = teacher().student()
    blocks = frozen_weights(student), frozen_weights(student)
    for block in blocks:
        block.__enter__()
    for block in blocks:
        block.__exit__(None, None, None)
    assert all(weight.requires_grad for weight in student.parameters())


def test_one_mask_is_one_mask():
    student, x, t = teacher(0.5).student(), torch.randn(8, 2, 1, 1), time([0.5] * 8)
    average = copy.deepcopy(student).requires_grad_(False)
    torch.manual_seed(1)
    alone = student(x, t)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    with one_mask(student, average):
        with torch.no_grad():
            first = average(x, t)
        second, third = student(x, t), student(x, t)
    assert torch.equal(alone, first) and torch.equal(first, second) and torch.equal(second, third)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(student(x, t), third)
    with evaluating(student), one_mask(student):
        assert torch.equal(student(x, t), student(x, t)) and not student.network.training
    with one_mask(nn.Identity()):  # nothing of a teacher in it
        pass


def test_a_step_that_yields_under_one_mask_is_refused():
    student = teacher().student()
    blocks = one_mask(student), one_mask(student)
    for block in blocks:
        block.__enter__()
    with pytest.raises(RuntimeError, match="end the block before"):
        blocks[0].__exit__(None, None, None)


# --- with what else there is -----------------------------------------------------------------------------------------


OTHERS = [
    (ScoreIdentityDistillation, {}),
    (Boot, {}),
    (ContinuousTime, {}),
    (ContinuousTime, {"exact": True}),
    (Adversarial, {"layer": "blocks.1.inner"}),
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("cls", "settings"), [*CONSISTENCY, *OTHERS])
def test_blocks_that_are_computed_again_drop_what_they_dropped(cls, settings):
    """Their modes and masks are those of the forward, though the step has gone on since."""
    found = []
    for recompute in (False, True):
        method = made(cls, **settings)
        method.start_phase(0)
        with applied(ComputeConfig(recompute=recompute), method, "cpu"):
            found.append(stepped(method, real() if cls.needs_data else make_batch(16)))
    assert near(*found, 1e-12)


@pytest.mark.parametrize("cls", [ConsistencyDistillation, ConsistencyTraining, ScoreIdentityDistillation])
def test_parts_of_a_step_have_masks_of_their_own_each_shared_within_its_part(cls):
    """The parts go side by side, as in the training loop."""
    bench = MethodBench("first", cls, None, WITHOUT_CLASSES, 0, dropout=0.3)
    method = bench.method()
    method.start_phase(0)
    batch = Batch(IMAGES, SHAPE, torch.Generator().manual_seed(0), "cpu", bench.read())
    parts = [iter(method.train_step(part)) for part in batch.parts(2)]
    start = len(calls_of(method))
    for step in parts:
        next(step)[1].backward()
        check_masks(calls_of(method)[start:], method)
        start = len(calls_of(method))
    masks = [call.mask for call in calls_of(method) if call.trained]
    assert len(masks) == 2 and not torch.equal(*masks)


def test_masks_of_processes_differ_and_are_kept():
    states = []
    for process in range(2):
        seed_masks(7, process)
        states.append(torch_generators_state("cpu"))
        states.append({"draw": torch.rand(3)})
    assert not torch.equal(states[1]["draw"], states[3]["draw"])
    restore_torch_generators(states[0], "cpu")
    assert torch.equal(torch.rand(3), states[1]["draw"])


class Careless(Method):
    """What the check is there for: the bare network, and a student that is trained in evaluation mode."""

    name, paper, needs_data, Config = "careless", "none", False, MethodConfig
    bare = True

    def train_step(self, batch):
        eps, t = batch.noise(), batch.uniform()
        with torch.no_grad():
            goal = self.student.network(eps, t.flatten().float()) if self.bare else eps
        if not self.bare:
            self.student.eval()
        yield self.student, (self.student(eps, t) - goal).square().mean()

    def sample(self, noise, nfe, c):
        return noise(0)


@pytest.mark.parametrize(
    ("bare", "fault"), [(True, "gets no gradient is evaluated with dropout"), (False, "never acts")]
)
def test_the_check_of_methods_finds_what_is_careless(bare, fault):
    cls = type("Careless", (Careless,), {"bare": bare})
    with pytest.raises(Exception, match=fault):
        check_dropout(MethodBench("first", cls, None, WITHOUT_CLASSES, 0))


@pytest.mark.nightly
@pytest.mark.slow
def test_compiled_networks_share_a_mask_with_gradients_and_without():
    """torch's compiler draws masks by kernels of its own, from seeds that are drawn from the same generator."""
    method = made(ConsistencyTraining, start="teacher")
    method.target.load_state_dict(method.student.state_dict())
    x, t, answers = torch.randn(8, 2, 1, 1), time([0.5] * 8), []
    with applied(ComputeConfig(compile="blocks"), method, "cpu"):
        for _ in range(2):
            with one_mask(method.student, method.target):
                with torch.no_grad():
                    answers.append(method.target(x, t))
                answers.append(method.student(x, t).detach())
        with torch.no_grad():
            assert torch.equal(method.student(x, t), method.student(x, t))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[2], answers[3])
    assert not torch.equal(answers[0], answers[2])
