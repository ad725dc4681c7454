"""Adapters (LoRA): which layers get them, that they change nothing at first, and that merging is peft's."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from distillbench.errors import UserError
from distillbench.networks.adapters import Adapters, adaptable_layers, adapters_of, chosen_layers, inject, merged

peft = pytest.importorskip("peft")

TWO = Adapters(rank=2, alpha=3.0)


class Small(nn.Module):
    """Layers that can be adapted, and some that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(2, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.norm = nn.GroupNorm(2, 4)
        self.inner = nn.ModuleDict({"entry": nn.Linear(4, 3), "exit": nn.Linear(3, 5)})

    def forward(self, x):
        h = self.norm(self.dilated(self.grouped(self.down(self.entry(x).relu())))).mean(dim=(2, 3))
        return self.inner["exit"](self.inner["entry"](h).tanh())


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def trained(network: Small, adapters: Adapters) -> Small:
    """`network` with adapters that are not zero."""
    inject(network, adapters)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    return network


X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def test_all_linear_and_plain_convolutional_layers_are_adapted():
    assert adaptable_layers(small()) == ["entry", "down", "inner.entry", "inner.exit"]


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        ((), ["entry", "down", "inner.entry", "inner.exit"]),
        (("entry",), ["entry", "inner.entry"]),
        (("inner.exit",), ["inner.exit"]),
        ((r"inner\..*", "down"), ["down", "inner.entry", "inner.exit"]),
    ],
)
def test_targets_are_names_ends_of_names_or_expressions(targets, chosen):
    assert chosen_layers(small(), targets) == chosen
    network = trained(small(), Adapters(2, 2.0, targets))
    assert [
        name for name, module in network.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    ] == chosen


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("to_q",), r"student\.lora_targets: 'to_q' is not a name.*Possible: entry, down, inner"),
        (("grouped",), r"'grouped' is not a name"),
        (("down", "("), r"'\(' is not a regular expression"),
    ],
)
def test_a_target_without_a_layer_is_an_error(targets, message):
    with pytest.raises(UserError, match=message):
        inject(small(), Adapters(2, 2.0, targets))


def test_a_network_without_such_layers_is_an_error():
    with pytest.raises(UserError, match="a GroupNorm has no Linear or Conv2d layer"):
        inject(nn.GroupNorm(2, 4), TWO)


def test_adapters_change_nothing_at_first_and_only_they_are_trained():
    network, plain = small(), small()
    inject(network, TWO)
    assert torch.equal(network(X), plain(X))
    network(X).square().sum().backward()
    with_gradient = {name for name, weight in network.named_parameters() if weight.grad is not None}
    assert with_gradient == {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert len(with_gradient) == 8 and all("lora_" in name for name in with_gradient)


def test_merging_gives_the_weights_that_peft_gives():
    network = trained(small(), TWO)
    kept, state = network(X).detach(), network.state_dict()
    plain = small()
    plain.load_state_dict(merged(state, TWO.scale))
    assert torch.allclose(plain(X), kept, atol=1e-6) and not torch.allclose(small()(X), kept, atol=1e-2)
    for name, module in copy.deepcopy(network).named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
            assert torch.allclose(module.get_base_layer().weight, plain.get_submodule(name).weight, atol=1e-7)


def test_a_state_without_adapters_is_its_own_merge():
    state = nn.ModuleDict({"base_layer": nn.Linear(2, 2)}).state_dict()
    assert merged(state, 1.0).keys() == state.keys()


def test_adapters_are_saved_with_the_keys_of_peft():
    network = trained(small(), TWO)
    ours, theirs = adapters_of(network.state_dict()), peft.get_peft_model_state_dict(network)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_missing_peft_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError, match=r"student\.lora_rank=2 needs the library peft: pip install 'distillbench\[lora\]'"
    ):
        inject(small(), TWO)
