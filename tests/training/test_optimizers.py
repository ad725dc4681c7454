"""Optimisers, clipping and averages, held against their published formulas."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distillbench.errors import UserError
from distillbench.networks.averaging import power_exponent
from distillbench.training.optimizer_config import NetworkConfig, OptimizerConfig, check_optimizers
from distillbench.training.optimizers import Average, Gradients, Optimizers, learning_rate_factor
from distillbench.training.resume import State
from distillbench.training.share import Share
from distillbench.training.update_counts import UpdateCounts
from tiny_training import Weight, optimizer

pytestmark = pytest.mark.usefixtures("float64")

BETA1, BETA2, EPS, DECAY, LR = 0.8, 0.9, 1e-3, 0.2, 0.1  # with this beta2, RAdam rectifies from its 6th update on
STEPS = 14


def gradients_of(step: int) -> list[float]:
    return [math.sin(1.7 * step + k) * 3.0**k for k in range(3)]


def published(kind: str, start: list[float]) -> np.ndarray:
    """The weights after STEPS updates, by the algorithm boxes of Kingma & Ba 2015 (Adam), Loshchilov & Hutter 2019
    (AdamW: decoupled weight decay) and Liu et al. 2020, arXiv:1908.03265 (RAdam, with AdamW's decay)."""
    w, m, v = np.array(start), np.zeros(3), np.zeros(3)
    rho_inf = 2 / (1 - BETA2) - 1
    for t in range(1, STEPS + 1):
        g, lr = np.array(gradients_of(t)), LR / t
        if kind == "adam":
            g = g + DECAY * w
        else:
            w = w - lr * DECAY * w
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g**2
        m_hat, v_hat = m / (1 - BETA1**t), v / (1 - BETA2**t)
        root = np.sqrt(v_hat) + (EPS / math.sqrt(1 - BETA2**t) if kind == "radam" else EPS)  # as torch adds it
        rho = rho_inf - 2 * t * BETA2**t / (1 - BETA2**t)
        if kind == "radam" and rho <= 5:
            w = w - lr * m_hat
            continue
        r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) if kind == "radam" else 1
        w = w - lr * r * m_hat / root
    return w


def settings(kind: str) -> OptimizerConfig:
    own = {"optimizer": kind, "lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": DECAY}
    return OptimizerConfig(**own, grad_clip=0.0)


def method() -> nn.ModuleDict:
    network = nn.ParameterList([torch.tensor([1.0, -2.0]), torch.tensor(0.5)])  # one of them is a scalar
    return nn.ModuleDict({"student": network})


def update(optimizers: Optimizers, owner: nn.ModuleDict, steps: range) -> None:
    vector, scalar = owner["student"]
    for step in steps:
        a, b, c = gradients_of(step)
        optimizers.update(owner["student"], (vector * torch.tensor([a, b])).sum() + scalar * c, 1 / step)


def weights(owner: nn.ModuleDict) -> list[float]:
    return [number for weight in owner["student"] for number in weight.flatten().tolist()]


@pytest.mark.parametrize("kind", ["adamw", "adam", "radam"])
def test_each_optimizer_is_the_published_one_and_resumes(kind):
    whole, cut, resumed = method(), method(), method()
    update(Optimizers(settings(kind)), whole, range(1, STEPS + 1))
    assert weights(whole) == pytest.approx(published(kind, [1.0, -2.0, 0.5]), rel=1e-9)
    first, second = Optimizers(settings(kind)), Optimizers(settings(kind))
    update(first, cut, range(1, 5))
    kept = first.state(cut)
    plain = {name: tensor.detach().cpu().clone() for name, tensor in kept.tensors.items()}
    resumed.load_state_dict(cut.state_dict())
    second.restore(State(plain, kept.values), resumed)
    before, after = (list(o.by_network[m["student"]].state.values()) for o, m in ((first, cut), (second, resumed)))
    kinds = lambda states: [{name: (x.dtype, x.device) for name, x in one.items()} for one in states]
    assert kinds(before) == kinds(after)
    update(second, resumed, range(5, STEPS + 1))
    assert weights(resumed) == weights(whole)


def test_a_network_may_have_another_optimizer():
    own = NetworkConfig(optimizer="radam", eps=1e-6, grad_clip_by="value", grad_nan_to_num=True).over(OptimizerConfig())
    assert (own.optimizer, own.eps, own.grad_clip_by, own.grad_nan_to_num) == ("radam", 1e-6, "value", True)
    assert NetworkConfig().over(own) == own
    owner = method()
    optimizers = Optimizers(OptimizerConfig(), settings_of=lambda network: NetworkConfig(optimizer="radam"))
    update(optimizers, owner, range(1, 2))
    assert type(optimizers.by_network[owner["student"]]) is torch.optim.RAdam


# --- moments of 8 bits -----------------------------------------------------------------------------------------------


def large() -> nn.ModuleDict:
    """A weight whose moments have 8 bits, in an odd number of blocks, and one too small for that."""
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(17, 300, generator=random), torch.randn(5, generator=random)]
    return nn.ModuleDict({"student": nn.ParameterList([weight.float() for weight in weights])})


def descend(optimizers: Optimizers, owner: nn.ModuleDict, steps: range) -> None:
    for step in steps:
        random = torch.Generator().manual_seed(step)
        terms = [(w * torch.randn(w.shape, generator=random).float()).sum() for w in owner["student"]]
        optimizers.update(owner["student"], sum(terms), 1 / step)


def test_adamw8bit_is_that_of_bitsandbytes_and_resumes():
    """Held against the library's own optimiser, and against AdamW of 32 bits, from which it differs a little."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    whole, cut, resumed, theirs, plain = (large() for _ in range(5))
    descend(Optimizers(settings("adamw8bit")), whole, range(1, STEPS + 1))
    own = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}
    reference = bitsandbytes.optim.AdamW8bit(theirs["student"].parameters(), **own)
    for step in range(1, STEPS + 1):
        random = torch.Generator().manual_seed(step)
        for weight in theirs["student"]:
            weight.grad = torch.randn(weight.shape, generator=random).float()
        reference.param_groups[0]["lr"] = LR / step
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(whole["student"], theirs["student"], strict=True))
    descend(Optimizers(settings("adamw")), plain, range(1, STEPS + 1))
    (moved, small), (apart, equal) = (
        [(a - b).abs().mean() for a, b in zip(one["student"], other["student"], strict=True)]
        for one, other in ((large(), whole), (plain, whole))
    )
    assert 0 < apart < 0.1 * moved and equal < 1e-5 * small
    first, second = Optimizers(settings("adamw8bit")), Optimizers(settings("adamw8bit"))
    descend(first, cut, range(1, 5))
    state = first.by_network[cut["student"]].state[cut["student"][0]]
    assert {state["state1"].dtype, state["state2"].dtype} == {torch.uint8}
    kept = first.state(cut)
    values = json.loads(json.dumps(kept.values))
    resumed.load_state_dict(cut.state_dict())
    second.restore(State({name: tensor.detach().clone() for name, tensor in kept.tensors.items()}, values), resumed)
    descend(second, resumed, range(5, STEPS + 1))
    assert all(torch.equal(a, b) for a, b in zip(whole["student"], resumed["student"], strict=True))


def test_adamw8bit_is_refused_without_its_library_and_where_weights_are_not_whole(monkeypatch):
    config = OptimizerConfig(optimizer="adamw8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = r"optimizer=adamw8bit needs the library bitsandbytes: pip install 'distillbench\[adam8bit\]'"
    with pytest.raises(UserError, match=message):
        Optimizers(config).update(network := large()["student"], network[0].sum(), 1.0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"methods\.lcm\.{message}"):
        check_optimizers(config, "methods.lcm.", {"compute.shard": True})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_optimizers(config, "methods.lcm.", {"compute.shard": False})
    check_optimizers(OptimizerConfig(), "methods.lcm.", {"compute.shard": True})
    with pytest.raises(UserError, match=r"optimizer=adamw8bit does not go with compute\.shard=true: it keeps"):
        check_optimizers(config, "", {"compute.channels_last": False, "compute.shard": True})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adam, radam, adamw8bit, got 'sgd'"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"lr_decay": "sqrt"}, "lr_decay must be one of constant, linear, cosine, inverse_sqrt, got 'sqrt'"),
        ({"lr_decay_start": 0.0}, "lr_decay_start must be positive, got 0.0"),
        ({"lr_decay_start": 2.0}, "lr_decay_start must lie between 0 and 1, got 2.0"),
        ({"grad_clip_by": "size"}, "grad_clip_by must be one of norm, value, got 'size'"),
        ({"ema_start": "late"}, "ema_start must be one of rampup, bias_corrected, constant, got 'late'"),
        ({"ema_sigma_rel": 0.3}, "ema_sigma_rel must lie between 0 and 0.288675.*, got 0.3"),
    ],
)
def test_invalid_settings_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**setting)


def test_inverse_square_root_decay():
    """lr / sqrt(max(p / p_0, 1)), times the warm-up (Karras et al. 2024, arXiv:2312.02696)."""
    config = optimizer(lr_warmup=0.1, lr_decay="inverse_sqrt", lr_decay_start=0.25)
    expected = {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.25: 1.0, 0.5: math.sqrt(0.5), 1.0: 0.5}
    assert {p: learning_rate_factor(config, p) for p in expected} == pytest.approx(expected, abs=1e-12)
    assert learning_rate_factor(optimizer(lr_decay="inverse_sqrt", lr_decay_start=0.04), 1.0) == pytest.approx(0.2)


# --- gradients -------------------------------------------------------------------------------------------------------


def pulled(gradients: list[float], **changes) -> tuple[list[float], UpdateCounts]:
    """The gradients as the optimiser gets them, of a network with a weight of each, and the counts."""
    network, counts = nn.ParameterList([torch.tensor(0.0) for _ in gradients]), UpdateCounts()
    optimizers = Optimizers(optimizer(**changes), counts=counts)
    optimizers.differentiate(network, sum(w for w in network), first=True)
    for weight, gradient in zip(network, gradients, strict=True):
        weight.grad.fill_(gradient)
    optimizers.step(network, 1.0)
    counts.note([number.item() for number in counts.unread()])
    return [weight.grad.item() for weight in network], counts


@pytest.mark.parametrize("largest", [0.5, 2.0, 10.0])
def test_gradients_are_clipped_by_value(largest):
    given = [3.0, -4.0, 0.25]
    left, counts = pulled(given, grad_clip=largest, grad_clip_by="value")
    expected = nn.Parameter(torch.zeros(3))
    expected.grad = torch.tensor(given)
    nn.utils.clip_grad_value_([expected], largest)
    assert left == expected.grad.tolist()
    assert (counts.clipped, counts.nonfinite) == (int(largest < 4), 0)
    assert pulled(given, grad_clip=0.0, grad_clip_by="value")[0] == given


def test_what_is_not_finite_is_replaced_before_clipping_and_counted():
    """As in EDM's code: NaN -> 0, infinities -> 1e5 and -1e5."""
    given = [3.0, math.nan, math.inf, -math.inf]
    left, counts = pulled(given, grad_clip=0.0, grad_nan_to_num=True)
    assert left == [3.0, 0.0, 1e5, -1e5]
    assert (counts.updates, counts.clipped, counts.nonfinite) == (1, None, 1)
    clipped, counts = pulled([3.0, math.nan, 4.0], grad_clip=1.0, grad_nan_to_num=True)
    assert clipped == pytest.approx([0.6, 0.0, 0.8], rel=1e-6) and (counts.clipped, counts.nonfinite) == (0, 1)
    by_value, counts = pulled(given, grad_clip=2.0, grad_clip_by="value", grad_nan_to_num=True)
    assert by_value == [2.0, 0.0, 2.0, -2.0] and counts.nonfinite == 1
    assert math.isnan(pulled(given, grad_clip=0.0)[0][1])


class TwoRanks:
    """This rank of two; the other one has `other`."""

    count, share = 2, Share(0, 2)

    def __init__(self, other: Tensor) -> None:
        self.other = other

    def all_reduce(self, tensors) -> None:
        for tensor in tensors:
            tensor += self.other


@pytest.mark.parametrize("other", [5.0, 1.0, math.nan])
def test_the_largest_element_is_that_of_all_shards(other):
    ranks = TwoRanks(torch.tensor([0.0, other]))
    own = [torch.tensor([1.0, -3.0]), torch.zeros(0)]  # a rank may have no row of a weight
    norm = Gradients([torch.tensor([2.0])], own, ranks).norm("value").item()
    assert norm == max(3.0, other) or (math.isnan(norm) and math.isnan(other))


# --- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 12**-0.5])
def test_the_exponent_of_a_power_profile_has_its_width(sigma_rel):
    """sigma_rel is the standard deviation of the density (gamma + 1) t^gamma on [0, 1]."""
    gamma = power_exponent(sigma_rel)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-9) and gamma > -1e-6
    if sigma_rel in (0.05, 0.1):  # given in the paper
        assert gamma == pytest.approx({0.05: 16.97, 0.1: 6.94}[sigma_rel], abs=0.005)


def weights_of_updates(sizes: list[int], **changes) -> tuple[list[float], float]:
    """How much of the weights after each update, of so many images, and of the initial ones is in the average."""
    network = nn.ParameterList([torch.zeros(len(sizes) + 1)])
    network[0].data[-1] = 1.0  # the initial weights
    average = Average(network, optimizer(**changes))
    for k, size in enumerate(sizes):
        network[0].data.zero_()[k] = 1.0
        average.update(size)
    *updates, initial = average.module[0].tolist()
    return updates, initial


SIZES = [10] * 30 + [4]  # the last batch is smaller


def test_a_power_function_average_has_its_profile():
    """Updates between t_k-1 and t_k of T images have (t_k / T)^(gamma + 1) - (t_k-1 / T)^(gamma + 1)."""
    updates, initial = weights_of_updates(SIZES, ema_sigma_rel=0.1)
    seen = np.cumsum([0, *SIZES]) / sum(SIZES)
    assert updates == pytest.approx(np.diff(seen ** (power_exponent(0.1) + 1)), rel=1e-9) and initial == 0
    many, _ = weights_of_updates([10] * 2000, ema_sigma_rel=0.1, ema_halflife_kimg=7.0)  # the half-life has no effect
    t = (np.arange(2000) + 0.5) / 2000
    assert np.average((t - np.average(t, weights=many)) ** 2, weights=many) ** 0.5 == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("start", ["constant", "bias_corrected"])
def test_an_exponential_average_has_its_decay_from_the_start(start):
    """An update of n images has 1 - 2^(-n / h), times 2^(-m / h) for m images after it. Bias correction divides by the
    sum of all updates, as Adam does, and the initial weights vanish."""
    halflife, sizes = 0.05, np.array(SIZES)
    updates, initial = weights_of_updates(SIZES, ema_halflife_kimg=halflife, ema_start=start)
    later = sizes.sum() - sizes.cumsum()
    plain = (1 - 0.5 ** (sizes / 50)) * 0.5 ** (later / 50)
    left = 0.5 ** (sizes.sum() / 50)
    assert initial == pytest.approx(left if start == "constant" else 0.0, rel=1e-9, abs=1e-15)
    assert updates == pytest.approx(plain if start == "constant" else plain / (1 - left), rel=1e-9)
    assert sum(updates) + initial == pytest.approx(1.0)


def test_the_bias_corrected_average_is_that_of_tract():
    """p += (p_k - p) (1 - d) / (1 - d^k) after update k, with d per update (apple/ml-tract, as published)."""
    d, expected, network = 0.9, 5.0, Weight(5.0)
    average = Average(
        network, optimizer(ema_halflife_kimg=0.064 * math.log(0.5) / math.log(d), ema_start="bias_corrected")
    )
    for k in range(1, 8):
        network.w.data.fill_(math.cos(k))
        average.update(64)
        expected += (math.cos(k) - expected) * (1 - d) / (1 - d**k)
        assert average.module.w.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("changes", [{"ema_sigma_rel": 0.1}, {"ema_halflife_kimg": 0.1, "ema_start": "bias_corrected"}])
def test_an_average_resumes(changes):
    network = Weight(5.0)
    whole = Average(network, optimizer(**changes))
    half: Average | None = None
    for k in range(1, 9):
        network.w.data.fill_(math.cos(k))
        whole.update(32)
        if k == 4:
            kept = copy.deepcopy(whole.state())
            half = Average(network, optimizer(**changes))
            half.restore(kept)
        elif half is not None:
            half.update(32)
    assert half is not None and half.module.w.item() == whole.module.w.item()


def test_settings_without_an_average():
    assert not optimizer(ema_halflife_kimg=0.0, ema_start="constant").averaged
    assert optimizer(ema_halflife_kimg=0.0, ema_sigma_rel=0.1).averaged
