"""Gradients of two losses in one weight: of linear losses, whose gradients are known."""

from __future__ import annotations

import math

import pytest
import torch

from analytic import close
from distillbench.diffusion import gradient_ratio, with_gradient_of

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("of_b", "expected"), [([6.0, 8.0], 5 / 10.0001), ([0.0, 0.0], 1e4), ([0.0, 1e-4], 1e4)])
def test_the_ratio_of_linear_losses(of_b, expected):
    """|(3, 4)| is 5; 1e-4 is added to the other norm, and the ratio is at most 1e4."""
    weight = torch.tensor([0.7, -0.2], requires_grad=True)
    a, b = ((weight * torch.tensor(gradient)).sum() for gradient in ([3.0, 4.0], of_b))
    ratio = gradient_ratio(a, b, weight)
    assert ratio.item() == pytest.approx(expected, rel=1e-12) and not ratio.requires_grad
    (a + b).backward()  # the graphs are kept
    close(weight.grad, torch.tensor([3.0, 4.0]) + torch.tensor(of_b))


def test_a_loss_in_two_parts_has_the_gradient_of_the_whole():
    """d/dw of mean sin(w z)^2 is mean 2 sin(w z) cos(w z) z, and the outer part is passed once."""
    z, w, passes = torch.linspace(-1, 2, 7), torch.tensor(0.3, requires_grad=True), []
    x = w * z
    cut = x.detach().requires_grad_()
    outer = cut.sin()
    outer.register_hook(lambda gradient: passes.append(gradient))
    loss = with_gradient_of(outer.square().mean(), cut, x)
    assert loss.item() == pytest.approx(sum(math.sin(0.3 * each) ** 2 for each in z.tolist()) / 7, rel=1e-12)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss, w, retain_graph=True)
        close(gradient, (2 * (0.3 * z).sin() * (0.3 * z).cos() * z).mean(), rtol=1e-12)
    assert len(passes) == 1
    whole = x.square().sum()
    assert with_gradient_of(whole, x, x) is whole
