"""Networks of diffusers, wrapped so that they are called as ``network(x, time, embedding, c)``.

The wrapped network is an attribute, named `component` as in diffusers' pipelines; its keys have that prefix and are
otherwise those of diffusers, which can load what ``network.wrapped.save_pretrained(folder)`` writes.
:class:`distillbench.networks.diffusers_calls.Call` converts inputs and outputs. If a network also predicts a variance
(twice as many output channels as input channels), that half of its output is dropped.

`embedding` is added to the embedding of time: the forward of its module is overridden during one call.

:func:`project_guidance` makes the guidance weight w an input of a UNet2DConditionModel, in diffusers' own way.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.embeddings import PlacedFeatures, TimedNetwork
from distillbench.errors import UserError, unsupported
from distillbench.networks.diffusers_calls import Call
from distillbench.networks.forward_overrides import adding, overridden
from distillbench.system.offloading import Offloaded

__all__ = ["project_guidance"]

GUIDANCE_CHANNELS = 256  # of the features of w: --unet_time_cond_proj_dim of diffusers' training of LCM


def added(modules: list[nn.Module], embedding: Tensor | None) -> AbstractContextManager[None]:
    """In the block `embedding` (B,D) is added to the output of each of `modules`."""
    return overridden({} if embedding is None else {module: adding(module, embedding) for module in modules})


class DiffusersNetwork(TimedNetwork):
    """A network of diffusers; `call` converts its inputs and outputs."""

    component: ClassVar[str]
    embedding_channels: int

    def __init__(self, network: Any, call: Call) -> None:
        super().__init__()
        self.add_module(self.component, network)
        self.call = call

    @property
    def wrapped(self) -> Any:
        """diffusers' own module."""
        return self.get_submodule(self.component)

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None = None, c: Condition = UNCONDITIONAL) -> Tensor:
        argument = self.call.argument(time).to(x.dtype)
        with added(self._time_embeddings(), embedding):
            out = self._evaluate(self.call.input(x), argument, c)
        return self.call.output(out[:, : x.shape[1]], x, time)

    @abstractmethod
    def _time_embeddings(self) -> list[nn.Module]:
        """The modules whose output is the embedding of time."""

    @abstractmethod
    def _evaluate(self, x: Tensor, argument: Tensor, c: Condition) -> Tensor:
        """The output of diffusers' network at its x (B,C,H,W) and its time (B,)."""

    @classmethod
    @abstractmethod
    def serves(cls, config: Mapping[str, Any]) -> dict[int, bool]:
        """The possible numbers of classes of a network with this config, each with whether guidance is possible."""


class PixelUNet(DiffusersNetwork):
    """A UNet2DModel, class-conditional if it has a class embedding, whose row after the last class is for no class."""

    component = "unet"

    def __init__(self, unet: Any, call: Call) -> None:
        super().__init__(unet, call)
        config = unet.config
        _refuse(config, "time_embedding_type", ("positional", "fourier"))
        _refuse(config, "class_embed_type", (None,))
        self.embedding_channels = unet.time_embedding.linear_2.out_features
        self.conditional = config.num_class_embeds is not None
        if config.time_embedding_type == "fourier":
            _keep_frozen(unet.time_proj, "weight")

    def _time_embeddings(self) -> list[nn.Module]:
        return [self.wrapped.time_embedding]

    def time_features(self) -> PlacedFeatures:
        fourier = self.wrapped.config.time_embedding_type == "fourier"  # of the logarithm, as diffusers makes them
        return PlacedFeatures([self.wrapped], "time_proj", self.call.argument, logarithmic=fourier)

    def _evaluate(self, x: Tensor, argument: Tensor, c: Condition) -> Tensor:
        return self.wrapped(x, argument, class_labels=c.labels if self.conditional else None).sample

    @classmethod
    def serves(cls, config: Mapping[str, Any]) -> dict[int, bool]:
        rows = config.get("num_class_embeds")
        return {rows - 1: True, rows: False} if rows else {0: False}


class TextUNet(DiffusersNetwork):
    """A UNet2DConditionModel: it attends to c.text.

    An upscaler also gets c.image as further channels of its input, enlarged to the size of x where it is smaller
    (bilinear, align_corners). `noise_level` is the noise level of c.image, another input of the upscaler: an index
    of its schedule (DeepFloyd IF's class label). c.image contains that noise already.

    After :meth:`take_guidance` it also reads c.w, where there is one.
    """

    component = "unet"

    def __init__(self, unet: Any, call: Call, noise_level: int = 0) -> None:
        super().__init__(unet, call)
        config = unet.config
        _refuse(config, "class_embed_type", (None, "timestep"))
        _refuse(config, "addition_embed_type", (None, "text"))
        _refuse(config, "encoder_hid_dim_type", (None, "text_proj"))
        self.embedding_channels = unet.time_embedding.linear_2.out_features
        self.noise_level = noise_level
        self.takes_noise_level = config.class_embed_type == "timestep"

    def take_guidance(self) -> None:
        """Give diffusers' network its input for w (``time_cond_proj_dim``), with random weights as diffusers makes it.

        W e(w) is added to the features of time, before the layers of their embedding. W is the new ``cond_proj``.
        """
        first = self.wrapped.time_embedding.linear_1
        like = {"device": first.weight.device, "dtype": first.weight.dtype}
        self.wrapped.time_embedding.cond_proj = nn.Linear(GUIDANCE_CHANNELS, first.in_features, bias=False, **like)
        self.wrapped.register_to_config(time_cond_proj_dim=GUIDANCE_CHANNELS)

    @property
    def takes_guidance(self) -> bool:
        return self.wrapped.time_embedding.cond_proj is not None

    def guidance_features(self, c: Condition) -> Tensor | None:
        """Sines and cosines of 1000 (w - 1), (B,256), as diffusers' pipelines of LCM call the network: our w is theirs
        plus 1. None where w is no input, or the condition has none.
        """
        if c.w is None or not self.takes_guidance:
            return None
        from diffusers.models.embeddings import get_timestep_embedding  # seconds to import

        return get_timestep_embedding(1000 * (c.w.flatten() - 1), GUIDANCE_CHANNELS, downscale_freq_shift=1)

    def _time_embeddings(self) -> list[nn.Module]:
        return [self.wrapped.time_embedding]

    def time_features(self) -> PlacedFeatures:
        if self.takes_noise_level:
            raise UserError(
                "the features of time of this U-Net are also those of the noise level of its small image: they cannot "
                "be made smooth. Possible: networks without class_embed_type=timestep"
            )
        return PlacedFeatures([self.wrapped], "time_proj", self.call.argument)

    def _evaluate(self, x: Tensor, argument: Tensor, c: Condition) -> Tensor:
        if c.image is not None:
            large = interpolate(c.image.to(x.dtype), x.shape[-2:], mode="bilinear", align_corners=True)
            x = torch.cat([x, large], dim=1)
        noise = torch.full((len(x),), self.noise_level, device=x.device) if self.takes_noise_level else None
        text = None if c.text is None else c.text.to(x.dtype)
        w = self.guidance_features(c)
        w = None if w is None else w.to(x.dtype)
        return self.wrapped(x, argument, encoder_hidden_states=text, class_labels=noise, timestep_cond=w).sample

    @classmethod
    def serves(cls, config: Mapping[str, Any]) -> dict[int, bool]:
        return {0: False}


class DiT(DiffusersNetwork):
    """A DiTTransformer2DModel: classes 0, ..., N - 1; row N of its class embedding is for no class.

    One of a single class also serves without classes: all images have class 0, as in exported unconditional students.
    """

    component = "transformer"

    def __init__(self, transformer: Any, call: Call) -> None:
        super().__init__(transformer, call)
        self.embedding_channels = transformer.inner_dim
        for block in transformer.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0  # labels are dropped by methods, not by the network

    def _time_embeddings(self) -> list[nn.Module]:
        return [block.norm1.emb.timestep_embedder for block in self.wrapped.transformer_blocks]

    def time_features(self) -> PlacedFeatures:
        return PlacedFeatures(
            [block.norm1.emb for block in self.wrapped.transformer_blocks], "time_proj", self.call.argument
        )

    def _evaluate(self, x: Tensor, argument: Tensor, c: Condition) -> Tensor:
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if c.labels is None else c.labels
        return self.wrapped(x, timestep=argument, class_labels=labels).sample

    @classmethod
    def serves(cls, config: Mapping[str, Any]) -> dict[int, bool]:
        classes = config["num_embeds_ada_norm"]
        return {classes: True} | ({0: False} if classes == 1 else {})


# diffusers' networks, by class.
NETWORKS: dict[str, type[DiffusersNetwork]] = {
    "UNet2DModel": PixelUNet,
    "UNet2DConditionModel": TextUNet,
    "DiTTransformer2DModel": DiT,
}


def project_guidance(denoiser: Denoiser) -> Denoiser:
    """`denoiser`, whose network now gets w in place of the embedding of w beside it; it is changed and returned.

    For a student in a method's ``__init__``: ``self.student = project_guidance(teacher.student())``. It is the form of
    latent consistency models in huggingface/diffusers (train_lcm_distill_sd_wds.py): the network is a
    UNet2DConditionModel with ``time_cond_proj_dim=256``, whose layer ``cond_proj`` has random weights at first, drawn
    from torch's global generator. So the student does not start as the teacher exactly.

    Raises UserError for other networks, for a student without w as an input, and where not all weights are trained.
    """
    network = denoiser.network
    if not isinstance(network, TextUNet):
        raise UserError(
            f"a {type(network).__name__} has no input for the guidance weight (time_cond_proj_dim). Possible: a "
            "UNet2DConditionModel of diffusers, such as Stable Diffusion's, or an embedding beside the network"
        )
    if denoiser.guidance is None:
        raise UserError("the guidance weight is an input of students only where training draws it: set guidance_range")
    if not all(weight.requires_grad for weight in network.parameters()):
        raise UserError(
            "adapters cannot hold the network's new input for the guidance weight (time_cond_proj_dim): leave "
            "student.lora_rank at 0, or use an embedding beside the network"
        )
    network.take_guidance()
    denoiser.guidance, denoiser.projects_guidance = None, True
    return denoiser


def check_classes(serves: Mapping[int, bool], classes: int, guided: bool, name: str) -> None:
    """Raise UserError unless `serves`, the possible numbers of classes of a network, has `classes` (and guidance).

    `name` is the setting named in the error.
    """
    if classes not in serves:
        wanted = f"conditional=true with {classes} classes" if classes else "conditional=false"
        known = " or ".join(str(number or "no") for number in serves)
        raise UserError(f"the teacher in {name!r} knows {known} classes and cannot serve {wanted}")
    if guided and not serves[classes]:
        raise UserError(f"the teacher in {name!r} has no embedding for no class: it cannot be guided")


def _refuse(config: Any, name: str, possible: tuple[str | None, ...]) -> None:
    """Raise UserError unless the network's setting is one of `possible`."""
    if (got := config.get(name)) not in possible:
        raise unsupported(name, str(got), map(str, possible), " in the network's config")


def _keep_frozen(module: nn.Module, name: str) -> None:
    """Turn a parameter that is never trained into a buffer with the same key: students train every parameter."""
    value = getattr(module, name).detach()
    delattr(module, name)
    module.register_buffer(name, value)


class Autoencoder:
    """Latents to images and back, by an autoencoder of diffusers, which is on the device only while it runs.

    A diffusion model's latents are scale (z - shift), z the autoencoder's own, so that their variance is about 1.
    """

    def __init__(self, module: Any, device: str) -> None:
        config = module.config
        for name in ("latents_mean", "latents_std"):
            _refuse(config, name, (None,))
        self.offloaded = Offloaded(module, device)
        self.scale, self.shift = config.scaling_factor, config.get("shift_factor") or 0.0

    @staticmethod
    def image_shape(config: Mapping[str, Any], latents: tuple[int, int, int]) -> tuple[int, int, int]:
        """C,H,W of the images of latents of this shape, by the module's full config."""
        factor = 2 ** (len(config["block_out_channels"]) - 1)  # pixels per latent along each axis
        return config["out_channels"], latents[1] * factor, latents[2] * factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B,c,h,w) to images in [-1, 1], (B,C,H,W)."""
        module: Any
        with self.offloaded.on_device() as module:
            return module.decode(latents / self.scale + self.shift).sample.clamp(-1, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to latents, (B,c,h,w): the mode of the encoder's distribution."""
        module: Any
        with self.offloaded.on_device() as module:
            return (self._mode(module.encode(images)) - self.shift) * self.scale

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to the mean and the standard deviation of their latents, (B,2c,h,w)."""
        module: Any
        with self.offloaded.on_device() as module:
            encoded = module.encode(images).latent_dist
            return torch.cat([(encoded.mean - self.shift) * self.scale, encoded.std * self.scale], dim=1)

    def _mode(self, encoded: Any) -> Tensor:
        return encoded.latent_dist.mode()


class Quantiser(Autoencoder):
    """A VQModel: its encoder returns latents, not a distribution; decoding rounds them to the code book."""

    def _mode(self, encoded: Any) -> Tensor:
        return encoded.latents


# diffusers' autoencoders, by class.
AUTOENCODERS: dict[str, type[Autoencoder]] = {"AutoencoderKL": Autoencoder, "VQModel": Quantiser}
