"""A student's one step, fitted to a recorded call and folded into the diffusers network that computes it.

Whatever the method, a one-step student is a map x_0 = sample(eps, c) around one evaluation of its network. If it is
affine in the noise and the network's output, it can be exported:

    x = k eps,     out = network(x, time, embedding, c),     x_0 = a eps + b out

with the same time and embedding for every image. The embedding of time is then one vector, which becomes the bias of
the layer that computes it, and the rest is one step of DDIM with a suitable alpha:

    epsilon:       x_0 = (eps - sigma out') / alpha = a eps + b out    for alpha = 1/a, out' = -(b alpha / sigma) out
    v_prediction:  x_0 = alpha eps - sigma out'     = a eps + b out    for alpha = a,   out' = -(b / sigma) out

| symbol     | meaning                                                      | shape         |
|------------|--------------------------------------------------------------|---------------|
| eps        | noise                                                        | (B,C,H,W)     |
| x, out     | input and output of our network                              | (B,C,H,W)     |
| F          | the folded diffusers network, whose input is k eps + q       | (B,C,H,W)     |
| time       | the time that our network is given                           | (1,)          |
| embedding  | its further input: a second time, guidance                   | (1,D) or None |
| v          | the embedding of both                                        | (D,)          |
| a, b, k, q | x_0 = a eps + b F(k eps + q)                                 | float         |
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distillbench.diffusion.conditioning import Condition
from distillbench.diffusion.denoiser import CountedNetwork
from distillbench.errors import UserError
from distillbench.export.bundled_pipeline import TIMESTEP
from distillbench.networks.architectures import DiT, OfDiffusers, ResidualMLP, UNet
from distillbench.networks.diffusers_wrappers import DiffusersNetwork, PixelUNet, TextUNet
from distillbench.networks.diffusers_wrappers import DiT as WrappedDiT
from distillbench.networks.edm import DhariwalUNet, SongUNet
from distillbench.networks.time_features import PolynomialFeatures
from distillbench.training.method import Method

ALLOWED = 1e-5  # largest residual of a fit, relative to its terms
NOTHING = 1e-6  # coefficients of terms of size 1 below this are 0
UNIT = 2.0**-24  # 1 - beta of a float32 beta is a multiple of this
CANDIDATES = 4096  # pairs of betas to try
PROJECTION = "time_embedding.cond_proj.weight"  # of the guidance weight, which becomes part of the fixed embedding
LEAST_BETA = 2.0**-20  # 1 - alpha^2 for alpha = 1, which is then 5e-7 too small


# --- recording -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordedStep:
    """A recorded step of a student: the inputs and outputs of its sampler and its network."""

    network: nn.Module
    eps: Tensor
    x: Tensor
    time: Tensor
    embedding: Tensor | None
    c: Condition
    out: Tensor
    x_0: Tensor


def record_step(method: Method, eps: Tensor, c: Condition) -> RecordedStep:
    """Record the student's one step from `eps`. Raises UserError unless it is one evaluation at one time for all."""
    calls: list[tuple[nn.Module, tuple[Any, ...], Tensor]] = []

    def noise(k: int) -> Tensor:
        if k:
            raise _unsupported("it draws further noise")
        return eps

    def record(network: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        calls.append((network, given, out))

    networks = {id(m.network): m.network for m in method.modules() if isinstance(m, CountedNetwork)}
    with ExitStack() as hooks, torch.no_grad():
        for network in networks.values():
            hooks.callback(network.register_forward_hook(record).remove)
        x_0 = method.sample(noise, 1, c)
    if len(calls) != 1:
        raise _unsupported(f"it evaluates its network {len(calls)} times")
    network, (x, time, embedding, condition), out = calls[0]
    if x.shape != eps.shape or out.shape != eps.shape or x_0.shape != eps.shape:
        raise _unsupported(
            f"noise of shape {tuple(eps.shape)} becomes x of {tuple(x.shape)}, x_0 of {tuple(x_0.shape)}"
        )
    if not torch.isfinite(x_0).all():
        raise UserError("the student's samples are not finite: it cannot be exported")
    if bool((time != time[0]).any()):
        raise _unsupported("the time differs from image to image")
    if embedding is not None and (embedding - embedding[:1]).abs().max() > ALLOWED * embedding.abs().max():
        raise _unsupported("its embedding beside the time differs from image to image")
    return RecordedStep(network, eps, x, time[:1], None if embedding is None else embedding[:1], condition, out, x_0)


def _unsupported(why: str) -> UserError:
    return UserError(
        f"the student's one step is not of the form x_0 = a eps + b network(k eps), which is what is exported: {why}"
    )


# --- fitting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneStep:
    """x_0 = a eps + b F(k eps + q)."""

    a: float
    b: float
    k: float
    q: float


def fit(seen: RecordedStep, core: Core) -> OneStep:
    """The coefficients of the step with `core` as F, by least squares. Raises UserError if it has another form."""
    x = core.input(seen.x)
    with torch.no_grad():
        out = core(x, seen.c)
    k, q = _coefficients(x, seen.eps, torch.ones_like(x), "the network's input is not k eps")
    a, b = _coefficients(seen.x_0, seen.eps, out, "x_0 is not a eps + b network(k eps)")
    return OneStep(a, b, k, 0.0 if abs(q) < NOTHING * max(1.0, abs(k)) else q)


def _coefficients(y: Tensor, u: Tensor, v: Tensor, otherwise: str) -> tuple[float, float]:
    """(p, r) of y = p u + r v. Raises UserError with the text `otherwise` if the residual is not small."""
    wanted, terms = y.double().flatten(), torch.stack([u.double().flatten(), v.double().flatten()], dim=1)
    sizes = terms.norm(dim=0)
    columns = terms / sizes.clamp(min=torch.finfo(torch.float64).tiny)
    solution = torch.linalg.lstsq(columns.cpu(), wanted.cpu()[:, None], driver="gelsd").solution[:, 0]
    left = (wanted.cpu() - columns.cpu() @ solution).norm() / solution.abs().sum().clamp(min=wanted.norm().cpu())
    if not left <= ALLOWED:  # true for nan too
        raise _unsupported(f"{otherwise}, up to {float(left):.1e} of it")
    p, r = (float(s) / float(size) if size else 0.0 for s, size in zip(solution, sizes, strict=True))
    return p, r


# --- one step of DDIM ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ddim:
    """The step as one of diffusers' DDIMScheduler: the factor of the network's output, and the scheduler's settings."""

    gain: float
    settings: dict[str, Any]


def ddim_of(step: OneStep) -> Ddim | None:
    """The step with k = 1 and q = 0 as one of DDIM; None if a is negative, which is impossible in DDIM.

    abar = (1 - beta_0)(1 - beta_1) is chosen among pairs of float32 numbers, as a single one is too coarse for a small
    abar: 1 - beta is a multiple of 6e-8.
    """
    a = 0.0 if abs(step.a) < NOTHING else step.a
    if a < 0:
        return None
    prediction = "v_prediction" if a <= 1 else "epsilon"
    betas, abar = _betas(min(a**2 if a <= 1 else a**-2, 1 - LEAST_BETA))
    sigma = math.sqrt(1 - abar)
    gain = -step.b / sigma if a <= 1 else -step.b * math.sqrt(abar) / sigma
    settings = {
        "num_train_timesteps": len(betas),
        "trained_betas": betas,
        "steps_offset": 1,  # one step is at timestep 1, and more steps raise, as they find no beta
        "timestep_spacing": "leading",
        "prediction_type": prediction,
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    return Ddim(gain, settings)


def _betas(abar: float) -> tuple[list[float], float]:
    """(beta_0, beta_1) whose (1 - beta_0)(1 - beta_1) in float32 is closest to `abar`, and that product."""
    first = round(math.sqrt(abar) / UNIT) + np.arange(CANDIDATES) - CANDIDATES // 2
    first = first[(first >= 1) & (first * UNIT <= 1) & (first * UNIT >= abar)].astype(np.float64)
    if not len(first):
        first = np.array([1.0])
    second = np.round(abar / (first * UNIT) / UNIT).clip(0, 1 / UNIT)
    products = ((first * UNIT).astype(np.float32) * (second * UNIT).astype(np.float32)).astype(np.float64)
    best = int(np.abs(products - abar).argmin())
    return [float(1 - first[best] * UNIT), float(1 - second[best] * UNIT)], float(products[best])


# --- folding ---------------------------------------------------------------------------------------------------------


class Core(ABC):
    """F: a network with its time and embedding built in. `input` maps x to its input; `channels` are the images'."""

    def __init__(self, module: Any, input: Callable[[Tensor], Tensor], channels: int) -> None:
        self.module, self.input, self.channels = module.eval(), input, channels

    @abstractmethod
    def __call__(self, x: Tensor, c: Condition) -> Tensor:
        """F(x, c), (B,C,H,W)."""

    def scale(self, k: float, q: float, gain: float) -> bool:
        """Change the first and last layer so that F becomes gain F(k x + q); False if that is not possible."""
        return False


class OwnCore(Core):
    """A network of this package; time and embedding are arguments of every call."""

    def __init__(self, seen: RecordedStep) -> None:
        super().__init__(seen.network, lambda x: x, seen.eps.shape[1])
        self.time = seen.time
        nothing = seen.x.new_zeros(1, self.module.embedding_channels)
        self.embedding = nothing if seen.embedding is None else seen.embedding

    def __call__(self, x: Tensor, c: Condition) -> Tensor:
        size = len(x)
        return self.module(x, self.time.expand(size), self.embedding.expand(size, -1), c)


class UNetCore(Core):
    """A UNet2DModel. With skip paths of pixels its first and last layer cannot scale everything."""

    def __call__(self, x: Tensor, c: Condition) -> Tensor:
        labels = c.labels if self.module.config.num_class_embeds else None
        return self.module(x, TIMESTEP, class_labels=labels).sample

    def scale(self, k: float, q: float, gain: float) -> bool:
        config = self.module.config
        if config.center_input_sample:  # the module computes 2 x - 1 itself
            k, q = 2 * k, 2 * q - 1
        skips = any("Skip" in kind for kind in (*config.down_block_types, *config.up_block_types))
        if skips or abs(q) > NOTHING * max(1.0, abs(k)):
            return False
        self.module.register_to_config(center_input_sample=False)
        _scale_convolutions(self.module, self.channels, k, gain)
        return True


class TextCore(Core):
    """A UNet2DConditionModel of texts."""

    def __call__(self, x: Tensor, c: Condition) -> Tensor:
        text = None if c.text is None else c.text.to(x.dtype)
        return self.module(x, TIMESTEP, encoder_hidden_states=text).sample

    def scale(self, k: float, q: float, gain: float) -> bool:
        if q or self.module.config.center_input_sample:
            return False
        _scale_convolutions(self.module, self.channels, k, gain)
        return True


class TransformerCore(Core):
    """A DiTTransformer2DModel; an unconditional one always gets class 0.

    Channels of a variance are not removed, because DiTPipeline drops them.
    """

    def __call__(self, x: Tensor, c: Condition) -> Tensor:
        timestep = torch.full((len(x),), TIMESTEP, device=x.device)
        labels = torch.zeros_like(timestep) if c.labels is None else c.labels
        return self.module(x, timestep=timestep, class_labels=labels).sample[:, : self.channels]

    def scale(self, k: float, q: float, gain: float) -> bool:
        if q:
            return False
        last, channels = self.module.proj_out_2, self.module.out_channels
        image_rows = torch.arange(last.out_features) % channels < self.channels  # rows are (p, q, channel) of a patch
        _multiply(self.module.pos_embed.proj.weight, k)
        _multiply(last.weight, gain, image_rows)
        _multiply(last.bias, gain, image_rows)
        return True


def _scale_convolutions(unet: Any, channels: int, k: float, gain: float) -> None:
    """Multiply the weights of the noise's channels in the first convolution by k, and the last convolution by gain."""
    weight = unet.conv_in.weight
    noise = torch.arange(weight.shape[1]) < channels
    _multiply(weight, k, (slice(None), noise))
    _multiply(unet.conv_out.weight, gain)
    _multiply(unet.conv_out.bias, gain)


@torch.no_grad()
def _multiply(weight: Tensor, factor: float, where: Any = ...) -> None:
    """Multiply by `factor` in place, rounded once."""
    weight[where] = (weight[where].double() * factor).to(weight.dtype)


def _rebuilt(unet: Any, channels: int, more: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """A copy of a UNet2D(Condition)Model with `channels` output channels; `more` changes its config."""
    config = {name: value for name, value in unet.config.items() if name[0] != "_"}
    fresh = type(unet).from_config(config | more | {"out_channels": channels})
    kept = {name: tensor.detach().cpu() for name, tensor in unet.state_dict().items() if name != PROJECTION} | weights
    for name in ("conv_out.weight", "conv_out.bias"):
        kept[name] = kept[name][:channels]
    fresh.load_state_dict(kept)
    return fresh.to(unet.dtype)


def _size(shape: torch.Size) -> int | list[int]:
    """`sample_size` of a network of images (B,C,H,W)."""
    height, width = shape[-2:]
    return height if height == width else [height, width]


@torch.no_grad()
def _fix_time(
    original: Any, features: Tensor, embedding: Tensor | None, copy: Any, projected: Tensor | None = None
) -> None:
    """Make `copy` return for every time what `original` returns for `features` and those of w, plus `embedding`."""
    v = original(features, projected)
    v = v[0] if embedding is None else v[0] + embedding[0]
    last = copy.linear_2
    if copy.post_act is not None or last.bias is None:
        raise UserError("the network's time embedding does not end in a linear layer with a bias: it cannot be folded")
    for layer in (copy.linear_1, last):
        layer.weight.zero_()
    copy.linear_1.bias.zero_()
    last.bias.copy_(v)


def _features(unet: Any, argument: Tensor) -> Tensor:
    with torch.no_grad():
        return unet.time_proj(argument).to(unet.dtype)


def _fold_own(seen: RecordedStep) -> Core:
    if any(isinstance(module, PolynomialFeatures) for module in seen.network.modules()):
        raise UserError(
            f"a {type(seen.network).__name__} with smooth features of time (networks.smooth_times) cannot be exported. "
            "Possible: unet, dit, and networks of diffusers"
        )
    return OwnCore(seen)


def _fold_unet(seen: RecordedStep) -> Core:
    """Our UNet: the embedding that it adds becomes part of the fixed one, its classes become diffusers' own."""
    network: Any = seen.network
    channels = seen.eps.shape[1]
    more: dict[str, Any] = {"class_embed_type": None, "sample_size": _size(seen.eps.shape)}
    weights = {}
    if network.classes is not None:
        weights["class_embedding.weight"] = network.classes.weight.detach().cpu()
        more["num_class_embeds"] = network.classes.num_embeddings
    unet = _rebuilt(network.unet, channels, more, weights)
    features = _features(network.unet, 1000 * seen.time)
    _fix_time(network.unet.time_embedding, features, seen.embedding, unet.time_embedding)
    return UNetCore(unet, lambda x: x, channels)


def _fold_pixel_unet(seen: RecordedStep) -> Core:
    return _fold_wrapped(seen, UNetCore)


def _fold_text_unet(seen: RecordedStep) -> Core:
    if seen.c.image is not None:
        raise UserError("students that enlarge images cannot be exported. Possible: the base stage of a cascade")
    assert isinstance(seen.network, TextUNet)
    w = seen.network.guidance_features(seen.c)
    if w is not None and (w - w[:1]).abs().any():
        raise _unsupported("its guidance weight differs from image to image")
    more = {"time_cond_proj_dim": None}
    return _fold_wrapped(seen, TextCore, more, None if w is None else w[:1].to(seen.network.wrapped.dtype))


def _fold_wrapped(
    seen: RecordedStep, core: type[Core], more: dict[str, Any] | None = None, projected: Tensor | None = None
) -> Core:
    network, channels = _wrapped(seen), seen.eps.shape[1]
    unet = _rebuilt(network.wrapped, channels, {"sample_size": _size(seen.eps.shape)} | (more or {}), {})
    features = _features(network.wrapped, network.call.argument(seen.time).to(seen.x.dtype))
    _fix_time(network.wrapped.time_embedding, features, seen.embedding, unet.time_embedding, projected)
    return core(unet, network.call.input, channels)


def _fold_transformer(seen: RecordedStep) -> Core:
    network = _wrapped(seen)
    whole = network.wrapped
    fresh = type(whole).from_config({name: value for name, value in whole.config.items() if name[0] != "_"})
    fresh.load_state_dict(whole.state_dict())
    fresh = fresh.to(whole.dtype)
    argument = network.call.argument(seen.time).to(seen.x.dtype)
    for old, new in zip(whole.transformer_blocks, fresh.transformer_blocks, strict=True):
        features = old.norm1.emb.time_proj(argument).to(whole.dtype)
        _fix_time(old.norm1.emb.timestep_embedder, features, seen.embedding, new.norm1.emb.timestep_embedder)
    return TransformerCore(fresh, network.call.input, seen.eps.shape[1])


def _fold_inner(seen: RecordedStep) -> Core:
    """A network that wraps a known one and passes its inputs on."""
    network: Any = seen.network
    return fold(dataclasses.replace(seen, network=network.inner))


def _wrapped(seen: RecordedStep) -> DiffusersNetwork:
    assert isinstance(seen.network, DiffusersNetwork)
    return seen.network


FOLDS: dict[type[nn.Module], Callable[[RecordedStep], Core]] = {
    UNet: _fold_unet,
    PixelUNet: _fold_pixel_unet,
    TextUNet: _fold_text_unet,
    WrappedDiT: _fold_transformer,
    OfDiffusers: _fold_inner,
    DiT: _fold_inner,
    ResidualMLP: _fold_own,
    SongUNet: _fold_own,
    DhariwalUNet: _fold_own,
}


def fold(seen: RecordedStep) -> Core:
    """The folded network of a step. Raises UserError for networks that are not in FOLDS."""
    network = type(seen.network)
    if network not in FOLDS:
        names = ", ".join(sorted({cls.__name__ for cls in FOLDS}))
        raise UserError(f"cannot export a student with a network of class {network.__name__}. Possible: {names}")
    return FOLDS[network](seen)
