"""Settings of single networks: they reach the optimiser, and are typed, checked, listed and part of the key."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from analytic import make_workspace, mlp_teacher
from distillbench.errors import UserError
from distillbench.options import option, plain_settings
from distillbench.registry import load_registry
from distillbench.runs.config import compose_runs, describe_options
from distillbench.runs.plan import changed_settings
from distillbench.storage.files import key_of
from distillbench.system.progress import Step
from distillbench.training.budget import BudgetConfig
from distillbench.training.loop import Loop, train
from distillbench.training.method import Method, MethodConfig
from distillbench.training.optimizer_config import NetworkConfig, OptimizerConfig
from distillbench.training.optimizers import learning_rate_factor

RUN = ["methods=[sid]", "dataset=digits"]


class Two(Method):
    """A student and another network, each with a loss whose gradient is far above 1."""

    name, paper, needs_data = "two", "none", False

    @dataclass
    class Config(MethodConfig):
        lr: float = option(0.01, "as of the student")
        other: NetworkConfig = option(NetworkConfig(lr=0.1, beta1=0.5, weight_decay=0.2, grad_clip=0), "of the other")

    def __init__(self, config, teacher) -> None:
        super().__init__(config, teacher)
        self.student, self.other = Numbers(), Numbers()

    def train_step(self, batch):
        x = batch.noise().flatten(1)
        for network in (self.other, self.student):
            yield network, (100 * (x @ network.w - 1)).square().mean()

    def sample(self, noise, nfe, c):
        return noise(0)


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.2]))


@pytest.mark.usefixtures("float64")
def test_each_network_has_its_own_optimizer_settings(tmp_path):
    """Held against torch's AdamW and torch's clipping, step by step."""
    steps, size = 6, 8
    method = Two(Two.Config(ema_halflife_kimg=0.0), mlp_teacher())
    workspace = make_workspace(method.teacher, tmp_path, BudgetConfig(images=steps * size))
    train(method, method.config, workspace, None, Loop(size), Step(lambda fraction, note: None))

    student, other = Numbers().double(), Numbers().double()
    adam = torch.optim.AdamW(student.parameters(), 0.01, (0.9, 0.999), weight_decay=0.0)
    own = torch.optim.AdamW(other.parameters(), 0.1, (0.5, 0.999), weight_decay=0.2)
    generator = torch.Generator().manual_seed(workspace.seed)
    for step in range(steps):
        x = torch.randn(size, *method.teacher.shape, generator=generator, dtype=torch.float64).flatten(1)
        factor = learning_rate_factor(OptimizerConfig(), step / steps)
        for network, optimizer, lr, largest in ((other, own, 0.1, None), (student, adam, 0.01, 1.0)):
            optimizer.zero_grad()
            (100 * (x @ network.w - 1)).square().mean().backward()
            if largest is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), largest)
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.step()
    assert torch.allclose(method.student.w, student.w, rtol=1e-9) and torch.allclose(method.other.w, other.w, rtol=1e-9)


def test_settings_without_their_network_are_refused():
    class Without(Two):
        def __init__(self, config, teacher) -> None:
            super().__init__(config, teacher)
            del self.other

    method = Without(Two.Config(), mlp_teacher())
    with pytest.raises(RuntimeError, match="the Config names other, but the method has no such network"):
        method.settings_of(method.student)


def test_they_are_typed_and_part_of_the_key():
    registry = load_registry()
    read = lambda *words: compose_runs([*RUN, *words], registry)
    (usual,), (changed,) = read(), read("methods.sid.fake.lr=1e-4", "methods.sid.fake.grad_clip=null")
    assert usual.methods["sid"].fake == NetworkConfig(grad_clip=0)
    assert changed.methods["sid"].fake == NetworkConfig(lr=1e-4)
    assert changed.methods["sid"].fake.over(changed.methods["sid"]) == OptimizerConfig(lr=1e-4, beta1=0.0)
    assert changed_settings(usual.methods["sid"]) == ""
    assert changed_settings(changed.methods["sid"]) == "fake.lr=0.0001, fake.grad_clip=None"
    keys = {key_of(plain_settings(run.methods["sid"])) for run in (usual, changed)}
    assert len(keys) == 2
    rates = [run.methods["sid"].fake.lr for run in read("methods.sid.fake.lr=1e-4,1e-3", "seed=0,1")]
    assert sorted(rates) == [1e-4, 1e-4, 1e-3, 1e-3]
    told = {name: default for name, default, _ in describe_options(registry.methods["sid"].cls.Config)}
    assert told["fake.lr"] == "null" and told["fake.grad_clip"] == "0.0"


def test_settings_that_were_added_are_part_of_the_key_only_if_they_are_set():
    """The names are those of results from before there were others."""
    own = {"lr", "lr_warmup", "lr_decay", "beta1", "beta2", "weight_decay", "grad_clip", "ema_halflife_kimg"}
    assert plain_settings(OptimizerConfig()).keys() == own
    assert plain_settings(NetworkConfig()).keys() == {"lr", "beta1", "beta2", "weight_decay", "grad_clip"}
    plain = plain_settings(OptimizerConfig(optimizer="radam", ema_start="constant"))
    assert plain.keys() - own == {"optimizer", "ema_start"}
    assert plain_settings(NetworkConfig(grad_nan_to_num=False))["grad_nan_to_num"] is False


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fake.lr=-1", r"methods\.sid\.fake\.lr must be positive, got -1"),
        ("fake.beta1=1", r"methods\.sid\.fake\.beta1 must be at least 0 and below 1, got 1"),
        ("fake.grad_clip=-0.5", r"methods\.sid\.fake\.grad_clip must be at least 0, got -0\.5"),
        ("fake.lr=fast", r"methods\.sid\.fake\.lr must be a number or null, got 'fast'"),
        ("fake.lrs=1", r"no setting 'lrs' in 'methods\.sid\.fake'"),
        ("fake=1", r"methods\.sid\.fake must be a group of settings"),
        (
            "optimizer=adm",
            r"methods\.sid\.optimizer must be one of adamw, adam, radam, adamw8bit, got 'adm'\. Did you mean 'adam'",
        ),
        (
            "fake.optimizer=sgd",
            r"methods\.sid\.fake\.optimizer must be one of adamw, adam, radam, adamw8bit, got 'sgd'",
        ),
        ("fake.grad_clip_by=size", r"methods\.sid\.fake\.grad_clip_by must be one of norm, value, got 'size'"),
        ("grad_clip=-1", r"methods\.sid\.grad_clip must be at least 0, got -1"),
    ],
)
def test_invalid_values_are_refused_with_their_full_name(word, message):
    with pytest.raises(UserError, match=message):
        compose_runs([*RUN, f"methods.sid.{word}"], load_registry())
