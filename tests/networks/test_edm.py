"""EDM's two U-Nets against published sizes, against diffusers' blocks and U-Nets, and against plain sums."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, pad, silu

from distillbench.diffusion.conditioning import Condition
from distillbench.networks.edm import (
    BOX,
    Block,
    Conv,
    DhariwalUNet,
    Fourier,
    Positional,
    SongUNet,
    downsample,
    upsample,
)

diffusers = pytest.importorskip("diffusers")

BINOMIAL = (1, 3, 3, 1)
DDPM = {"channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
NCSN = DDPM | {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": BINOMIAL,
}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """With weights under which every path counts; fresh ones end in zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return module.eval().requires_grad_(False)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(cls=SongUNet, **settings) -> nn.Module:
    return randomised(cls(8, 3, 3, model_channels=16, **DDPM | settings))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


# --- sizes and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, published",
    [
        (lambda: SongUNet(32, 3, 3, augment_dim=9, channel_mult=(2, 2, 2)), 55_733_891),  # CIFAR-10, "vp"
        (lambda: SongUNet(64, 3, 3, augment_dim=9, channel_mult=(1, 2, 2, 2)), 61_805_571),  # FFHQ, AFHQv2, "vp"
        (lambda: DhariwalUNet(64, 3, 3, label_dim=1000), 295_899_267),  # ImageNet, "adm"
    ],
)
def test_they_have_as_many_parameters_as_the_released_networks(build, published):
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == published


def test_tensors_are_called_what_the_released_files_call_them():
    names = set(tiny(augment_dim=9, label_dim=10, **NCSN).state_dict())
    assert names >= {
        *("map_noise.freqs", "map_label.weight", "map_label.bias", "map_augment.weight", "map_layer0.weight"),
        *("map_layer1.bias", "enc.8x8_conv.weight", "enc.8x8_block0.norm0.weight", "enc.8x8_block0.conv0.bias"),
        *("enc.8x8_block0.affine.weight", "enc.8x8_block0.norm1.bias", "enc.8x8_block0.conv1.weight"),
        *("enc.4x4_down.conv0.resample_filter", "enc.4x4_down.skip.resample_filter", "enc.4x4_down.skip.weight"),
        *("enc.4x4_aux_residual.weight", "enc.4x4_aux_residual.resample_filter", "enc.4x4_block0.norm2.weight"),
        *("enc.4x4_block0.qkv.weight", "enc.4x4_block0.proj.bias", "enc.4x4_block0.skip.bias"),
        *("dec.4x4_in0.qkv.bias", "dec.4x4_in1.conv0.weight", "dec.8x8_up.conv0.resample_filter"),
        *("dec.4x4_block1.skip.weight", "dec.8x8_aux_norm.weight", "dec.8x8_aux_conv.bias"),
    }
    assert "map_augment.bias" not in names and "dec.4x4_aux_norm.weight" not in names
    names = set(tiny(encoder_type="skip", decoder_type="skip").state_dict())
    assert names >= {
        *("enc.4x4_aux_down.resample_filter", "enc.4x4_aux_skip.weight", "dec.8x8_aux_up.resample_filter"),
        *("dec.4x4_aux_norm.weight", "dec.4x4_aux_conv.weight"),
    }
    assert not names & {"enc.4x4_aux_down.weight", "dec.8x8_aux_up.weight", "map_noise.freqs", "map_label.weight"}
    names = set(tiny(DhariwalUNet, label_dim=10, augment_dim=9).state_dict())
    assert names >= {"out_norm.weight", "out_conv.bias", "map_label.weight", "enc.4x4_down.skip.resample_filter"}
    assert not names & {"map_label.bias", "enc.4x4_down.skip.weight", "map_augment.bias", "dec.8x8_aux_norm.weight"}


def test_attention_is_where_the_released_networks_have_it():
    def attending(network: nn.Module) -> set[str]:
        return {name for name, module in network.named_modules() if isinstance(module, Block) and module.heads}

    with torch.device("meta"):
        song = SongUNet(32, 3, 3, channel_mult=(2, 2, 2))
        adm = DhariwalUNet(64, 3, 3)
    assert attending(song) == {*(f"enc.16x16_block{i}" for i in range(4)), "dec.8x8_in0", "dec.16x16_block4"}
    sides = ("32x32", "16x16", "8x8")
    both = {f"{way}.{side}_block{i}" for way, n in (("enc", 3), ("dec", 4)) for side in sides for i in range(n)}
    assert attending(adm) == {*both, "dec.8x8_in0"}
    assert (adm.enc["32x32_block0"].heads, adm.enc["8x8_block0"].heads) == (6, 12)


# --- diffusers' blocks -----------------------------------------------------------------------------------------------


def copy_(theirs: nn.Module, ours: nn.Module) -> None:
    theirs.weight.data.copy_(ours.weight.view(theirs.weight.shape))
    theirs.bias.data.copy_(ours.bias)


def copy_resnet(theirs: nn.Module, ours: Block) -> None:
    theirs.output_scale_factor = 1 / ours.scale
    pairs = {"norm1": "norm0", "conv1": "conv0", "time_emb_proj": "affine", "norm2": "norm1", "conv2": "conv1"}
    for theirs_name, name in pairs.items():
        copy_(getattr(theirs, theirs_name), getattr(ours, name))
    theirs.norm1.eps = theirs.norm2.eps = ours.norm0.eps
    if ours.skip is not None and ours.skip.weight is not None:
        theirs.conv_shortcut = nn.Conv2d(*ours.skip.weight.shape[1::-1], 1)
        copy_(theirs.conv_shortcut, ours.skip)


def copy_attention(theirs: nn.Module, ours: Block) -> None:
    theirs.rescale_output_factor = 1 / ours.scale
    theirs.group_norm.eps = ours.norm2.eps
    copy_(theirs.group_norm, ours.norm2)
    copy_(theirs.to_out[0], ours.proj)
    channels = ours.proj.weight.shape[0]
    for k, part in enumerate((theirs.to_q, theirs.to_k, theirs.to_v)):
        part.weight.data.copy_(ours.qkv.weight.view(channels, 3, channels)[:, k])
        part.bias.data.copy_(ours.qkv.bias.view(channels, 3)[:, k])


def block_of(into: int, out: int, adaptive: bool, **settings) -> Block:
    init = {"init": nn.init.ones_, "init_last": nn.init.ones_, "init_attention": nn.init.ones_}
    scale, eps = (1.0, 1e-5) if adaptive else (math.sqrt(0.5), 1e-6)
    settings = {"heads": 0, "taps": BOX, "projects": not adaptive, "dropout": 0.3} | settings
    return randomised(Block(into, out, 12, adaptive=adaptive, scale=scale, eps=eps, **init, **settings))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("into, out, way, taps", [(16, 16, "", BOX), (16, 32, "", BOX)] + [
    (16, 16, way, taps) for way in ("down", "up") for taps in (BOX, BINOMIAL)
])  # fmt: skip
def test_a_block_is_diffusers_resnet_block(adaptive, into, out, way, taps):
    from diffusers.models.resnet import ResnetBlock2D

    ways = {way: True} if way else {}
    ours = block_of(into, out, adaptive, taps=taps, **ways)
    theirs = ResnetBlock2D(
        in_channels=into,
        out_channels=out,
        temb_channels=12,
        groups=into // 4,
        groups_out=out // 4,
        time_embedding_norm="scale_shift" if adaptive else "default",
        skip_time_act=True,
        kernel="fir" if taps == BINOMIAL else "sde_vp",
        **ways,
    ).eval()
    copy_resnet(theirs, ours)
    x, e = noise(2, into, 8, 8), noise(2, 12, seed=2)
    assert close(ours(x, e), theirs(x, e))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_block_attends_as_diffusers_attention_does(adaptive, heads):
    from diffusers.models.attention_processor import Attention

    ours = block_of(16, 16, adaptive, heads=heads)
    theirs = Attention(
        16, heads=heads, dim_head=16 // heads, norm_num_groups=4, bias=True, residual_connection=True,
        _from_deprecated_attn_block=True,
    ).eval()  # fmt: skip
    copy_attention(theirs, ours)
    without = copy.deepcopy(ours)
    without.heads = 0
    x, e = noise(2, 16, 4, 4), noise(2, 12, seed=2)
    assert close(ours(x, e), theirs(without(x, e)))
    assert not close(ours(x, e), without(x, e), 0.01)


def test_resampling_is_diffusers_fir_filter():
    from diffusers.models.upsampling import upfirdn2d_native

    x, taps = noise(2, 3, 8, 8), torch.tensor([1.0, 3, 3, 1])
    filter = torch.outer(taps, taps) / 64
    ours = filter[None, None]
    assert close(downsample(x, ours, 1), upfirdn2d_native(x, filter, down=2, pad=(1, 1)))
    assert close(upsample(x, ours, 1), upfirdn2d_native(x, 4 * filter, up=2, pad=(2, 1)))
    box = torch.full((1, 1, 2, 2), 0.25)
    assert close(downsample(x, box, 0), nn.functional.avg_pool2d(x, 2))
    assert torch.equal(upsample(x, box, 0), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("taps", [BOX, BINOMIAL])
def test_a_seamless_convolution_is_one_of_the_image_surrounded_by_zeros(taps):
    conv = randomised(Conv(3, 5, 3, down=True, taps=taps, seamless=True))
    row = torch.tensor(taps, dtype=torch.float32)
    both = conv2d(conv.weight.flatten(0, 1)[:, None], torch.outer(row, row)[None, None], padding=len(taps) - 1)
    both = both.view(5, 3, *both.shape[-2:]) / row.sum() ** 2  # the two filters as one
    x, around = noise(2, 3, 8, 8), 1 + (len(taps) - 1) // 2
    expected = conv2d(pad(x, [around] * 4), both, conv.bias, stride=2)
    assert close(conv(x), expected)


# --- diffusers' U-Nets -----------------------------------------------------------------------------------------------


class Passes(nn.Module):
    """In place of an attention that the other network does not have."""

    def forward(self, h: Tensor, **_: object) -> Tensor:
        return h


def diffusers_unet(ours: SongUNet | DhariwalUNet, **settings) -> nn.Module:
    """diffusers' U-Net with the weights of `ours`: two levels, 4x4 with attention and 8x8 without."""
    theirs = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(128, 256),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        norm_num_groups=32,
        attn_norm_num_groups=32,
        **settings,
    ).eval()
    copy_(theirs.conv_in, ours.enc["8x8_conv"])
    copy_(theirs.time_embedding.linear_1, ours.map_layer0)
    copy_(theirs.time_embedding.linear_2, ours.map_layer1)
    down, mid, up = theirs.down_blocks, theirs.mid_block, theirs.up_blocks
    blocks = {
        "enc.8x8_block0": (down[0].resnets[0], None),
        "enc.4x4_down": (down[0].downsamplers[0], None),
        "enc.4x4_block0": (down[1].resnets[0], down[1].attentions[0]),
        "dec.4x4_in0": (mid.resnets[0], mid.attentions[0]),
        "dec.4x4_in1": (mid.resnets[1], None),
        "dec.4x4_block0": (up[0].resnets[0], up[0].attentions[0]),
        "dec.4x4_block1": (up[0].resnets[1], up[0].attentions[1]),
        "dec.8x8_up": (up[0].upsamplers[0], None),
        "dec.8x8_block0": (up[1].resnets[0], None),
        "dec.8x8_block1": (up[1].resnets[1], None),
    }
    for name, (resnet, attention) in blocks.items():
        block = ours.get_submodule(name)
        copy_resnet(resnet, block)
        if attention is not None and block.heads:
            copy_attention(attention, block)
    if not ours.get_submodule("dec.4x4_block0").heads:
        up[0].attentions[0] = Passes()
    return theirs


def test_the_whole_of_ddpmpp_is_diffusers_unet():
    ours = randomised(SongUNet(8, 3, 3, **DDPM))
    theirs = diffusers_unet(ours, attention_head_dim=256, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6)
    copy_(theirs.conv_norm_out, ours.dec["8x8_aux_norm"])
    copy_(theirs.conv_out, ours.dec["8x8_aux_conv"])
    x, time = noise(2, 3, 8, 8), torch.tensor([-1.5, 1.1])
    with torch.no_grad():
        assert close(ours(x, time), theirs(x, time).sample, 1e-4)
        assert not close(ours(x, time), ours(x, time.flip(0)), 0.01)


def test_the_whole_of_adm_is_diffusers_unet():
    ours = randomised(DhariwalUNet(8, 3, 3, label_dim=7, model_channels=128, **DDPM))
    theirs = diffusers_unet(ours, attention_head_dim=64, resnet_time_scale_shift="scale_shift", num_class_embeds=7)
    theirs.class_embedding.weight.data.copy_(ours.map_label.weight.T)
    copy_(theirs.conv_norm_out, ours.out_norm)
    copy_(theirs.conv_out, ours.out_conv)
    x, time, labels = noise(2, 3, 8, 8), torch.tensor([-1.5, 1.1]), torch.tensor([0, 6])
    with torch.no_grad():
        assert close(ours(x, time, None, Condition(labels)), theirs(x, time, labels).sample, 1e-4)


# --- what runs beside the features -----------------------------------------------------------------------------------


def by_hand(network: SongUNet, x: Tensor, time: Tensor) -> Tensor:
    """The network of two levels with one block each, written out line by line."""
    enc, dec = network.enc, network.dec
    angles = time[:, None] * 2 * math.pi * network.map_noise.freqs
    e = torch.cat([angles.sin(), angles.cos()], dim=1)
    e = silu(network.map_layer1(silu(network.map_layer0(e))))
    a = enc["8x8_conv"](x)
    b = enc["8x8_block0"](a, e)
    d = enc["4x4_down"](b, e)
    if network.encoder_type == "residual":
        d = (d + enc["4x4_aux_residual"](x)) / math.sqrt(2)
    else:
        d = d + enc["4x4_aux_skip"](nn.functional.avg_pool2d(x, 2))
    f = enc["4x4_block0"](d, e)
    h = dec["4x4_in1"](dec["4x4_in0"](f, e), e)
    h = dec["4x4_block0"](torch.cat([h, f], 1), e)
    low = dec["4x4_block1"](torch.cat([h, d], 1), e)
    h = dec["8x8_up"](low, e)
    h = dec["8x8_block0"](torch.cat([h, b], 1), e)
    h = dec["8x8_block1"](torch.cat([h, a], 1), e)

    def image(h: Tensor, side: str) -> Tensor:
        norm, conv = dec[f"{side}_aux_norm"], dec[f"{side}_aux_conv"]
        h = group_norm(h, h.shape[1] // 4, norm.weight, norm.bias, 1e-6)
        return conv2d(silu(h), conv.weight, conv.bias, padding=1)

    if network.decoder_type == "standard":
        return image(h, "8x8")
    return image(low, "4x4").repeat_interleave(2, 2).repeat_interleave(2, 3) + image(h, "8x8")


@pytest.mark.parametrize("settings", [
    NCSN,
    {"encoder_type": "skip", "decoder_type": "skip", "embedding_type": "fourier"},
])  # fmt: skip
def test_the_image_runs_beside_the_features(settings):
    network = tiny(**settings)
    x, time = noise(2, 3, 8, 8), torch.tensor([-0.2, 0.3])
    assert close(network(x, time), by_hand(network, x, time))


def test_a_residual_encoder_passes_its_sum_on():
    """Three levels: what is shrunk on the second way down is the sum of the first."""
    network = tiny(**NCSN | {"channel_mult": (1, 2, 2)})
    assert tuple(network.enc["4x4_aux_residual"].weight.shape) == (16, 3, 3, 3)
    assert tuple(network.enc["2x2_aux_residual"].weight.shape) == (32, 16, 3, 3)
    seen = []
    hook = network.enc["2x2_aux_residual"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sums = []
    other = network.enc["4x4_block0"].register_forward_pre_hook(lambda module, args: sums.append(args[0]))
    network(noise(2, 3, 8, 8), torch.zeros(2))
    hook.remove(), other.remove()
    assert torch.equal(seen[0], sums[0])


# --- what they are told ----------------------------------------------------------------------------------------------


def test_positional_features_follow_the_papers():
    time = torch.tensor([0.0, -1.5])
    inclusive, exclusive = Positional(8, inclusive=True)(time), Positional(8, inclusive=False)(time)
    first = [math.cos(-1.5 * 1e-4 ** (k / 3)) for k in range(4)] + [math.sin(-1.5 * 1e-4 ** (k / 3)) for k in range(4)]
    second = [math.cos(-1.5 * 1e-4 ** (k / 4)) for k in range(4)] + [math.sin(-1.5 * 1e-4 ** (k / 4)) for k in range(4)]
    assert torch.allclose(inclusive[1], torch.tensor(first)) and torch.allclose(exclusive[1], torch.tensor(second))
    assert inclusive[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_fourier_features_are_a_frequency_each():
    layer = Fourier(8)
    out = layer(torch.tensor([0.25]))
    assert torch.allclose(out[0, :4], (math.pi / 2 * layer.freqs).cos(), atol=1e-5)
    assert 5 < Fourier(4096).freqs.std() < 25


@pytest.mark.parametrize("cls", [SongUNet, DhariwalUNet])
def test_an_embedding_is_added_before_the_last_activation(cls):
    network = tiny(cls)
    x, time, embedding = noise(2, 3, 8, 8), torch.tensor([-1.0, 0.5]), noise(2, network.embedding_channels, seed=3)
    told = copy.deepcopy(network)
    told.map_layer1.bias.data += embedding[0]
    out = network(x, time, embedding)
    assert close(out[:1], told(x, time)[:1])
    assert close(network(x, time, torch.zeros_like(embedding)), network(x, time))
    assert not close(out, network(x, time), 0.01)


@pytest.mark.parametrize("cls, factor", [(SongUNet, math.sqrt(5)), (DhariwalUNet, 1.0)])
def test_classes_are_one_hot_rows_and_none_is_a_row_of_zeros(cls, factor):
    network = tiny(cls, label_dim=5)
    x, time = noise(1, 3, 8, 8), torch.tensor([0.3])
    ask = lambda net, label: net(x, time, None, Condition(torch.tensor([label])))
    blind = copy.deepcopy(network)
    blind.map_label.weight.data.zero_()
    assert close(ask(network, 5), blind(x, time))
    assert torch.equal(ask(network, 5), network(x, time))
    assert not close(ask(network, 2), ask(network, 3), 0.001)
    told = copy.deepcopy(blind)  # the same sum by another way: through the bias, or through the embedding
    if cls is SongUNet:
        told.map_label.bias.data += factor * network.map_label.weight[:, 2]
        assert close(ask(network, 2), told(x, time))
    else:
        assert close(ask(network, 2), told(x, time, network.map_label.weight[:, 2][None]))


@pytest.mark.parametrize("cls", [SongUNet, DhariwalUNet])
def test_labels_of_augmentation_are_an_embedding_beside_that_of_the_noise_level(cls):
    """Like features of the noise level that are larger by W a. Without labels, and with zeros, W changes nothing."""
    network = tiny(cls, augment_dim=9)
    x, time, a = noise(2, 3, 8, 8), torch.tensor([0.3, -0.7]), noise(2, 9)
    told = network(x, time, None, Condition(augmentation=a))
    moved = copy.deepcopy(network)
    added = a @ network.map_augment.weight.T
    if cls is SongUNet:  # its features are sines and cosines in the other order
        added = added.roll(added.shape[1] // 2, dims=1)
    moved.map_noise.register_forward_hook(lambda module, args, features: features + added)
    assert close(told, moved(x, time)) and not close(told, network(x, time), 0.01)
    other = copy.deepcopy(network)
    other.map_augment.weight.data += 1
    assert torch.equal(network(x, time), other(x, time))
    assert close(other(x, time, None, Condition(augmentation=0 * a)), network(x, time))


# --- as students -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls, settings", [(SongUNet, {}), (SongUNet, NCSN), (DhariwalUNet, {"label_dim": 4})])
def test_a_copy_trains_and_the_original_stays(cls, settings):
    network = cls(8, 1, 1, model_channels=16, **DDPM | settings)
    student = copy.deepcopy(network).train()
    c = Condition(torch.tensor([0, 4]) if "label_dim" in settings else None)
    out = student(noise(2, 1, 8, 8), torch.tensor([-1.0, 1.0]), None, c)
    assert out.shape == (2, 1, 8, 8)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    (out - noise(2, 1, 8, 8, seed=5)).square().sum().backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(network.parameters(), student.parameters(), strict=True)]
    assert any(changed)
    student.load_state_dict(network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), student.parameters(), strict=True))


def test_only_training_drops_features():
    network = tiny(dropout=0.5)
    x, time = noise(2, 3, 8, 8), torch.zeros(2)
    assert torch.equal(network(x, time), network(x, time))
    network.train()
    assert not torch.equal(network(x, time), network(x, time))


@pytest.mark.parametrize("settings, words", [
    ({"encoder_type": "residul"}, "encoder_type must be one of standard, skip, residual, got 'residul'"),
    ({"embedding_type": "learned"}, "embedding_type"),
    ({"channel_mult": (1, 1, 1, 1, 1)}, "cannot be halved 4 times"),
])  # fmt: skip
def test_architectures_that_do_not_exist_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)
