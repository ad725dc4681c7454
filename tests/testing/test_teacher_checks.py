"""The conformance suite for teachers: built-in families pass, and each fault is found by its check and by no other."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch import nn

from distillbench import Denoiser, Teacher, TeacherConfig, TeacherSource, UserError, option
from distillbench.diffusion.conditioning import UNCONDITIONAL, Conditioning
from distillbench.diffusion.denoiser import TARGETS, implied_eps
from distillbench.diffusion.exact_denoiser import ClosedFormNetwork, ExactDenoiser
from distillbench.diffusion.schedules import VE, VPCosine
from distillbench.networks.architectures import ResidualMLP
from distillbench.registry import load_registry
from distillbench.teachers.teacher import TeacherPlan
from distillbench.testing.conformance import SUITES, assert_conforms, check_class
from distillbench.testing.teacher_bench import TinyImages
from faults import failed, found_in, gatherer

REGISTRY = load_registry()
CHECKS = [check.name for check in SUITES["teachers"].checks]


def dataset(name: str):
    cls = REGISTRY.datasets[name].cls
    return cls(cls.Config())


@pytest.mark.parametrize(
    ("name", "on"), [("trained", "digits"), ("gaussian", "digits"), ("gaussian", ""), ("gmm", "gmm"), ("gmm", "")]
)
def test_built_in_families_conform(name, on):
    found = check_class(REGISTRY.teachers[name].cls, dataset=dataset(on) if on else None)
    assert not failed(found) and [finding.check for finding in found] == CHECKS


def test_missing_files_are_reported():
    found = check_class(REGISTRY.teachers["edm"].cls)
    assert failed(found)["builds"].startswith("refused (") and "teacher.path" in failed(found)["builds"]
    assert {finding.ok for finding in found[2:]} == {None}


class Good(TeacherSource):
    """The exact denoiser of the dataset's distribution; students get a network with weights."""

    name = "good"

    @dataclasses.dataclass
    class Config(TeacherConfig):
        width: int = option(16, "channels of the students")

    def plan(self):
        if self.dataset.distribution is None:
            raise UserError("no law")
        return TeacherPlan("in closed form")

    def network(self) -> nn.Module:
        """The teacher's network, from x_t to E[x_0 | x_t]."""
        return ClosedFormNetwork(self.dataset.distribution, self.schedule())

    def schedule(self):
        return VPCosine()

    def denoiser(self) -> Denoiser:
        denoiser = ExactDenoiser(self.dataset.distribution, self.schedule())
        denoiser.counted.network = self.network()
        return denoiser

    def blank(self) -> nn.Module:
        return ResidualMLP(self.dataset.shape, width=self.config.width, depth=1, classes=self.conditioning.classes)

    def teacher(self, sha256) -> Teacher:
        torch.manual_seed(0)
        start = Denoiser(self.blank(), self.schedule(), "v")
        asked = Conditioning(self.conditioning.classes)
        shape = self.dataset.shape
        return Teacher(self.name, self.denoiser(), shape, sha256, {}, asked, start=start, blank=self.blank)

    def untrained(self):
        return self.teacher("untrained")

    def load(self, progress):
        return self.teacher(64 * "a")


class Corrected(ResidualMLP):
    """The exact denoiser plus a small correction by a network."""

    def __init__(self, distribution, schedule, classes) -> None:
        super().__init__(distribution.shape, width=16, depth=1, classes=classes)
        self.exact = ClosedFormNetwork(distribution, schedule)

    def forward(self, x, time, embedding=None, c=UNCONDITIONAL):
        return self.exact(x, time, None, c) + 0.05 * super().forward(x, time, embedding, c)


class Network(Good):
    """A teacher with a network, from which students start."""

    def teacher(self, sha256) -> Teacher:
        torch.manual_seed(0)
        asked = Conditioning(self.conditioning.classes)
        return Teacher(self.name, self.denoiser(), self.dataset.shape, sha256, {}, asked, blank=self.blank)

    def blank(self) -> nn.Module:
        return Corrected(self.dataset.distribution, self.schedule(), self.conditioning.classes)

    def denoiser(self) -> Denoiser:
        denoiser = Denoiser(self.blank(), self.schedule(), "x0")
        with torch.no_grad():
            for weight in denoiser.parameters():
                weight.add_(torch.randn(weight.shape), alpha=0.01)
        return denoiser


@pytest.mark.parametrize("cls", [Good, Network])
def test_a_correct_teacher_passes(cls):
    found = check_class(cls)
    assert {finding.check: finding.ok for finding in found} == dict.fromkeys(CHECKS, True) | {"decodes": None}


def test_the_reported_errors_are_exact():
    """The exact denoiser has the exact error, which the message gives beside it."""
    message = {finding.check: finding.message for finding in check_class(Good)}["better_than_the_mean"]
    figures = [part.split() for part in message.split(": ")[1].split(", ")]
    assert len(figures) == 3 and all(words[0] == words[-1].rstrip(")") for words in figures)


def test_settings_and_dataset_are_used():
    class Curious(Good):
        seen = set()

        def __init__(self, config, dataset, cache, device, conditioning):
            super().__init__(config, dataset, cache, device, conditioning)
            self.seen.add((config.width, dataset.name, conditioning.classes))

    assert not failed(check_class(Curious, Curious.Config(width=8), dataset=dataset("gmm")))
    assert Curious.seen == {(8, "gmm", 0), (8, "gmm", 3)}


FAULTS, fault = gatherer()  # (teacher with one fault, the check that finds it, part of the message)


@fault("declared", "reads must be classes or texts, got 'poems'")
class ReadsPoems(Good):
    reads = "poems"


@fault("declared", "settings without a help text: width")
class SilentSetting(Good):
    @dataclasses.dataclass
    class Config(TeacherConfig):
        width: int = 16


@fault("builds", "refused (no file 'x')")
class Missing(Good):
    def plan(self):
        raise UserError("no file 'x'")


@fault("builds", "plan() must return a TeacherPlan")
class NoPlan(Good):
    def plan(self):
        return "in closed form"


@fault("builds", "plan() writes into the cache")
class PlanWrites(Good):
    def plan(self):
        (self.cache / f"plan-{self.conditioning.classes}").write_text("")
        return super().plan()


@fault("untrained", "untrained() must return a Teacher, got ExactDenoiser")
class NoTeacher(Good):
    def untrained(self):
        return self.denoiser()


class Summed(ClosedFormNetwork):
    def forward(self, x, time, embedding, c):
        return super().forward(x, time, embedding, c).sum(dim=1).flatten(1)


@fault("untrained", "must map (B,C,H,W) = (4, 1, 8, 8) to itself, got (4, 64)")
class WrongShape(Good):
    def network(self):
        return Summed(self.dataset.distribution, self.schedule())

    def denoiser(self):
        return DenoiserOfNetwork(self.network(), self.schedule(), "x0")


class DenoiserOfNetwork(ExactDenoiser):
    """Whatever the network gives is the answer."""

    def __init__(self, network, schedule, prediction) -> None:
        Denoiser.__init__(self, network, schedule, prediction)


@fault("loads", "loaded twice, its sha256 differs")
class DigestOfNow(Good):
    def load(self, progress):
        return self.teacher(os.urandom(32).hex())


@fault("loads", "must be a hash of the weights and how they are read, got 'mine'")
class NoDigest(Good):
    def load(self, progress):
        return self.teacher("mine")


@fault("loads", "untrained() has the sha256 of the loaded teacher")
class UntrainedIsLoaded(Good):
    def untrained(self):
        return self.load(None)


@fault("loads", "loaded twice from the same settings, it gives other outputs")
class FromGlobalNoise(Network):
    def teacher(self, sha256):
        teacher = super().teacher(sha256)
        torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
        with torch.no_grad():
            for weight in teacher.denoiser.parameters():
                weight.add_(torch.randn(weight.shape), alpha=0.01)
        return teacher


@fault("loads", "3 classes were requested, it has none")
class IgnoresClasses(Good):
    def load(self, progress):
        teacher = self.teacher(64 * "a")
        teacher.conditioning = Conditioning()
        teacher.conditioned = lambda conditioning: teacher
        return teacher


class IgnoresEval(Corrected):
    def train(self, mode=True):
        return super().train(True)


@fault("frozen", "stays in training mode")
class StaysInTrainingMode(Network):
    def blank(self):
        return IgnoresEval(self.dataset.distribution, self.schedule(), self.conditioning.classes)


class Gradless(ClosedFormNetwork):
    @torch.no_grad()
    def forward(self, x, time, embedding, c):
        return super().forward(x, time, embedding, c)


@fault("frozen", "no gradient flows from its output to x_t")
class WithoutGradient(Good):
    def network(self):
        return Gradless(self.dataset.distribution, self.schedule())


class Infinite(ClosedFormNetwork):
    def forward(self, x, time, embedding, c):
        return super().forward(x, time, embedding, c) + 0 / (time.view(-1, 1, 1, 1) - 1).to(x)


@fault("denoises", "at t = 1 outputs are not finite")
class NotFiniteAtTheEnd(Good):
    def network(self):
        return Infinite(self.dataset.distribution, self.schedule())


class Dropout(ClosedFormNetwork):
    def forward(self, x, time, embedding, c):
        f = super().forward(x, time, embedding, c)
        return f + 1e-3 * torch.randn(f.shape) if time[0] == 1 else f


@fault("denoises", "at t = 1 the same x_t gives two outputs")
class KeepsDropout(Good):
    def network(self):
        return Dropout(self.dataset.distribution, self.schedule())


class InPlace(ClosedFormNetwork):
    def forward(self, x, time, embedding, c):
        f = super().forward(x, time, embedding, c)
        x.mul_(1.001) if not x.requires_grad else None
        return f


@fault("denoises", "changes x_t in place")
class ChangesItsInput(Good):
    def network(self):
        return InPlace(self.dataset.distribution, self.schedule())


class Centred(ClosedFormNetwork):
    def forward(self, x, time, embedding, c):
        f = super().forward(x, time, embedding, c)
        return f + 0.05 * x.mean(dim=(0, 1, 2, 3)).tanh() * (time.view(-1, 1, 1, 1) * (1 - time.view(-1, 1, 1, 1))).to(
            x
        )


@fault("batch_independent", "with the other images of the batch")
class CentresTheBatch(Good):
    def network(self):
        return Centred(self.dataset.distribution, self.schedule())


class Uncounted(ExactDenoiser):
    def output(self, x_t, t, c=UNCONDITIONAL, embedding=None):
        return self.network(x_t, t.flatten(), embedding, c)


@fault("counted", "on 4 and counts 0")
class AroundTheCounter(Good):
    def denoiser(self):
        return Uncounted(self.dataset.distribution, self.schedule())


class Biased(ClosedFormNetwork):
    """Off by a constant, with little noise only."""

    def forward(self, x, time, embedding, c):
        return super().forward(x, time, embedding, c) + 0.2 * (time.view(-1, 1, 1, 1) < 0.01)


@fault("low_noise", "there E[x_0 | x_t] is x_t / alpha")
class WrongAtLowNoise(Good):
    def network(self):
        return Biased(self.dataset.distribution, self.schedule())


class PassesNoise(ClosedFormNetwork):
    """Passes the noise through, with much noise only."""

    def forward(self, x, time, embedding, c):
        return super().forward(x, time, embedding, c) + x * (time.view(-1, 1, 1, 1) > 0.999)


@fault("high_noise", "3.3 standard deviations of the data from the mean image, 1 is allowed")
class WrongAtHighNoise(Good):
    def network(self):
        return PassesNoise(self.dataset.distribution, self.schedule())


class Noisy(ClosedFormNetwork):
    """Adds the noise, many times, in the middle."""

    def forward(self, x, time, embedding, c):
        t = time.view(-1, 1, 1, 1)
        return super().forward(x, time, embedding, c) + 20 * x * (t * (1 - t)).to(x)


@fault("better_than_the_mean", "times that of the mean image: do prediction, schedule and the range")
class WrongInTheMiddle(Good):
    def network(self):
        return Noisy(self.dataset.distribution, self.schedule())


class Halved(ClosedFormNetwork):
    """Stays halfway to the mean, in the middle."""

    def forward(self, x, time, embedding, c):
        t = time.view(-1, 1, 1, 1)
        return super().forward(x, time, embedding, c) * torch.where((t > 0.03) & (t < 0.9), 0.5, 1.0).to(x)


@fault("better_than_the_mean", "times as far from their mean as its outputs are, for E[x_0 | x_t] as far: do")
class StaysHalfway(Good):
    def network(self):
        return Halved(self.dataset.distribution, self.schedule())


class IgnoresLabels(ClosedFormNetwork):
    def forward(self, x, time, embedding, c):
        return super().forward(x, time, embedding, UNCONDITIONAL)


@fault("classes", "other classes give the same output")
class IgnoresTheClass(Good):
    def network(self):
        return IgnoresLabels(self.dataset.distribution, self.schedule())


class OneRowShort(ClosedFormNetwork):
    def forward(self, x, time, embedding, c):
        if c.labels is not None and (c.labels >= 3).any():
            raise IndexError("index out of range")
        return super().forward(x, time, embedding, c)


@fault("classes", "label 3, which stands for no class and which guidance needs, fails: IndexError")
class CannotBeGuided(Good):
    def network(self):
        return OneRowShort(self.dataset.distribution, self.schedule())


@fault("student", "student() has no weights to train: give the Teacher a `start`")
class WithoutStart(Good):
    def teacher(self, sha256):
        return dataclasses.replace(super().teacher(sha256), start=None)


class Shares(Denoiser):
    """Its copies have the same network."""

    def copy(self, counter):
        twin = Denoiser(self.network, self.schedule, self.prediction, counter)
        return twin


@fault("student", "training a student changes the teacher")
class SharesWeights(Network):
    def denoiser(self):
        plain = super().denoiser()
        return Shares(plain.network, plain.schedule, plain.prediction)


class Wide(ResidualMLP):
    def forward(self, x, time, embedding=None, c=UNCONDITIONAL):
        return super().forward(x, time, embedding, c).repeat(1, 2, 1, 1)


@fault("student", "a student from `blank` must map")
class BlankOfAnotherShape(Network):
    def teacher(self, sha256):
        blank = lambda: Wide(self.dataset.shape, width=8, depth=1, classes=self.conditioning.classes)
        return dataclasses.replace(super().teacher(sha256), blank=blank)


class NoEmbedding(ResidualMLP):
    def forward(self, x, time, embedding=None, c=UNCONDITIONAL):
        return super().forward(x, time, None, c)


@fault("embedding", "ignores the given embedding")
class IgnoresEmbeddings(Good):
    def blank(self):
        return NoEmbedding(self.dataset.shape, width=8, depth=1, classes=self.conditioning.classes)


@fault("embedding", "(embedding_channels, a positive integer), got 0")
class HasNoEmbedding(Good):
    def blank(self):
        network = super().blank()
        network.embedding_channels = 0
        return network


class ReadsItsOwn(ExactDenoiser):
    """Takes times as those of its native schedule, whatever they are of."""

    def _at_equal_snr(self, x_t, t):
        return x_t, t


@fault("other_schedule", "on VE at equal signal-to-noise ratio outputs differ")
class OneScheduleOnly(Good):
    def denoiser(self):
        return ReadsItsOwn(self.dataset.distribution, self.schedule())


@fault("decodes", "encoded and decoded, real images are off by")
class DecodesOtherwise(Good):
    def teacher(self, sha256):
        decode = lambda z: z * 127.5
        return dataclasses.replace(super().teacher(sha256), decode=decode, to_latents=lambda x_0: x_0)


@pytest.mark.parametrize(("cls", "check", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_is_found_by_its_own_check(cls, check, message):
    found = failed(found_in("teachers", cls, check))
    assert list(found) == [check]
    assert message in found[check] and "\n" not in found[check]


def test_there_is_a_fault_for_every_check():
    assert {check for _, check, _ in FAULTS} == set(CHECKS)


def misread(prediction: str, taken_for: str) -> type[TeacherSource]:
    """A network with one prediction type that is declared as another."""

    class Exactly(ClosedFormNetwork):
        def forward(self, x, time, embedding, c):
            t = time.view(-1, 1, 1, 1)
            alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
            f = super().forward(x, time, embedding, c)
            return TARGETS[prediction](f, implied_eps(x, f, alpha, sigma), alpha, sigma)

    class Misread(Good):
        def denoiser(self):
            return DenoiserOfNetwork(Exactly(self.dataset.distribution, self.schedule()), self.schedule(), taken_for)

    return Misread


@pytest.mark.parametrize("prediction", ["x0", "v", "flow", "eps"])
@pytest.mark.parametrize("taken_for", ["x0", "v", "flow", "eps"])
def test_a_wrong_parameterisation_is_found(prediction, taken_for):
    found = failed(check_class(misread(prediction, taken_for)))
    if prediction == taken_for:
        assert not found
    else:
        assert set(found) & {"low_noise", "high_noise", "better_than_the_mean"}


def test_images_in_the_wrong_range_are_found():
    """A network for images in [0, 1], on images in [-1, 1]."""

    class HalfRange(ClosedFormNetwork):
        def forward(self, x, time, embedding, c):
            t = time.view(-1, 1, 1, 1)
            alpha = self.schedule.alpha(t)
            return (super().forward(2 * x - alpha, time, embedding, c) + 1) / 2

    class WrongRange(Good):
        def network(self):
            return HalfRange(self.dataset.distribution, self.schedule())

    assert set(failed(check_class(WrongRange))) & {"low_noise", "high_noise", "better_than_the_mean"}


def test_a_teacher_without_classes_may_refuse_them():
    class Unconditional(Good):
        def plan(self):
            if self.conditioning.classes:
                raise UserError("knows no classes")
            return super().plan()

    found = {finding.check: finding for finding in check_class(Unconditional)}
    assert not failed(found.values()) and found["classes"].ok is None
    assert found["builds"].message == "in closed form; classes: refused (knows no classes)"


def test_other_schedules_are_fine():
    class Exploding(Good):
        def schedule(self):
            return VE()

    assert not failed(check_class(Exploding))


def test_an_assertion_names_the_kind_and_the_check():
    with pytest.raises(AssertionError, match="ReadsPoems breaks the contract of a teacher\ndeclared: reads must be"):
        assert_conforms(ReadsPoems)


def test_the_default_dataset_conforms():
    assert not failed(check_class(TinyImages))
