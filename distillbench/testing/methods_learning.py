"""Checks that every part of a method learns, and that it can train a network with attention.

The list of all checks of methods, with what each of them needs, is ``CHECKS`` in :mod:`distillbench.testing.methods`.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from distillbench.errors import first_of
from distillbench.testing.checks import Doubt, Fault, NotApplicable, where
from distillbench.testing.method_bench import MethodBench, changed, weights_of
from distillbench.training.method import Method


def attention(bench: MethodBench) -> str:
    """A step of each phase runs on a network with attention, which has no forward-mode derivative by default."""
    if bench.computed.network != "mlp":
        raise NotApplicable(f"all checks run on the network {bench.computed.network}, which has attention")
    attending = dataclasses.replace(bench.computed, network="attention")
    try:
        for _ in dataclasses.replace(bench, computed=attending).walk():
            pass
    except (Exception, SystemExit) as error:
        raise Fault(
            f"a step fails on a network with attention, as unet, dit and most teachers have: {where(error, bench.cls)}"
        ) from error
    return "a step of each phase runs on a network with attention"


def learns(bench: MethodBench) -> str:
    """Every weight of a network that is yielded gets a gradient in a short training, and changes."""
    method, learning = bench.run.method, bench.run.learning
    names = {weight: name for name, weight in method.named_parameters()}
    moved = set(changed(weights_of(bench.method()), weights_of(method)))
    without, unchanged = [], []
    for weight in [weight for network in learning.networks for weight in network.parameters() if weight in names]:
        if weight.requires_grad and weight not in learning.weights:
            without.append(f"self.{names[weight]}")
        elif weight.requires_grad and names[weight] not in moved:
            unchanged.append(f"self.{names[weight]}")
    zero = [name for network in learning.networks for name in _zero_layers(network, method)]
    doubts = []
    if zero:
        doubts.append(
            f"{first_of(zero)}: zero after training, so its input has no effect. Is it frozen, or left out of the loss?"
            " An embedding that starts at zero must be trained: requires_grad_(True) after other weights are frozen"
        )
    if without := [name for name in without if not name.startswith(tuple(zero))]:
        doubts.append(
            f"{first_of(without)}: no gradient in {bench.steps()} steps. Is its output used in the loss, and not "
            "detached?"
        )
    if unchanged:
        doubts.append(f"{first_of(unchanged)}: the same after {bench.steps()} steps, although it gets a gradient")
    if doubts:
        return Doubt("; ".join(doubts))
    return f"every weight that is trained gets a gradient and changes in {bench.steps()} steps"


def _zero_layers(network: nn.Module, method: Method) -> list[str]:
    """The attributes of `method` that are layers of `network` whose weights are all zero."""
    names = {module: name for name, module in method.named_modules()}
    layers = {module: list(module.parameters(recurse=False)) for module in network.modules()}
    return [
        f"self.{names[layer]}"
        for layer, weights in layers.items()
        if weights and layer in names and not any(weight.any() for weight in weights)
    ]
