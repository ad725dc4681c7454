"""The two U-Nets of EDM's released networks: Song et al.'s (DDPM++, NCSN++) and Dhariwal & Nichol's (ADM).

Written from the papers: Song et al. 2021 (arXiv:2011.13456, appendix H), Dhariwal & Nichol 2021 (arXiv:2105.05233,
section 3) and Karras et al. 2022 (arXiv:2206.00364, table 7 and appendix F.1). Modules, parameters and settings have
the names of the released files, so that these weights load unchanged.

| symbol    | meaning                                                   | shape                   |
|-----------|-----------------------------------------------------------|-------------------------|
| x         | c_in x^, the noisy image scaled to variance 1             | (B,C,H,W)               |
| time      | c_noise = log(tau) / 4 at noise level tau                 | (B,)                    |
| e         | embedding of noise level, class and `embedding`           | (B, embedding_channels) |
| h, aux    | features; the image (or features) that runs beside them   | (B,c,h,w)               |

`embedding` is added to the network's own before the last activation: every block gets e = silu(own + embedding).
Labels equal to `label_dim`, and no labels, are a row of zeros instead of a one-hot row. Without labels of augmentation
nothing is added, as with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, dropout, one_hot, scaled_dot_product_attention, silu

from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition
from distillbench.diffusion.embeddings import AugmentedNetwork, PlacedFeatures, TimedNetwork

BOX = (1, 1)  # the mean of 2x2 pixels; NCSN++ resamples with (1, 3, 3, 1)
Init = Callable[[Tensor], object]  # initialises a weight


# --- pieces ----------------------------------------------------------------------------------------------------------


def _outer(taps: Sequence[float]) -> Tensor:
    """The filter of `taps` along both axes, summing to 1: (1,1,k,k)."""
    total = sum(taps) ** 2
    return torch.tensor([[[[a * b / total for b in taps] for a in taps]]], dtype=torch.float32)


def downsample(x: Tensor, filter: Tensor, padding: int) -> Tensor:
    """Every second pixel of x after `filter` (1,1,k,k): (B,C,H,W) -> (B,C,H/2,W/2) at padding k/2 - 1."""
    filter = filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    return conv2d(x, filter, stride=2, padding=padding, groups=x.shape[1])


def upsample(x: Tensor, filter: Tensor, padding: int) -> Tensor:
    """x between rows and columns of zeros, after 4 `filter`: (B,C,H,W) -> (B,C,2H,2W) at padding k/2 - 1."""
    filter = 4 * filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    return conv_transpose2d(x, filter, stride=2, padding=padding, groups=x.shape[1])


class Conv(nn.Module):
    """A convolution of odd `kernel` size with zero padding, after resampling by 2; kernel 0: resampling alone.

    With `seamless`, downsampling comes last, and the convolution's output beyond the borders is an input of it, as if
    the image were surrounded by zeros.
    """

    resample_filter: Tensor

    def __init__(
        self,
        into: int,
        out: int,
        kernel: int,
        *,
        init: Init | None = None,
        up: bool = False,
        down: bool = False,
        taps: Sequence[float] = BOX,
        seamless: bool = False,
    ) -> None:
        super().__init__()
        self.up, self.down, self.seamless = up, down, seamless
        self.reach, self.padding = kernel // 2, (len(taps) - 1) // 2
        self.weight = nn.Parameter(torch.empty(out, into, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out)) if kernel else None
        if self.weight is not None and init is not None:
            init(self.weight)
        self.register_buffer("resample_filter", _outer(taps) if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.seamless and self.down and self.weight is not None:
            x = conv2d(x, self.weight, self.bias, padding=self.reach + self.padding)
            return downsample(x, self.resample_filter, 0)
        if self.up:
            x = upsample(x, self.resample_filter, self.padding)
        if self.down:
            x = downsample(x, self.resample_filter, self.padding)
        return x if self.weight is None else conv2d(x, self.weight, self.bias, padding=self.reach)


def _linear(into: int, out: int, init: Init, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(into, out, bias=bias)
    init(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation with 32 groups, fewer if a group would have less than 4 channels."""
    return nn.GroupNorm(max(1, min(32, channels // 4)), channels, eps)


class Positional(nn.Module):
    """cos and sin of time at frequencies 1, ..., 1e-4 in geometric order: (B,) -> (B, channels).

    With `inclusive` the last frequency is 1e-4; otherwise 1e-4 would be the next one after the last.
    """

    def __init__(self, channels: int, inclusive: bool) -> None:
        super().__init__()
        self.frequencies, self.inclusive = channels // 2, inclusive

    def forward(self, time: Tensor) -> Tensor:
        steps = torch.arange(self.frequencies, dtype=torch.float32, device=time.device)
        angles = time[:, None] * (1e-4 ** (steps / max(1, self.frequencies - self.inclusive))).to(time.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Fourier(nn.Module):
    """cos and sin of 2 pi times random frequencies of standard deviation `scale`: (B,) -> (B, channels)."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("freqs", torch.normal(0.0, scale, (channels // 2,)))

    def forward(self, time: Tensor) -> Tensor:
        angles = time[:, None] * (2 * math.pi * self.freqs.to(time.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Block(nn.Module):
    """Two convolutions with a shortcut, e between them, then attention where there are `heads`.

    h = (shortcut(x) + conv1(silu(norm1(conv0(silu(norm0 x))) with e))) scale,    h = (h + proj(attention(h))) scale

    With `adaptive`, e scales and shifts the normalised features (ADM); else it is added before they are normalised.
    The 3c channels of queries, keys and values are grouped by head; within a head the order is q_1 k_1 v_1 q_2 ...
    """

    def __init__(
        self,
        into: int,
        out: int,
        embedding_channels: int,
        *,
        heads: int,
        adaptive: bool,
        scale: float,
        eps: float,
        dropout: float,
        taps: Sequence[float],
        projects: bool,
        init: Init,
        init_last: Init,
        init_attention: Init,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.adaptive, self.scale, self.dropout = heads, adaptive, scale, dropout
        resampled = partial(Conv, up=up, down=down, taps=taps)
        self.norm0 = _norm(into, eps)
        self.conv0 = resampled(into, out, 3, init=init)
        self.affine = _linear(embedding_channels, 2 * out if adaptive else out, init)
        self.norm1 = _norm(out, eps)
        self.conv1 = Conv(out, out, 3, init=init_last)
        self.skip = None
        if into != out or up or down:
            self.skip = resampled(into, out, 1 if projects or into != out else 0, init=init)
        if heads:
            self.norm2 = _norm(out, eps)
            self.qkv = Conv(out, 3 * out, 1, init=init_attention)
            self.proj = Conv(out, out, 1, init=init_last)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv0(silu(self.norm0(x)))
        modulation = self.affine(e)[:, :, None, None]
        if self.adaptive:
            scale, shift = modulation.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + modulation)
        h = self.conv1(dropout(silu(h), self.dropout, self.training))
        h = (h + (x if self.skip is None else self.skip(x))) * self.scale
        return (h + self.attend(h)) * self.scale if self.heads else h

    def attend(self, h: Tensor) -> Tensor:
        """The output of self-attention, (B,c,h,w)."""
        batch, channels, height, width = h.shape
        parts = self.qkv(self.norm2(h)).view(batch, self.heads, channels // self.heads, 3, height * width)
        q, k, v = parts.permute(3, 0, 1, 4, 2)  # each (B, heads, pixels, channels of a head)
        mixed = scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(2, 3).reshape(batch, channels, height, width))


# --- the two networks ------------------------------------------------------------------------------------------------


def _name(side: int, what: str) -> str:
    return f"{side}x{side}_{what}"


class _UNet(TimedNetwork, AugmentedNetwork):
    """An encoder through the resolutions side, ..., side / 2^(L-1), and a decoder back, with skip connections.

    At each resolution the encoder has `num_blocks` blocks and the decoder one more. The channels of a resolution are
    `model_channels` times its `channel_mult`. Subclasses embed the noise level and process the image beside the
    features.
    """

    map_augment: nn.Linear | None

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        label_dim: int,
        augment_dim: int,
        model_channels: int,
        channel_mult: Sequence[int],
        channel_mult_emb: int,
        num_blocks: int,
        attn_resolutions: Sequence[int],
    ) -> None:
        super().__init__()
        if not channel_mult or img_resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(f"images of {img_resolution} pixels a side cannot be halved {len(channel_mult) - 1} times")
        self.in_channels, self.classes, self.augment_dim = in_channels, label_dim, augment_dim
        self.model_channels, self.embedding_channels = model_channels, model_channels * channel_mult_emb
        self.num_blocks, self.attn_resolutions = num_blocks, tuple(attn_resolutions)
        self.sides = [img_resolution >> level for level in range(len(channel_mult))]
        self.widths = [model_channels * mult for mult in channel_mult]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()

    def _build(self, init: Init, block: Callable[..., Block], heads: Callable[[int], int], attends_last: bool) -> None:
        """Make encoder and decoder. With `attends_last`, only the last decoder block of a resolution has attention."""
        levels = list(zip(self.sides, self.widths, strict=True))
        width, skips = self.model_channels, [self.model_channels]
        self.enc[_name(self.sides[0], "conv")] = Conv(self.in_channels, width, 3, init=init)
        for side, wide in levels:
            if side != self.sides[0]:
                self.enc[_name(side, "down")] = block(width, width, heads=0, down=True)
                skips.append(width)
            for i in range(self.num_blocks):
                attends = side in self.attn_resolutions
                self.enc[_name(side, f"block{i}")] = block(width, wide, heads=heads(wide) if attends else 0)
                width = wide
                skips.append(width)
        for side, wide in reversed(levels):
            if side == self.sides[-1]:
                self.dec[_name(side, "in0")] = block(width, width, heads=heads(width))
                self.dec[_name(side, "in1")] = block(width, width, heads=0)
            else:
                self.dec[_name(side, "up")] = block(width, width, heads=0, up=True)
            for i in range(self.num_blocks + 1):
                attends = side in self.attn_resolutions and (i == self.num_blocks or not attends_last)
                into = width + skips.pop()
                self.dec[_name(side, f"block{i}")] = block(into, wide, heads=heads(wide) if attends else 0)
                width = wide

    def embed(self, time: Tensor, c: Condition) -> Tensor:
        """The network's own embedding of noise level and class, before the last activation: (B, channels)."""
        raise NotImplementedError

    def time_features(self) -> PlacedFeatures:
        return PlacedFeatures([self], "map_noise")

    def reads(self, side: int, h: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
        """Features at a resolution that the encoder has just reached, and the image (`aux`) beside them."""
        return h, aux

    def writes(self, side: int, h: Tensor, image: Tensor | None) -> Tensor | None:
        """The image so far, after the decoder's features of a resolution."""
        raise NotImplementedError

    def with_labels(self, e: Tensor, c: Condition) -> Tensor:
        """The features e (B, channels) of the noise level, to which those of the labels of augmentation are added."""
        if self.map_augment is None or c.augmentation is None:
            return e
        return e + self.map_augment(c.augmentation.to(e.dtype))

    def one_hot(self, time: Tensor, c: Condition) -> Tensor:
        """One-hot labels (B, classes); zeros for no class."""
        if c.labels is None:
            return time.new_zeros(len(time), self.classes)
        return one_hot(c.labels, self.classes + 1)[:, : self.classes].to(time.dtype)

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None = None, c: Condition = UNCONDITIONAL) -> Tensor:
        own = self.embed(time, c)
        e = silu(own if embedding is None else own + embedding)
        h = aux = x
        skips: list[Tensor] = []
        for side in self.sides:
            if side == self.sides[0]:
                h = self.enc[_name(side, "conv")](h)
            else:
                h, aux = self.reads(side, self.enc[_name(side, "down")](h, e), aux)
            skips.append(h)
            for i in range(self.num_blocks):
                h = self.enc[_name(side, f"block{i}")](h, e)
                skips.append(h)
        image: Tensor | None = None
        for side in reversed(self.sides):
            for what in ("in0", "in1") if side == self.sides[-1] else ("up",):
                h = self.dec[_name(side, what)](h, e)
            for i in range(self.num_blocks + 1):
                h = self.dec[_name(side, f"block{i}")](torch.cat([h, skips.pop()], dim=1), e)
            image = self.writes(side, h, image)
        assert image is not None
        return image


def _xavier(gain: float = 1.0) -> Init:
    return partial(nn.init.xavier_uniform_, gain=gain)


@torch.no_grad()
def _standard_normal(weight: Tensor) -> None:
    weight.copy_(torch.randn(weight.shape))  # on "meta", normal_ would load torch's compiler, for seconds


class SongUNet(_UNet):
    """DDPM++ ("positional", "standard", "standard") and NCSN++ ("fourier", "residual", "standard") of Song et al.

    encoder_type: how the downsampled image enters the encoder. "standard": only as the input; "skip": it is added to
    the features at each resolution; "residual": it is downsampled by convolutions and added, and the sum replaces it.
    decoder_type: "standard": the image is computed from the last features; "skip": as a sum over all resolutions.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,  # a setting of EDM's training; unused here
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = BOX,
    ) -> None:
        super().__init__(
            *(img_resolution, in_channels, label_dim, augment_dim, model_channels),
            *(channel_mult, channel_mult_emb, num_blocks, attn_resolutions),
        )
        self.encoder_type = _one_of("encoder_type", encoder_type, ("standard", "skip", "residual"))
        self.decoder_type = _one_of("decoder_type", decoder_type, ("standard", "skip"))
        _one_of("embedding_type", embedding_type, ("positional", "fourier"))
        init, init_last, emb = _xavier(), _xavier(1e-5), self.embedding_channels
        noise = model_channels * channel_mult_noise
        self.map_noise = Fourier(noise) if embedding_type == "fourier" else Positional(noise, inclusive=True)
        self.map_label = _linear(label_dim, noise, init) if label_dim else None
        self.map_augment = _linear(augment_dim, noise, init, bias=False) if augment_dim else None
        self.map_layer0 = _linear(noise, emb, init)
        self.map_layer1 = _linear(emb, emb, init)
        block = partial(
            Block,
            embedding_channels=emb,
            adaptive=False,
            scale=math.sqrt(0.5),
            eps=1e-6,
            dropout=dropout,
            taps=resample_filter,
            projects=True,
            init=init,
            init_last=init_last,
            init_attention=_xavier(math.sqrt(0.2)),
        )
        self._build(init, block, lambda channels: 1, attends_last=True)
        self._build_image_layers(out_channels, resample_filter, init, init_last)

    def _build_image_layers(self, out_channels: int, taps: Sequence[float], init: Init, init_last: Init) -> None:
        """Make the layers that process the image beside the features."""
        aux = self.in_channels
        for side, above in zip(self.sides[1:], self.widths, strict=False):
            if self.encoder_type == "skip":
                self.enc[_name(side, "aux_down")] = Conv(aux, aux, 0, down=True, taps=taps)
                self.enc[_name(side, "aux_skip")] = Conv(aux, above, 1, init=init)
            if self.encoder_type == "residual":
                conv = Conv(aux, above, 3, init=init, down=True, taps=taps, seamless=True)
                self.enc[_name(side, "aux_residual")] = conv
                aux = above
        for side, width in zip(self.sides, self.widths, strict=True):
            if side != self.sides[-1] and self.decoder_type == "skip":
                self.dec[_name(side, "aux_up")] = Conv(out_channels, out_channels, 0, up=True, taps=taps)
            if side == self.sides[0] or self.decoder_type == "skip":
                self.dec[_name(side, "aux_norm")] = _norm(width, 1e-6)
                self.dec[_name(side, "aux_conv")] = Conv(width, out_channels, 3, init=init_last)

    def embed(self, time: Tensor, c: Condition) -> Tensor:
        cos, sin = self.map_noise(time).chunk(2, dim=1)
        e = torch.cat([sin, cos], dim=1)  # the order of Song et al., for which the weights were trained
        if self.map_label is not None:
            e = e + self.map_label(self.one_hot(time, c) * math.sqrt(self.classes))
        return self.map_layer1(silu(self.map_layer0(self.with_labels(e, c))))

    def reads(self, side: int, h: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
        if self.encoder_type == "skip":
            aux = self.enc[_name(side, "aux_down")](aux)
            return h + self.enc[_name(side, "aux_skip")](aux), aux
        if self.encoder_type == "residual":
            h = (h + self.enc[_name(side, "aux_residual")](aux)) * math.sqrt(0.5)
            return h, h
        return h, aux

    def writes(self, side: int, h: Tensor, image: Tensor | None) -> Tensor | None:
        if side != self.sides[0] and self.decoder_type == "standard":
            return None
        added = self.dec[_name(side, "aux_conv")](silu(self.dec[_name(side, "aux_norm")](h)))
        return added if image is None else self.dec[_name(side, "aux_up")](image) + added


class DhariwalUNet(_UNet):
    """ADM of Dhariwal & Nichol: adaptive group norms, and attention with 64 channels per head."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,  # a setting of EDM's training; unused here
    ) -> None:
        super().__init__(
            *(img_resolution, in_channels, label_dim, augment_dim, model_channels),
            *(channel_mult, channel_mult_emb, num_blocks, attn_resolutions),
        )
        init, emb = partial(nn.init.kaiming_uniform_, a=math.sqrt(5)), self.embedding_channels  # +-1/sqrt(fan-in)
        self.map_noise = Positional(model_channels, inclusive=False)
        self.map_augment = _linear(augment_dim, model_channels, nn.init.zeros_, bias=False) if augment_dim else None
        self.map_layer0 = _linear(model_channels, emb, init)
        self.map_layer1 = _linear(emb, emb, init)
        self.map_label = _linear(label_dim, emb, _standard_normal, bias=False) if label_dim else None
        block = partial(
            Block,
            embedding_channels=emb,
            adaptive=True,
            scale=1.0,
            eps=1e-5,
            dropout=dropout,
            taps=BOX,
            projects=False,
            init=init,
            init_last=nn.init.zeros_,
            init_attention=init,
        )
        self._build(init, block, lambda channels: channels // 64, attends_last=False)
        self.out_norm = _norm(self.widths[0], 1e-5)
        self.out_conv = Conv(self.widths[0], out_channels, 3, init=nn.init.zeros_)

    def embed(self, time: Tensor, c: Condition) -> Tensor:
        e = self.map_layer1(silu(self.map_layer0(self.with_labels(self.map_noise(time), c))))
        return e if self.map_label is None else e + self.map_label(self.one_hot(time, c))

    def writes(self, side: int, h: Tensor, image: Tensor | None) -> Tensor | None:
        return self.out_conv(silu(self.out_norm(h))) if side == self.sides[0] else None


def _one_of(setting: str, value: str, possible: Sequence[str]) -> str:
    if value not in possible:
        raise ValueError(f"{setting} must be one of {', '.join(possible)}, got {value!r}")
    return value


NETWORKS: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
