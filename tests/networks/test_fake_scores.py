"""Fake scores: the step's embedding starts at zero, and the discriminator is a head on the network's own features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distillbench import Conditioning, UserError
from distillbench.diffusion.denoiser import Counter
from distillbench.networks import FakeScore
from distillbench.teachers.encoded_prompts import PlaceholderPrompts
from every_network import LAYERS, NETWORKS, denoiser, image_shape, inputs

STEPS = 4


def made(name: str, layer: str | None = None) -> tuple[FakeScore, tuple[Tensor, ...]]:
    """A fake score of four steps, and x_t, t, k and c."""
    f = denoiser(name).copy(Counter()).requires_grad_(True)
    text = name == "diffusers, text"
    conditioning = Conditioning(classes=2, texts=PlaceholderPrompts(5, 6)) if text else Conditioning(classes=2)
    x_t, t, _, c = inputs(name, f)
    k = torch.tensor([0, 2, 3]).view(3, 1, 1, 1)
    return FakeScore(f, STEPS, layer, image_shape(name), conditioning), (x_t, t, k, c)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_starts_as_the_denoiser_for_every_step_and_learns_to_differ(name):
    fake, (x_t, t, k, c) = made(name)
    f = denoiser(name)(x_t, t, c)
    torch.testing.assert_close(fake(x_t, t, k, c), f, rtol=0, atol=1e-5)
    fake(x_t, t, k, c).square().sum().backward()
    output = fake.step[-1]
    assert output.weight.grad.abs().sum() > 0
    nn.init.normal_(output.weight, std=0.3)
    assert not torch.equal(fake(x_t, t, k, c), fake(x_t, t, 0 * k, c))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_discriminator_is_its_head_on_the_features(name):
    fake, (x_t, t, k, c) = made(name, LAYERS[name])
    nn.init.normal_(fake.step[-1].weight, std=0.3)
    logits = fake.logits(x_t, t, k, c)
    _, features = fake.denoiser.features([LAYERS[name]], x_t, t, c, fake.step(k))
    h = features[LAYERS[name]].flatten(1)
    for layer in fake.head[1:]:
        h = layer(h)
    assert logits.shape == (3, 1)
    torch.testing.assert_close(logits, h)
    logits.sum().backward()
    below = dict(fake.denoiser.network.named_modules())[LAYERS[name]]
    assert any(w.grad is not None and w.grad.abs().sum() > 0 for w in below.parameters())


def test_without_steps_and_layer_it_is_the_denoiser_alone():
    fake = FakeScore(denoiser("mlp"))
    assert {name.split(".")[0] for name in fake.state_dict()} == {"denoiser"}
    assert fake.embedding(torch.zeros(2, 1, 1, 1)) is None


def test_a_submodule_that_there_is_not_is_refused():
    with pytest.raises(UserError, match=r"has no submodule 'blocks\.7'"):
        FakeScore(denoiser("mlp"), 1, "blocks.7", image_shape("mlp"))
