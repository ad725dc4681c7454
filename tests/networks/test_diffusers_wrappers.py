"""diffusers' networks in our call: what they are given, the added embedding, copies, keys, classes."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from torch import nn
from torch.nn.functional import interpolate

from distillbench import Conditioning, Teacher
from distillbench.diffusion.conditioning import Condition
from distillbench.diffusion.denoiser import Denoiser, guided
from distillbench.diffusion.schedules import VPCosine
from distillbench.errors import UserError
from distillbench.networks import project_guidance
from distillbench.networks.diffusers_wrappers import DiT, PixelUNet, check_classes
from distillbench.system.offloading import Offloaded
from small_diffusers_networks import CALL, dit, pixel_unet, text_unet


def asked() -> dict[str, tuple]:
    """A network of each kind, x and the condition it needs."""
    random = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, 8, 8, generator=random)
    latent = torch.randn(2, 4, 8, 8, generator=random)
    text = Condition(text=torch.randn(2, 5, 6, generator=random))
    return {
        "pixels": (pixel_unet(), image, Condition()),
        "classes": (pixel_unet(num_class_embeds=11), image, Condition(torch.tensor([3, 10]))),
        "text": (text_unet(in_channels=4, out_channels=4), latent, text),
        "dit": (dit(), latent, Condition(torch.tensor([3, 10]))),
    }


KINDS = tuple(asked())
TIME = torch.tensor([0.25, 0.8])


@pytest.mark.parametrize("kind", KINDS)
def test_an_added_embedding(kind):
    """One of zero changes nothing, another does, gradients reach it, and no hook is left behind."""
    network, x, c = asked()[kind]
    plain = network(x, TIME, None, c)
    assert plain.shape == x.shape
    embedding = torch.zeros(2, network.embedding_channels, requires_grad=True)
    out = network(x, TIME, embedding, c)
    torch.testing.assert_close(out, plain)
    out.square().mean().backward()
    assert embedding.grad.abs().sum(dim=1).min() > 0
    assert (network(x, TIME, torch.ones_like(embedding), c) - plain).abs().max() > 1e-4
    assert torch.equal(network(x, TIME, None, c), plain)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("kind", ["pixels", "dit"])
def test_the_embedding_is_added_to_that_of_time(kind):
    """Adding what another time's embedding has more is being told that other time."""
    network, x, c = asked()[kind]
    module = network.unet.time_embedding if kind == "pixels" else None
    if module is None:
        embedders = [block.norm1.emb.timestep_embedder for block in network.transformer.transformer_blocks]
        for other in embedders[1:]:
            other.load_state_dict(embedders[0].state_dict())  # each block has its own; one addition serves all
        module, proj = embedders[0], network.transformer.transformer_blocks[0].norm1.emb.time_proj
    else:
        proj = network.unet.time_proj
    at = lambda time: module(proj(CALL.argument(time)))
    other = torch.tensor([0.5, 0.1])
    torch.testing.assert_close(
        network(x, TIME, at(other) - at(TIME), c), network(x, other, None, c), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_go_where_the_network_fails(kind):
    network, x, c = asked()[kind]
    with pytest.raises(RuntimeError):
        network(x[:, :1], TIME, torch.zeros(2, network.embedding_channels), c)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_independent(kind):
    network, x, c = asked()[kind]
    twin = copy.deepcopy(network)
    before = network(x, TIME, None, c)
    assert torch.equal(twin(x, TIME, None, c), before)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.add_(0.1)
    assert torch.equal(network(x, TIME, None, c), before)
    assert (twin(x, TIME, None, c) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_those_of_diffusers_below_one_prefix(kind):
    network = asked()[kind][0]
    prefix = f"{network.component}."
    assert {key.removeprefix(prefix) for key in network.state_dict()} == set(network.wrapped.state_dict())
    assert all(key.startswith(prefix) for key in network.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_diffusers_network(kind):
    network, x, c = asked()[kind]
    index = torch.tensor([249.0, 799.0])
    if kind == "text":
        out = network.wrapped(x, index, c.text)
    elif kind == "pixels":
        out = network.wrapped(x, index)
    else:
        out = network.wrapped(x, index, class_labels=c.labels)
    torch.testing.assert_close(network(x, TIME, None, c), out.sample[:, : x.shape[1]], atol=1e-5, rtol=1e-4)


def test_a_dit_in_training_keeps_the_labels_it_is_given():
    network, x, c = asked()["dit"]
    network.train()
    c = Condition(torch.zeros(200, dtype=torch.int64))
    x = x[:1].expand(200, -1, -1, -1)
    out = network(x, torch.full((200,), 0.5), None, c)
    torch.testing.assert_close(out, out[:1].expand_as(out))


def test_an_upscaler_sees_the_small_image_enlarged():
    network = text_unet(noise_level=250, in_channels=6, out_channels=6, class_embed_type="timestep")
    x, small = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    text = torch.randn(2, 5, 6)
    large = interpolate(small, (8, 8), mode="bilinear", align_corners=True)
    index = torch.tensor([249.0, 799.0])
    out = network.unet(torch.cat([x, large], 1), index, text, class_labels=torch.tensor([250, 250])).sample[:, :3]
    c = Condition(text=text, image=small)
    torch.testing.assert_close(network(x, TIME, None, c), out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(network(x, TIME, None, Condition(text=text, image=large)), out, atol=1e-5, rtol=1e-4)
    network.noise_level = 0
    assert (network(x, TIME, None, c) - out).abs().max() > 1e-4


def test_how_many_classes_a_network_serves():
    assert PixelUNet.serves({"num_class_embeds": None}) == {0: False}
    assert PixelUNet.serves({"num_class_embeds": 11}) == {10: True, 11: False}
    assert DiT.serves({"num_embeds_ada_norm": 1000}) == {1000: True}
    assert DiT.serves({"num_embeds_ada_norm": 1}) == {1: True, 0: False}
    check_classes({10: True, 11: False}, 10, True, "x")
    check_classes({10: True, 11: False}, 11, False, "x")
    check_classes({0: False}, 0, False, "x")
    with pytest.raises(UserError, match="'x' knows no classes and cannot serve conditional=true with 3 classes"):
        check_classes({0: False}, 3, False, "x")
    with pytest.raises(UserError, match="cannot be guided"):
        check_classes({10: True, 11: False}, 11, True, "x")


@pytest.mark.parametrize(
    "settings",
    [{"class_embed_type": "identity"}, {"time_embedding_type": "learned", "num_train_timesteps": 1000}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_our_call_does_not_know_is_refused(settings):
    with pytest.raises(UserError, match=f"no {next(iter(settings))} .* in the network's config"):
        pixel_unet(**settings)


# --- the guidance weight as an input ---------------------------------------------------------------------------------


def guided_student(network=None, drawn: bool = True) -> Denoiser:
    start = Denoiser(network or text_unet(in_channels=4, out_channels=4), VPCosine(), "eps")
    conditioning = Conditioning(2, 2.0, (1.0, 16.0) if drawn else None)
    return Teacher("t", start, (4, 8, 8), "t", conditioning=conditioning).student().eval()


def test_a_projected_guidance_weight_is_diffusers_own(tmp_path):
    """A saved student is a U-Net with time_cond_proj_dim, which diffusers calls with its own features of w - 1."""
    student = project_guidance(guided_student())
    _, x, c = asked()["text"]
    w = torch.tensor([7.5, 14.0])
    out = student.network(x, TIME, None, Condition(text=c.text, w=w.view(-1, 1, 1, 1)))
    student.network.wrapped.save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert unet.config.time_cond_proj_dim == 256
    features = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w - 1, embedding_dim=256)
    expected = unet(x, torch.tensor([249.0, 799.0]), c.text, timestep_cond=features).sample
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert (out - unet(x, torch.tensor([249.0, 799.0]), c.text).sample).abs().max() > 1e-3


def test_a_projected_guidance_weight_is_learned_and_starts_random_as_released():
    """In place of the embedding beside the network; +-1/16 are the bounds of torch's Linear with 256 inputs."""
    student = project_guidance(guided_student())
    layer = student.network.wrapped.time_embedding.cond_proj.weight
    assert 0.06 < layer.abs().max() <= 1 / 16 and student.guidance is None
    _, x, c = asked()["text"]
    c = Condition(torch.tensor([0, 1]), torch.full((2, 1, 1, 1), 3.0), text=c.text)
    t = TIME.double().view(-1, 1, 1, 1)
    guided(student, Conditioning(2, 2.0, (1.0, 16.0), texts=_Empty()), x, t, c).square().sum().backward()
    assert layer.grad is not None and layer.grad.abs().sum() > 0  # guided() keeps w for both evaluations


class _Empty:
    """The texts of a run: all empty."""

    def empty(self, count: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(count, 5, 6)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (lambda: guided_student(pixel_unet(num_class_embeds=3)), "a PixelUNet has no input for the guidance weight"),
        (lambda: guided_student(drawn=False), "only where training draws it: set guidance_range"),
        (lambda: frozen(guided_student()), "adapters cannot hold the network's new input"),
    ],
)
def test_where_a_guidance_weight_cannot_be_projected(student, message):
    with pytest.raises(UserError, match=message):
        project_guidance(student())


def frozen(student: Denoiser) -> Denoiser:
    nn.Module.requires_grad_(student.network.wrapped.conv_in, False)
    return student


def test_parked_modules_are_shared_and_awake_only_while_they_work():
    class Moves(torch.nn.Linear):
        def to(self, device):
            self.moves = [*getattr(self, "moves", []), device]
            return self

    offloaded = Offloaded(Moves(2, 2), "cuda")
    with offloaded.on_device() as module:
        with offloaded.on_device():
            pass
        assert module.moves[-1] == "cuda"
    assert offloaded.module.moves[-1] == "cpu" and not module.weight.requires_grad
    assert copy.deepcopy(offloaded) is offloaded
