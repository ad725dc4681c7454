"""The conformance suite for methods: built-in ones pass, and each fault is found by its check and by no other."""

from __future__ import annotations

import copy
import linecache
import os
import random
import re
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from command_line import exit_code
from distillbench import Batch, Method, MethodConfig, NetworkConfig, Phase, UserError, hookimpl, option, registry
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.derivatives import derivative
from distillbench.diffusion.noise import Noise
from distillbench.diffusion.samplers import ddim, time_like, uniform_times, x_at_t_max
from distillbench.networks import smooth_times
from distillbench.networks.edm import SongUNet
from distillbench.options import Among, Between, require_positive
from distillbench.registry import Source, installed, load_registry
from distillbench.testing import conformance, method_bench, methods, methods_learning, methods_steps
from distillbench.testing.bench_networks import Computed
from distillbench.testing.checks import Doubt
from distillbench.testing.conformance import SUITES, Finding, assert_conforms, check_class, check_method
from distillbench.testing.exact_bench import exact_distribution
from distillbench.testing.teacher_bench import TinyImages
from faults import failed, found_in, gatherer

METHODS = load_registry().methods
CHECKS = SUITES["methods"].checks


# --- built-in methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS))
def test_built_in_methods_conform_on_few_benches(monkeypatch, name):
    """By day on two benches, at night on all of them."""
    two = {label: method_bench.CONDITIONINGS[label] for label in ("unconditional", "classes")}
    monkeypatch.setattr(methods, "CONDITIONINGS", two)
    assert not failed(found_in("methods", METHODS[name].cls, "save_load", all_checks=True))


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize(("network", "precision", "recompute"), [("edm", "bf16", True), ("unet", "fp32", False)])
def test_every_built_in_method_conforms_on_other_networks(name, network, precision, recompute):
    found = check_class(
        METHODS[name].cls, distribution_images=0, network=network, precision=precision, recompute=recompute
    )
    assert not failed(found)


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_built_in_method_conforms(name):
    found = check_method(METHODS[name].cls, distribution_images=0)
    assert not failed(found)
    assert [finding.check for finding in found] == [check.name for check in CHECKS]
    assert [finding.check for finding in found if finding.ok is None] == ["matches"]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_built_in_method_matches_an_exact_teacher(name):
    (found,) = matches_findings(METHODS[name].cls)
    assert found.ok, found.message


def matches_findings(cls, config=None, images=conformance.DISTRIBUTION_IMAGES) -> list[Finding]:
    """The finding of the check `matches` alone."""
    check = next(check for check in CHECKS if check.name == "matches")
    bench = method_bench.MethodBench("unconditional", cls, config, method_bench.WITHOUT_CLASSES, images)
    return [check.on([bench], {need: {} for need in check.needs}).finding(check)]


# --- a small correct method ------------------------------------------------------------------------------------------


class Good(Method):
    """Regression on the teacher's sample in a few steps, plus a small pull towards a target network."""

    name, paper, needs_data = "good", "none: a test", False

    @dataclass
    class Config(MethodConfig):
        lr: float = option(5e-3, "peak learning rate of Adam")
        pull: float = option(0.01, "weight of the target network")
        steps: int = option(4, "of the teacher's answer")

    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        self.target = copy.deepcopy(self.student).requires_grad_(False)

    def g(self, eps: Tensor, c=UNCONDITIONAL, network: nn.Module | None = None) -> Tensor:
        schedule = self.teacher.schedule
        return (network or self.student)(x_at_t_max(schedule, eps), time_like(eps, schedule.t_max), c)

    def solved(self, f, eps: Tensor) -> Tensor:
        schedule = self.teacher.schedule
        return ddim(f, schedule, x_at_t_max(schedule, eps), uniform_times(schedule, self.config.steps))

    def answer(self, eps: Tensor, c) -> Tensor:
        return self.solved(lambda x_t, t: self.teacher.denoise(x_t, t, c), eps)

    def pulled(self, eps: Tensor, c) -> Tensor:
        with torch.no_grad():
            return self.g(eps, c, self.target)

    def loss(self, eps: Tensor, c) -> Tensor:
        x_0, g = self.answer(eps, c), self.g(eps, c)
        return (g - x_0).square().mean() + self.config.pull * (g - self.pulled(eps, c)).square().mean()

    def train_step(self, batch: Batch) -> Iterator:
        yield self.student, self.loss(batch.noise(), batch.c)

    @torch.no_grad()
    def after_step(self) -> None:
        torch._foreach_lerp_(list(self.target.parameters()), list(self.student.parameters()), 0.1)

    def sample(self, noise, nfe, c) -> Tensor:
        return self.g(noise(0), c)


@pytest.mark.nightly
def test_a_correct_method_passes():
    found = check_method(Good, distribution_images=20_000)
    assert {finding.ok for finding in found} == {True} and not any(finding.doubt for finding in found)
    messages = {finding.check: finding.message for finding in found}
    assert "students 1 with gradient and 1 without, teacher 4 without" in messages["gradients"]
    assert "flows through" not in messages["gradients"] and "no step waits" in messages["device"]
    assert "RMSE to the exact map 0." in messages["matches"]


# --- one fault each --------------------------------------------------------------------------------------------------

FAULTS, fault = gatherer()  # (method with one fault, the check that finds it, part of the message)


@fault("declared", "settings without a help text: k")
class SilentSetting(Good):
    @dataclass
    class Config(MethodConfig):
        k: int = 3


@fault("declared", "lower-case letters")
class Capitals(Good):
    name = "Capitals"


@fault("declared", "paper is empty")
class NoPaper(Good):
    paper = " "


@fault("declared", "must be positive")
class BadDefault(Good):
    @dataclass
    class Config(MethodConfig):
        lr: float = option(-1.0, "peak learning rate of Adam")


@fault("builds", "ZeroDivisionError: division by zero (line")
class Crashes(Good):
    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        1 / 0  # noqa: B018


@fault("builds", "refused (not today)")
class RefusesAll(Good):
    def __init__(self, config, teacher) -> None:
        raise UserError("not today")


@fault("builds", "self.head (LazyLinear): a layer has no weights before it is first called")
class DoesNotKnowItsSizes(Good):
    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        self.head = nn.LazyLinear(3)


@fault("search", "the default of steps, 4, is not in its search (8 to 16, whole numbers)")
class DefaultOutsideItsSearch(Good):
    @dataclass
    class Config(Good.Config):
        steps: int = option(4, "of the teacher's answer", search=Between(8, 16))


@fault("search", "the search of pull mixes ints and floats: write 0.0 for 0")
class MixedNumbers(Good):
    @dataclass
    class Config(Good.Config):
        pull: float = option(0.01, "weight of the target network", search=Among([0, 0.01]))


@fault("search", "steps=0 is in the search space, and the settings refuse it: steps must be positive, got 0")
class RefusedEnd(Good):
    @dataclass
    class Config(Good.Config):
        steps: int = option(4, "of the teacher's answer", search=Between(0, 8))

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "steps")


@fault("search", "is in the search space, and the settings refuse it: steps and pull exclude each other")
class RefusedCombination(Good):
    @dataclass
    class Config(Good.Config):
        pull: float = option(0.0, "weight of the target network", search=Among([0.0, 0.1]))
        steps: int = option(4, "of the teacher's answer", search=Between(4, 8))

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.pull and self.steps > 4:
                raise UserError("steps and pull exclude each other")


@fault("search", "steps=8 is in the search space, and the method refuses it: 8 steps are too many")
class RefusedByTheMethod(Good):
    @dataclass
    class Config(Good.Config):
        steps: int = option(4, "of the teacher's answer", search=Between(4, 8))

    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        if config.steps > 4:
            raise UserError(f"{config.steps} steps are too many")


@fault("search", "pull=0.1 steps=8 is in the search space, and the method refuses it: 8 steps and a pull")
class RefusedInPreparation(Good):
    @dataclass
    class Config(Good.Config):
        pull: float = option(0.0, "weight of the target network", search=Among([0.0, 0.1]))
        steps: int = option(4, "of the teacher's answer", search=Between(4, 8))

    def prepare(self, workspace) -> None:
        if self.config.pull and self.config.steps > 4:
            raise UserError(f"{self.config.steps} steps and a pull")


@fault("search", "9 settings of training are searched, at most 8 may be: lr, ema_halflife_kimg, a, b, c, d, e, f, g")
class SearchesTooMany(Good):
    Config = make_dataclass(
        "Config",
        [(name, float, option(1.0, "any", search=Between(0.0, 1.0))) for name in "abcdefg"],
        bases=(Good.Config,),
    )


@fault("search", "no setting of fake (in its search) 'lrr'. Did you mean 'lr'?")
class SearchOfNothing(Good):
    @dataclass
    class Config(Good.Config):
        fake: NetworkConfig = option(NetworkConfig(), "of no network", search={"lrr": Among([None, 1e-3])})


@fault("search", "pull has no settings, so no pull.lr either")
class SearchOfANumber(Good):
    @dataclass
    class Config(Good.Config):
        pull: float = option(0.01, "weight of the target network", search={"lr": Among([None, 1e-3])})


@fault("search", "steps=3 changes whether it reads real images")
class SearchesForData(Good):
    reads_data = classmethod(lambda cls, config: config.steps < 4)

    @dataclass
    class Config(Good.Config):
        steps: int = option(4, "of the teacher's answer", search=Between(3, 8))


@fault("search", "steps=3 changes whether it uses the teacher")
class SearchesForATeacher(Good):
    uses_teacher = property(lambda self: self.config.steps > 3)

    @dataclass
    class Config(Good.Config):
        steps: int = option(4, "of the teacher's answer", search=Between(3, 8))


@fault("search", "with steps=8 it does not sample with NFE 1, as it does by default")
class SearchLosesItsSamples(Good):
    @dataclass
    class Config(Good.Config):
        steps: int = option(4, "of the teacher's answer", search=Between(4, 8))

    def supports(self, nfe):
        return nfe == 1 and self.config.steps == 4


@fault("phases", "at least one, got []")
class NoPhases(Good):
    def phases(self):
        return []


@fault("phases", "a positive share")
class NoShare(Good):
    def phases(self):
        return [Phase("a"), Phase("b", share=0.0)]


@fault("data", "declares to read no real images and reads some")
class ReadsData(Good):
    def train_step(self, batch):
        yield self.student, self.loss(batch.noise(), batch.c) + batch.x_0.mean()


@fault("data", "declares to read real images and no step reads")
class ReadsNothing(Good):
    needs_data = True

    def train_step(self, batch):
        yield self.student, self.loss(batch.noise(), self.teacher.conditioning.of_images(range(batch.size), "cpu"))


@fault("steps", "yields nothing")
class YieldsNothing(Good):
    def train_step(self, batch):
        self.loss(batch.noise(), batch.c)
        return iter(())


@fault("steps", "pairs (network, loss), got Tensor")
class YieldsLossOnly(Good):
    def train_step(self, batch):
        yield self.loss(batch.noise(), batch.c)


@fault("steps", "got shape (8, 1, 1, 1)")
class LossOfEachImage(Good):
    def train_step(self, batch):
        eps, c = batch.noise(), batch.c
        yield self.student, (self.g(eps, c) - self.answer(eps, c)).square().mean(dim=(1, 2, 3), keepdim=True)


@fault("steps", "a loss does not require a gradient")
class Detached(Good):
    def train_step(self, batch):
        yield self.student, self.loss(batch.noise(), batch.c).detach()


@fault("steps", "yielded with self.student does not depend on its weights")
class LossOfAnother(Good):
    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        self.fake = teacher.student()

    def train_step(self, batch):
        eps, c = batch.noise(), batch.c
        yield self.student, (self.g(eps, c, self.fake) - self.answer(eps, c)).square().mean()


@fault("steps", "self.student is never yielded")
class TrainsAnother(LossOfAnother):
    def train_step(self, batch):
        eps, c = batch.noise(), batch.c
        yield self.fake, (self.g(eps, c, self.fake) - self.answer(eps, c)).square().mean()


@fault("steps", "without weights to train")
class TrainsTheFrozen(Good):
    def train_step(self, batch):
        yield self.target, self.loss(batch.noise(), batch.c)


@fault("steps", "RuntimeError: what a pity (line")
class StepCrashes(Good):
    def train_step(self, batch):
        raise RuntimeError("what a\npity")


@fault("steps", "SystemExit")
class StepExits(Good):
    def train_step(self, batch):
        sys.exit("enough")


@fault("condition", "evaluated without a class: pass it batch.c")
class DropsTheClass(Good):
    def train_step(self, batch):
        yield self.student, self.loss(batch.noise(), UNCONDITIONAL)


@fault("condition", "without its guidance: call self.teacher.denoise")
class DropsTheGuidance(Good):
    def answer(self, eps, c):
        return self.solved(lambda x_t, t: self.teacher.denoiser(x_t, t, c), eps)


@fault("losses", "is nan")
class NanLoss(Good):
    def loss(self, eps, c):
        return super().loss(eps, c) * float("nan")


@fault("gradients", "never yielded gets a gradient (self.target)")
class ForgetsNoGrad(Good):
    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        self.target.requires_grad_(True)

    def pulled(self, eps, c):
        return self.g(eps, c, self.target)


@fault("dropout", "is trained in evaluation mode, so its dropout never acts")
class TrainsInEvaluationMode(Good):
    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        self.student.eval()


@fault("only_yielded", "itself changes self.target:")
class ChangesItsTarget(Good):
    def train_step(self, batch):
        yield self.student, self.loss(batch.noise(), batch.c)
        super().after_step()

    def after_step(self):
        pass


@fault("teacher_untouched", "take gradients in phase 0")
class TrainsTheTeacher(Good):
    def train_step(self, batch):
        eps, c = batch.noise(), batch.c
        self.teacher.denoiser.requires_grad_(True)
        yield self.teacher.denoiser, self.answer(eps, c).square().mean()
        with torch.no_grad():
            x_0 = self.answer(eps, c)
        yield self.student, (self.g(eps, c) - x_0).square().mean()


@fault("teacher_untouched", "the teacher's weights change in phase 0")
class MovesTheTeacher(Good):
    @torch.no_grad()
    def after_step(self):
        super().after_step()
        for mine, theirs in zip(self.teacher.denoiser.parameters(), self.student.parameters(), strict=False):
            mine.lerp_(theirs, 0.5)


@fault("teacher_untouched", "in training mode")
class PutsTheTeacherInTrainingMode(Good):
    def start_phase(self, index):
        self.teacher.denoiser.train()


@fault("trains", "DivergedError: the loss is nan")
class DivergesLater(Good):
    steps = 0

    def after_step(self):
        super().after_step()
        self.steps += 1

    def loss(self, eps, c):
        return super().loss(eps, c) / (0 if self.steps > 1 else 1) - (float("inf") if self.steps > 1 else 0)


@fault("trains", "the weights that it started with")
class FreshStudentAtTheEnd(Good):
    def end_phase(self, index, average):
        average.load_state_dict(self.teacher.student().state_dict())


@fault("randomness", "global generator of torch:")
class GlobalTorch(Good):
    def train_step(self, batch):
        yield self.student, self.loss(batch.noise() + torch.rand(()), batch.c)


@fault("randomness", "global generator of numpy and Python's random:")
class GlobalOthers(Good):
    def train_step(self, batch):
        yield self.student, self.loss(batch.noise() + np.random.rand() + random.random(), batch.c)


@fault("deterministic", "two trainings from one seed differ (self.student, self.target)")
class TrulyRandom(Good):
    def train_step(self, batch):
        yield self.student, self.loss(batch.noise(), batch.c) * (1 + os.urandom(1)[0] / 256)


@fault("deterministic", "two trainings from one seed differ")
class LooksAtTheClock(Good):
    def train_step(self, batch):
        yield self.student, self.loss(batch.noise(), batch.c) * (1 + time.perf_counter_ns() % 997 / 997)


@fault("deterministic", "two trainings from one seed differ")
class HidesGlobalRandomness(Good):
    def train_step(self, batch):
        with torch.random.fork_rng(devices=[]):
            eps = torch.randn(batch.size, *batch.shape)
        yield self.student, self.loss(eps, batch.c)


@fault("deterministic", "two seeds give the same weights")
class IgnoresTheSeed(Good):
    def train_step(self, batch):
        eps = torch.randn(batch.size, *batch.shape, generator=torch.Generator().manual_seed(0))
        yield self.student, self.loss(eps, self.teacher.conditioning.of_images(range(batch.size), "cpu"))


@fault("resumes", "ends with other weights (self.student, self.target)")
class CountsInANumber(Good):
    """The weight of its loss depends on a plain number, which is not part of its state."""

    count = 0

    def train_step(self, batch):
        yield self.student, self.loss(batch.noise(), batch.c) * (1 + self.count)

    def after_step(self):
        super().after_step()
        self.count += 1


@fault("resumes", "it cannot be resumed: AttributeError: 'StoresANumber' object has no attribute 'seen'")
class StoresANumber(Good):
    """Later steps read an attribute that only the object of the first step has."""

    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        self.register_buffer("count", torch.zeros(()))

    def train_step(self, batch):
        yield self.student, self.loss(batch.noise(), batch.c) * (self.seen if self.count else 1)

    def after_step(self):
        super().after_step()
        self.count += 1
        self.seen = 1


@fault("cost", "estimates 192 evaluations from the steps of a cycle of each phase, training made 288")
class GrowsDearer(Good):
    steps = 0

    def after_step(self):
        super().after_step()
        self.steps += 1

    def answer(self, eps, c):
        return (super().answer(eps, c) + super().answer(eps, c)) / 2 if self.steps else super().answer(eps, c)


@fault("flops", "whose output is detached? Evaluate it under torch.no_grad()")
class DetachesTooLate(Good):
    """Counted with a backward pass that never comes."""

    def pulled(self, eps, c):
        return self.g(eps, c).detach()


class Derivative(Good):
    """Learns from its own derivative in t, computed with its output in one pass, as continuous-time methods do."""

    def derivative(self, eps, c):
        schedule = self.teacher.schedule
        x, t = x_at_t_max(schedule, eps), time_like(eps, schedule.t_max).clone()
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda x, t: self.student(x, t, c), (x, t), (eps, torch.ones_like(t)))

    def loss(self, eps, c):
        g, dg = self.derivative(eps, c)
        return (g - self.answer(eps, c) - 0.01 * dg.detach()).square().mean()


@fault("attention", "has no forward-mode derivative: use distillbench.diffusion.derivative")
class ThroughFusedAttention(Derivative):
    def derivative(self, eps, c):
        schedule = self.teacher.schedule
        x, t = x_at_t_max(schedule, eps), time_like(eps, schedule.t_max).clone()
        return torch.func.jvp(lambda x, t: self.student(x, t, c), (x, t), (eps, torch.ones_like(t)))


@fault("flops", "detach the tangent of torch.func.jvp")
class ThroughTheTangent(Derivative):
    def loss(self, eps, c):
        g, dg = self.derivative(eps, c)
        return (g - self.answer(eps, c) - 0.01 * dg).square().mean()


@fault("supports", "must be True or False, got None")
class SupportsNone(Good):
    def supports(self, nfe):
        return True if nfe == 1 else None


@fault("supports", "False for all n up to 1024")
class SupportsNothing(Good):
    def supports(self, nfe):
        return False


@fault("supports", "supports(2) is False before training and True after it")
class SupportsMoreLater(Good):
    most = 1

    def end_phase(self, index, average):
        self.most = 2

    def supports(self, nfe):
        return nfe <= self.most


@fault("ready", "ready(1, phase) must be True or False, got None")
class ReadyNone(Good):
    def ready(self, nfe, phase):
        return None


@fault("ready", "ready(2, 0) is True and supports(2) is False")
class ReadyForMore(Good):
    def ready(self, nfe, phase):
        return nfe <= 2


class TwoPhases(Good):
    def phases(self):
        return [Phase("first"), Phase("second")]


@fault("ready", "is [True, False] over the phases: once True it must stay True")
class ReadyNoMore(TwoPhases):
    def ready(self, nfe, phase):
        return nfe == 1 and phase == 0


@fault("ready", "ready(1, 0) is True, but sampling in that phase fails: RuntimeError: not yet")
class NotReady(TwoPhases):
    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        self.register_buffer("finished", torch.tensor(False))

    def end_phase(self, index, average):
        self.finished.fill_(True)

    def sample(self, noise, nfe, c):
        if not self.finished:
            raise RuntimeError("not yet")
        return super().sample(noise, nfe, c)


@fault("samples", "must have the noise's shape (8, 2, 4, 4), got (8, 32)")
class FlatSamples(Good):
    def sample(self, noise, nfe, c):
        return super().sample(noise, nfe, c).flatten(1)


@fault("samples", "must be torch.float32, got torch.float64")
class DoubleSamples(Good):
    def sample(self, noise, nfe, c):
        return super().sample(noise, nfe, c).double()


@fault("samples", "not finite")
class InfiniteSamples(Good):
    def sample(self, noise, nfe, c):
        return super().sample(noise, nfe, c) / 0


@fault("samples", "AttributeError")
class SampleCrashes(Good):
    def sample(self, noise, nfe, c):
        return self.nowhere(noise(0))


@fault("condition_sampled", "evaluated without a class: pass it batch.c, or the c of sample")
class SamplesWithoutClass(Good):
    def sample(self, noise, nfe, c):
        return self.g(noise(0))


@fault("condition_sampled", "other classes give the same images")
class SamplesOneClass(Good):
    def sample(self, noise, nfe, c):
        eps = noise(0)
        return self.g(eps, self.teacher.conditioning.of_images([0] * len(eps), str(eps.device)))


@fault("nfe", "requested 1 evaluations per image, counted 2")
class EvaluatesTwice(Good):
    def sample(self, noise, nfe, c):
        return self.g(self.g(noise(0), c), c)


@fault("nfe", "requested 2 evaluations per image, counted 1")
class EvaluatesOnce(Good):
    def supports(self, nfe):
        return nfe in (1, 2)


@fault("uncounted", "call denoisers or their .output(), never their .network")
class AroundTheCounter(Good):
    def sample(self, noise, nfe, c):
        eps = noise(0)
        hidden = self.student.network(eps, torch.ones(len(eps)), None, c)
        return self.g(eps + hidden, c)


@fault("noise", "other noise gives the same images")
class IgnoresNoise(Good):
    def sample(self, noise, nfe, c):
        return self.g(torch.ones_like(noise(0)), c)


@fault("noise", "the same noise gives other images")
class DrawsItsOwnNoise(Good):
    def sample(self, noise, nfe, c):
        return self.g(noise(0) + torch.randn(noise(0).shape), c)


@fault("noise", "sample calls noise(1)")
class AsksForMoreNoise(Good):
    def sample(self, noise, nfe, c):
        return self.g(noise(0) + noise(1), c)


@fault("noise", "never calls noise(0)")
class NeverAsks(Good):
    def supports(self, nfe):
        return nfe == 2

    def sample(self, noise, nfe, c):
        return self.g(self.g(noise(1), c), c)


@fault("noise", "overwrites the given noise")
class OverwritesNoise(Good):
    def sample(self, noise, nfe, c):
        return self.g(noise(0).mul_(2), c)


@fault("noise", "let keeps_noise(2) be False")
class AddsFreshNoise(Good):
    def supports(self, nfe):
        return nfe in (1, 2)

    def sample(self, noise, nfe, c):
        x_0 = self.g(noise(0), c)
        return x_0 if nfe == 1 else self.g(x_0 + noise(1), c)


@fault("batch_independent", "with the other images of the batch")
class CentresTheBatch(Good):
    def sample(self, noise, nfe, c):
        x_0 = super().sample(noise, nfe, c)
        return x_0 - x_0.mean(dim=0)


@fault("average", "weights that are no phase's average")
class SamplesItsTarget(Good):
    def sample(self, noise, nfe, c):
        return self.g(noise(0), c, self.target)


@fault("average", "only the teacher is evaluated")
class SamplesTheTeacher(Good):
    def supports(self, nfe):
        return nfe == self.teacher.conditioning.evaluations

    def sample(self, noise, nfe, c):
        eps, schedule = noise(0), self.teacher.schedule
        return self.teacher.denoise(x_at_t_max(schedule, eps), time_like(eps, schedule.t_max), c)


@fault("save_load", "plain tensors are lost: self.shift")
class KeepsAPlainTensor(Good):
    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        self.shift = torch.zeros(())

    def after_step(self):
        super().after_step()
        self.shift = self.shift + 0.1

    def sample(self, noise, nfe, c):
        return super().sample(noise, nfe, c) + self.shift


@fault("save_load", "cannot be sampled: AttributeError")
class SetsUpInTraining(Good):
    def start_phase(self, index):
        self.scale = 2.0

    def sample(self, noise, nfe, c):
        return super().sample(noise, nfe, c) * self.scale


@fault("save_load", "other keys than that of a new one (self.final)")
class GrowsANetwork(Good):
    def end_phase(self, index, average):
        self.final = copy.deepcopy(average)


@fault("device", "uses a tensor on another device: operator aten::mul at test_conformance.py:")
class MakesTensorsOnTheCpu(Good):
    def loss(self, eps, c):
        return (super().loss(eps, c) * torch.ones(2)).mean()


class Waits(Good):
    """Reads its loss in every step, which is allowed, but slow on a GPU."""

    def loss(self, eps, c):
        loss = super().loss(eps, c)
        return loss if loss.item() < 1e9 else loss / 2


def test_a_method_that_waits_for_the_device_is_reported(small):
    found = {finding.check: finding for finding in found_in("methods", Waits, "device")}
    assert not failed(found.values()) and found["device"].doubt
    assert re.search(
        r"waits for the device 1 times per step at test_conformance.py:\d+ \(item\)", found["device"].message
    )


def test_a_method_that_another_process_cannot_import_is_not_checked_there(small):
    class Local(Good):
        pass

    found = {finding.check: finding for finding in found_in("methods", Local, "device")}
    assert found["device"].ok is None and "in another process" in found["device"].message


class ForgetsToDetach(Good):
    """Its target is the student's output for its own output, without the stop-gradient that it needs."""

    def pulled(self, eps, c):
        return self.g(self.g(eps, c), c)


class DetachesAfterwards(ForgetsToDetach):
    def pulled(self, eps, c):
        return super().pulled(eps, c).detach()


def test_a_gradient_through_several_evaluations_is_reported(small):
    """It may be a forgotten detach on the student, or intended, so it is a doubt and no fault."""
    forgets, detaches = (methods_steps.gradients(bench_of(cls)) for cls in (ForgetsToDetach, DetachesAfterwards))
    assert isinstance(forgets, Doubt)
    line = re.search(r"flows through 3 evaluations of self.student \(test_conformance.py:(\d+)\)", forgets)[1]
    assert linecache.getline(__file__, int(line)).strip().startswith("return (network or self.student)(")
    assert not isinstance(detaches, Doubt) and "flows through" not in detaches


def bench_of(cls, label="unconditional", **computed) -> method_bench.MethodBench:
    conditioning = method_bench.CONDITIONINGS[label]
    return method_bench.MethodBench(label, cls, None, conditioning, 0, computed=Computed(**computed))


def test_a_gradient_through_a_derivative_is_reported(small):
    """A method of MeanFlow's kind whose target, which contains the derivative, lacks its stop-gradient."""
    through, detached = (methods_steps.gradients(bench_of(cls)) for cls in (ThroughTheTangent, Derivative))
    assert isinstance(through, Doubt) and ".detach()" in through
    line = re.search(r"a forward-mode derivative of self.student \(test_conformance.py:(\d+)\)", through)[1]
    assert "torch.func.jvp" in linecache.getline(__file__, int(line))
    assert not isinstance(detached, Doubt)


class FreezesAllButBlocks(Good):
    """Like an adapter that freezes what it does not adapt: the embedding of the guidance weight, which is zero, too."""

    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        for name, weight in self.student.named_parameters():
            weight.requires_grad_("blocks" in name)


class HasAnUnusedLayer(Good):
    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        self.student.extra = nn.Linear(2, 2)
        self.target = copy.deepcopy(self.student).requires_grad_(False)


def test_weights_that_do_not_learn_are_named(small):
    frozen = methods_learning.learns(bench_of(FreezesAllButBlocks, "guidance drawn"))
    assert isinstance(frozen, Doubt) and frozen.startswith("self.student.guidance.3: zero after training")
    unused = methods_learning.learns(bench_of(HasAnUnusedLayer))
    assert isinstance(unused, Doubt)
    assert unused.startswith("self.student.extra.weight, self.student.extra.bias: no gradient in 4 steps.")
    assert not isinstance(methods_learning.learns(bench_of(Good, "guidance drawn")), Doubt)


class ComparesFeatures(Good):
    """Reads a feature of the student by a hook, and has a layer of its own on it."""

    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        self.head = nn.Linear(self.student.embedding_channels, 1)
        self.kept: list[Tensor] = []

    def train_step(self, batch):
        network = self.student.network
        layer = network.map_layer1 if isinstance(network, SongUNet) else network.time
        hook = layer.register_forward_hook(lambda module, given, out: self.kept.append(out))
        loss = self.loss(batch.noise(), batch.c)
        hook.remove()
        yield self.student, loss + 0 * self.head(self.kept.pop()).mean()


def test_methods_are_checked_with_autocast_and_on_another_network(small):
    """Features outside of a denoiser are in bf16, and the layers on them are not."""
    assert methods_steps.losses(bench_of(ComparesFeatures, network="edm"))
    check = next(check for check in CHECKS if check.name == "losses")
    result = check.on([bench_of(ComparesFeatures, precision="bf16")], {need: {} for need in check.needs})
    message = result.finding(check).message
    assert "must have the same dtype" in message and "convert them, .float()" in message


def test_a_derivative_does_not_go_with_recompute(small):
    check = next(check for check in CHECKS if check.name == "losses")
    found = [
        check.on([bench_of(cls, recompute=True)], {need: {} for need in check.needs}).finding(check)
        for cls in (Derivative, Good)
    ]
    assert not found[0].ok and "use distillbench.diffusion.derivative" in found[0].message and found[1].ok


def test_training_in_other_ways_gives_other_weights(small):
    """A bench trains as its settings say: rounded to bf16 weights differ, recomputed they do not."""
    weights = [
        method_bench.weights_of(bench_of(Good, **computed).run.method)
        for computed in ({}, {"precision": "bf16"}, {"recompute": True}, {"network": "attention"})
    ]
    assert method_bench.changed(weights[0], weights[1]) and weights[0].keys() == weights[1].keys()
    assert len(weights[2]) > len(weights[0])  # with blocks enough to be recomputed
    assert "student.counted.network.qkv.weight" in weights[3]


def test_an_unknown_network_is_refused():
    with pytest.raises(UserError, match="network must be one of mlp, unet, dit, edm, got 'resnet'"):
        check_class(Good, network="resnet")
    with pytest.raises(UserError, match="network, precision and recompute are for methods"):
        check_class(TinyImages, network="unet")


@pytest.fixture
def small(monkeypatch):
    """Two benches and few steps, which are enough to find every fault."""
    two = {label: method_bench.CONDITIONINGS[label] for label in ("unconditional", "guided")}
    monkeypatch.setattr(methods, "CONDITIONINGS", two)
    monkeypatch.setattr(method_bench, "STEPS", 4)


class SeveralOfEverything(TwoPhases):
    """Two networks with a loss each, and two phases: the contract allows it."""

    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        self.fake = teacher.student()

    def train_step(self, batch):
        eps, c = batch.noise(), batch.c
        yield self.fake, (self.g(eps, c, self.fake) - self.answer(eps, c)).square().mean()
        yield self.student, self.loss(eps, c)


def test_several_networks_and_phases_are_fine(small):
    found = found_in("methods", SeveralOfEverything, "steps", all_checks=True)
    assert not failed(found)
    assert {f.check: f.message for f in found}["steps"] == "networks with their losses are yielded (2 trained)"


def test_a_derivative_along_a_direction_is_counted(small):
    found = {finding.check: finding for finding in found_in("methods", Derivative, "flops", all_checks=True)}
    assert not failed(found.values())
    assert "students 1 with gradient and 0 without" in found["gradients"].message
    counted, made = re.findall(r"([0-9.]+) MFLOP counted, ([0-9.]+) made", found["flops"].message)[0]
    assert counted == made
    assert found["times"].doubt and "networks.smooth_times(teacher.student())" in found["times"].message


class SmoothDerivative(Derivative):
    """The same with low frequencies, by finite differences."""

    def __init__(self, config, teacher):
        super().__init__(config, teacher)
        smooth_times(self.student)

    def derivative(self, eps, c):
        x, t = x_at_t_max(self.teacher.schedule, eps), time_like(eps, 0.9)  # the differences stay below t_max
        return derivative(self.student, (x, t), (eps, torch.ones_like(t)), c)


def test_a_network_that_changes_slowly_in_time_is_no_doubt(small):
    found = {finding.check: finding for finding in check_method(SmoothDerivative, distribution_images=0)}
    assert not failed(found.values())
    assert not found["times"].doubt and "2 is allowed" in found["times"].message


@pytest.mark.parametrize(("cls", "check", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_is_found_by_its_own_check(small, cls, check, message):
    found = found_in("methods", cls, check)
    assert list(failed(found)) == [check]
    assert message in failed(found)[check]
    assert "\n" not in failed(found)[check]


@pytest.mark.nightly
@pytest.mark.parametrize(("cls", "check", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_is_found_by_no_other_check(small, cls, check, message):
    assert list(failed(found_in("methods", cls, check, all_checks=True))) == [check]


def test_there_is_a_fault_for_every_check():
    doubts = {"matches", "parts", "learns", "times"}
    assert {check for _, check, _ in FAULTS} == {check.name for check in CHECKS} - doubts
    assert len({check.name for check in CHECKS}) == len(CHECKS)


# --- the exact distribution ------------------------------------------------------------------------------------------


class OtherNoise(Good):
    """A sample of the right distribution, but for other noise."""

    def sample(self, noise, nfe, c):
        return self.g(-noise(0), c)


class OtherNoiseDeclared(OtherNoise):
    def keeps_noise(self, nfe):
        return False


class TooNarrow(OtherNoiseDeclared):
    def sample(self, noise, nfe, c):
        return self.g(0.5 * noise(0), c)


class NeverFinite(Good):
    def loss(self, eps, c):
        return super().loss(eps, c) * float("inf")


@pytest.mark.parametrize(
    ("cls", "ok", "message"),
    [
        pytest.param(OtherNoise, False, "worse than the teacher itself in 1 DDIM step", marks=pytest.mark.nightly),
        (OtherNoiseDeclared, True, "KS distance to the distribution"),
        (TooNarrow, False, "the std is not 0.75 to 1.25 of the distribution's"),
        (NeverFinite, False, "DivergedError"),
    ],
)
def test_the_distribution_and_the_map_are_distinguished(cls, ok, message):
    (found,) = matches_findings(cls, cls.Config(steps=8), images=20_000)
    assert found.ok is ok and message in found.message


def test_ks_is_the_greatest_distance():
    """For N draws of the distribution it is of the order 1/sqrt(N); after a shift by 3 it is 1."""
    from distillbench.testing.methods import _kolmogorov_smirnov

    x_0, _ = exact_distribution().draw(10_000, torch.Generator().manual_seed(0))
    assert 0 < _kolmogorov_smirnov(x_0) < 1.63 / 100
    assert _kolmogorov_smirnov(x_0 + 3) == pytest.approx(1, abs=0.01)
    assert _kolmogorov_smirnov(torch.full((4, 1), -10.0)) == pytest.approx(1, abs=1e-9)


# --- findings --------------------------------------------------------------------------------------------------------


def test_checks_that_need_a_failed_check_do_not_run(small):
    found = {finding.check: finding for finding in found_in("methods", NanLoss, "losses", all_checks=True)}
    assert found["steps"].ok is True
    assert found["trains"].ok is None and found["trains"].message == "not run: losses must pass first"
    assert found["save_load"].message == "not run: losses must pass first"


def test_a_loss_that_compares_images_is_reported(small):
    class Compares(Good):
        def train_step(self, batch):
            eps = batch.noise()
            spread = (self.g(eps, batch.c).var(dim=0) - 1).square().mean()
            yield self.student, self.loss(eps, batch.c) + spread

    found = {finding.check: finding for finding in found_in("methods", Compares, "parts")}
    assert found["parts"].ok and found["parts"].doubt and "not a mean over the images" in found["parts"].message
    assert not failed(found.values())


def test_a_refusal_is_no_fault_but_is_reported(small):
    class Unguided(Good):
        def __init__(self, config, teacher):
            super().__init__(config, teacher)
            if teacher.conditioning.guided:
                raise UserError("no guidance")

    found = check_method(Unguided, distribution_images=0)
    assert not failed(found)
    assert found[1] == Finding("builds", True, "a student is built; guided: refused (no guidance)")
    assert found[6] == Finding("condition", None, "not run: the class refuses what it needs")


def test_a_fault_names_the_benches_that_it_is_on(small):
    class Forgetful(Good):
        def sample(self, noise, nfe, c):
            x_0 = super().sample(noise, nfe, c)
            return x_0 if c.labels is None else x_0 - x_0.mean(dim=0)

    (message,) = failed(check_method(Forgetful, distribution_images=0)).values()
    assert message.startswith("guided: at NFE 1 images change")


def test_settings_are_used_and_not_changed(small):
    class Careless(Good):
        def __init__(self, config, teacher):
            super().__init__(config, teacher)
            config.pull = config.pull * 2

    config = Careless.Config(pull=float("inf"))
    found = check_method(Careless, config, distribution_images=0)
    assert "nan" in failed(found)["losses"]
    assert found[3].ok and config == Careless.Config(pull=float("inf"))


def test_the_schedule_of_the_settings_is_used(small):
    seen = []

    class Curious(Good):
        def g(self, eps, c=UNCONDITIONAL, network=None):
            seen.append(type(self.teacher.schedule).__name__)
            return super().g(eps, c, network)

    assert not failed(check_method(Curious, Curious.Config(schedule="ve"), distribution_images=0))
    assert set(seen) == {"VE"}


def test_a_class_of_no_kind_is_refused():
    with pytest.raises(UserError, match="must be a subclass of one of Method, TeacherSource, Dataset, Metric, got"):
        check_class(Noise)


def test_a_class_that_is_no_method_is_reported():
    found = check_method(Noise, distribution_images=0)
    assert "takes subclasses of Method" in failed(found)["declared"]
    assert {finding.ok for finding in found[1:]} == {None}


def test_an_assertion_lists_all_failures(small):
    class Twofold(IgnoresNoise):
        def sample(self, noise, nfe, c):
            return super().sample(lambda k: self.g(noise(k), c), nfe, c)

    with pytest.raises(AssertionError) as error:
        assert_conforms(Twofold, distribution_images=0)
    lines = str(error.value).splitlines()
    assert lines[0] == "Twofold breaks the contract of a method" and [line.split(":")[0] for line in lines[1:]] == [
        "nfe",
        "noise",
    ]


def test_nothing_global_changes(small):
    torch.set_default_dtype(torch.float64)
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    try:
        with torch.no_grad():
            assert not failed(found_in("methods", Good, "trains"))
            assert not torch.is_grad_enabled()
        assert "losses" in failed(found_in("methods", NanLoss, "losses"))
        assert torch.get_default_dtype() == torch.float64
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1:] == (str(np.random.get_state()), random.getstate())
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_same_findings_again(small):
    assert found_in("methods", Good, "trains") == found_in("methods", Good, "trains")
    assert matches_findings(Good, images=2000) == matches_findings(Good, images=2000)


# --- on the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def call(tmp_path, monkeypatch, capfd, small):
    """``call(*words)``: exit code, output and errors of distillbench with the methods Good and Bad of this file."""
    plugin = types.ModuleType("third_party")
    plugin.__file__ = __file__
    plugin.register_methods = hookimpl(api=2)(lambda register: [register(Good), register(Bad)])
    sources = [*installed(), Source("third_party", "third_party", "1", lambda: plugin)]
    monkeypatch.setattr(registry, "installed", lambda: sources)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words):
        code = exit_code(*words)
        assert not list(tmp_path.iterdir())
        return code, *capfd.readouterr()

    return run


class Bad(IgnoresNoise):
    name = "bad"


def test_the_command_prints_a_line_for_each_check(call):
    code, out, err = call("check", "good", "methods.good.pull=0.02", "--quick")
    assert code == 0 and not err
    assert [line.split()[1] for line in out.splitlines() if line.startswith(("ok ", "- "))] == [c.name for c in CHECKS]
    assert out.splitlines()[-1] == f"method good: {len(CHECKS) - 1} ok, 0 failed, 1 not applicable"
    assert max(map(len, out.splitlines())) <= 100


def test_the_command_fails_where_a_check_does(call):
    code, out, _ = call("check", "bad", "--quick")
    assert code == 1
    assert "\nFAIL  noise                 at NFE 1 other noise gives the same images" in out
    assert out.splitlines()[-1].startswith("method bad: 28 ok, 1 failed")


def test_the_command_passes_the_network_and_its_computation(call, monkeypatch):
    given = []
    monkeypatch.setattr("distillbench.cli.check.findings_of", lambda *values: given.append(values[-1]) or [])
    assert call("check", "good", "--network", "unet", "--precision", "bf16", "--recompute")[0] == 0
    assert call("check", "good")[0] == 0
    assert given == [Computed("unet", "bf16", True), Computed()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["goood"], "no method, teacher, dataset or metric 'goood'. Did you mean 'good'? Possible: afhqv2, bad, boot"),
        (["good", "methods.good.pul=1"], "Did you mean 'pull'?"),
        (["good", "methods.good.lr=fast"], "methods.good.lr must be a number, got 'fast'"),
        (["good", "seed=3"], "check good takes settings that begin with methods.good., got 'seed=3'"),
        (["good", "methods.good.lr=1,2"], "one value of each setting, these settings have 2 combinations"),
        (["good", "--quick", "--thorough"], "exclude each other"),
        (["digits", "--network", "unet"], "--network, --precision and --recompute are for methods, not for datasets"),
    ],
)
def test_invalid_arguments_give_one_message(call, words, message):
    code, out, err = call("check", *words)
    assert code == 2 and not out
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
