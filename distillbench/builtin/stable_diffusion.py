"""Text-to-image teachers: what they share, and Stable Diffusion 1.5, 2.1 and pipelines with their layout.

They are read from a diffusers folder, of which only data is trusted (:mod:`.diffusers_pipelines`). Prompts are encoded
once and cached on disk. The text encoder is loaded only if the cache has no entry, or for a text that is not in it.

| part         | class                | device while students train      |
|--------------|----------------------|----------------------------------|
| unet         | UNet2DConditionModel | on the device                    |
| vae          | AutoencoderKL        | on the CPU                       |
| text_encoder | CLIPTextModel        | not loaded                       |
| tokenizer    | CLIPTokenizer        | not loaded                       |

Guidance is that of diffusers' StableDiffusionPipeline, f_0 + w (f_c - f_0), where f_0 is conditioned on the empty text.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distillbench import Denoiser, Teacher, TeacherSource, UserError, hookimpl, option
from distillbench.builtin.diffusers_pipelines import (
    Index,
    PipelineConfig,
    blank_component,
    check_component,
    find_index,
    identity,
    load_component,
    patterns_of,
    read_json,
    read_schedule,
    unread_settings,
    weights_files,
)
from distillbench.diffusion.conditioning import Conditioning, Texts
from distillbench.errors import unsupported
from distillbench.networks.diffusers_wrappers import Autoencoder, TextUNet
from distillbench.options import added_option, require_one_of, require_positive
from distillbench.storage.files import canonical_json, sha256_file
from distillbench.system.offloading import Offloaded
from distillbench.system.progress import Progress
from distillbench.teachers.diffusers_schedulers import SchedulerReading
from distillbench.teachers.encoded_prompts import EncodedPrompts, PlaceholderPrompts, encode_prompts
from distillbench.teachers.teacher import PipelineFolder, TeacherPlan

TEXT_EXTRA = "reading texts needs the library transformers: pip install 'distillbench[text]'"
DEFAULT_WIDTH = 512  # D if a text encoder's config lacks it, as in transformers

TOKENIZERS = (
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "PreTrainedTokenizerFast",
    "T5Tokenizer",
    "T5TokenizerFast",
    "TokenizersBackend",
)


# --- text encoders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextModel:
    """How a class of text encoders is used."""

    width: str  # the key of D in its config
    length: Callable[[Mapping[str, Any], Mapping[str, Any]], int]  # L, from the configs of tokenizer and encoder
    masked: Callable[[Mapping[str, Any]], bool]  # whether it gets an attention mask, from its config
    prepare: Callable[[str], str]  # preprocessing of a text


def _clip_length(tokenizer: Mapping[str, Any], encoder: Mapping[str, Any]) -> int:
    most = int(encoder.get("max_position_embeddings", 77))
    return min(int(tokenizer.get("model_max_length") or most), most)


T5_LENGTH = 77  # in DeepFloyd IF, whatever the tokenizer's config says

TEXT_MODELS = {
    "CLIPTextModel": TextModel(
        "hidden_size", _clip_length, lambda config: bool(config.get("use_attention_mask")), lambda text: text
    ),
    # IF's optional cleaning of captions from web pages (clean_caption) is not applied.
    "T5EncoderModel": TextModel(
        "d_model", lambda tokenizer, encoder: T5_LENGTH, lambda config: True, lambda text: text.lower().strip()
    ),
}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(TEXT_EXTRA) from error
    return transformers


class OffloadedOnDemand(Offloaded):
    """A module that is loaded at its first use, then offloaded to the CPU between uses, and can be unloaded."""

    def __init__(self, read: Callable[[], nn.Module], device: str) -> None:
        self.read, self.device = read, device
        self._users = 0
        self._loaded: nn.Module | None = None

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        if self._loaded is None:
            self._loaded = self.read().eval().requires_grad_(False).to("cpu")
        return self._loaded

    def _to_cpu(self) -> None:
        if self._loaded is not None:
            self._loaded.to("cpu")

    def unload(self) -> None:
        """Free its memory. The next use loads it again."""
        self._loaded = None


class TextEncoder:
    """A pipeline's tokenizer and text encoder: texts to (B,L,D), the encoder's last hidden state after its last norm.

    Each text is truncated or padded to L tokens. Weights are loaded at the first call.
    """

    def __init__(self, index: Index, variant: str, device: str, possible: tuple[str, ...]) -> None:
        index.component(("text_encoder",), list(possible))
        index.component(("tokenizer",), list(TOKENIZERS))
        self.index, self.variant = index, variant
        self.offloaded = OffloadedOnDemand(self._encoder, device)
        self.kind = TEXT_MODELS[index.components["text_encoder"]]
        self.config = index.config("text_encoder")
        self.width = int(self.config.get(self.kind.width, DEFAULT_WIDTH))
        self.length = self.kind.length(self._tokenizer_config(), self.config)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        texts = [self.kind.prepare(text) for text in texts]
        tokens = self._tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        device = self.offloaded.device
        mask = tokens.attention_mask.to(device) if self.kind.masked(self.config) else None
        with self.offloaded.on_device() as encoder:
            return encoder(tokens.input_ids.to(device), attention_mask=mask).last_hidden_state

    def check(self) -> None:
        """Raise UserError if a file of weights, the tokenizer, or the library transformers is missing."""
        if importlib.util.find_spec("transformers") is None:
            raise UserError(TEXT_EXTRA)
        check_component(self.index, "text_encoder", self.variant)
        if not self._tokenizer_files():
            raise UserError(f"teacher.path: tokenizer of {self.index.name!r} has no files")

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of everything that decides the embedding of a text."""
        how = {
            "encoder": self.index.components["text_encoder"],
            "config": {name: value for name, value in self.config.items() if name[0] != "_"},
            "tokenizer": self.index.components["tokenizer"],
            "length": self.length,
            "output": "last_hidden_state",
        }
        files = [*weights_files(self.index, "text_encoder", self.variant), *self._tokenizer_files()]
        hashes = {file.name: sha256_file(file) for file in files}
        return hashlib.sha256(canonical_json([how, hashes]).encode()).hexdigest()

    def unload(self) -> None:
        """Free the encoder's memory."""
        self.offloaded.unload()

    def _tokenizer_files(self) -> list[Path]:
        folder = self.index.folder / "tokenizer"
        return sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []

    def _tokenizer_config(self) -> dict[str, Any]:
        file = self.index.folder / "tokenizer" / "tokenizer_config.json"
        return read_json(file, self.index.name) if file.is_file() else {}

    def _encoder(self) -> Any:
        """The encoder with its weights, loaded without transformers' progress bar, which would disturb our own."""
        logging = _transformers().utils.logging
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            return load_component(self.index, "text_encoder", self.variant)
        finally:
            if shown:
                logging.enable_progress_bar()

    @functools.cached_property
    def _tokenizer(self) -> Any:
        cls = getattr(_transformers(), self.index.components["tokenizer"])
        try:
            return cls.from_pretrained(str(self.index.folder / "tokenizer"), local_files_only=True)
        except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"teacher.path: tokenizer of {self.index.name!r} cannot be used: {why}") from error


# --- text-to-image pipelines -----------------------------------------------------------------------------------------


class TextPipeline(TeacherSource):
    """A diffusers pipeline with a UNet2DConditionModel that attends to texts."""

    reads = "texts"
    encoders: ClassVar[tuple[str, ...]]  # supported classes of the text encoder
    families: ClassVar[tuple[str, ...]] = ("discrete", "flow")  # supported families of schedulers
    _unread: Sequence[str] = ()  # notes on ignored settings in the configs, set by plan()

    def notes(self) -> Sequence[str]:
        return self._unread

    def pipeline(self) -> PipelineFolder:
        return PipelineFolder(self._index(self.config.path).folder, self.config.variant)

    def _index(self, path: str, wanted: tuple[str, ...] = ()) -> Index:
        """The index of the pipeline at `path`. From the hub, the weights of the components `wanted` are fetched too."""
        patterns = ["*.json", "tokenizer/*.txt", "tokenizer/*.model"]
        patterns += patterns_of(wanted, self.config.variant) if wanted else ()
        return find_index(self.name, self.config, path, patterns)

    def _prompts(self) -> list[str]:
        if not self.dataset.prompts:
            raise UserError(
                f"teacher={self.name} makes images from texts, but dataset={self.dataset.name} has none. Possible: "
                "dataset=prompts, or images with captions"
            )
        return list(self.dataset.prompts)

    def _encoded(self, encoder: TextEncoder, progress: Progress) -> EncodedPrompts:
        """The embeddings of the dataset's prompts, from the cache or computed now. Unloads the encoder."""
        cache = self.cache.parent / "prompts"
        table = encode_prompts(self._prompts(), encoder, encoder.sha256, cache, self.device, progress)
        encoder.unload()
        return table

    def _reading(self, index: Index) -> SchedulerReading:
        """How to use the network. Raises UserError if a component of the pipeline is not supported."""
        index.component(("unet",), ["UNet2DConditionModel"])
        if more := [name for name in index.components if name.startswith("text_encoder_")]:
            raise UserError(
                f"the {index.pipeline} in {index.name!r} has a {more[0]}, but teacher={self.name} supports one text "
                "encoder. Possible: pipelines with the layout of Stable Diffusion 1.5 and 2.1, or DeepFloyd IF"
            )
        if index.full_config("unet")["time_cond_proj_dim"] is not None:
            raise UserError(
                f"the {index.pipeline} in {index.name!r} takes the guidance weight as an input (time_cond_proj_dim): "
                "it is a distilled student, not a teacher"
            )
        reading, _ = read_schedule(index)
        if reading.family not in self.families:
            raise unsupported("family of schedulers", reading.family, self.families, f" for teacher={self.name}")
        return reading

    def _check_width(self, index: Index, width: int) -> None:
        """Raise UserError unless the network takes text embeddings of `width`."""
        config = index.full_config("unet")
        wanted = config["encoder_hid_dim"] or config["cross_attention_dim"]
        if isinstance(wanted, int) and wanted != width:
            raise UserError(
                f"teacher.path: the network in {index.name!r} takes text embeddings of width {wanted}, its text "
                f"encoder has width {width}"
            )

    @abstractmethod
    def plan(self) -> TeacherPlan: ...

    def _provenance(self, index: Index, reading: SchedulerReading) -> dict[str, Any]:
        size = index.full_config("unet")["sample_size"]
        return {
            "pipeline": index.pipeline,
            "path": index.name,
            "revision": self.config.revision,
            "variant": self.config.variant,
            "reading": reading.plain,
            "sample_size": size,
            "resolution": list(self.dataset.shape[1:]),
        }


# --- Stable Diffusion ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Latents:
    """A pipeline's latents and text encoder, as its configs describe them."""

    reading: SchedulerReading
    encoder: TextEncoder
    shape: tuple[int, int, int]  # C,h,w


class StableDiffusion(TextPipeline):
    """A latent text-to-image pipeline with the layout of Stable Diffusion 1.5 and 2.1."""

    name = "stable_diffusion"
    encoders = ("CLIPTextModel",)

    @dataclass
    class Config(PipelineConfig):
        decode_batch: int = option(4, "batch size of the autoencoder")
        latents: str = added_option("mean", "of training images: mean of the autoencoder's posterior, or drawn from it")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "decode_batch")
            require_one_of(self, "latents", ("mean", "drawn"))

    def plan(self) -> TeacherPlan:
        index = self._index(self.config.path)
        latents = self._latents(index)
        self._unread = unread_settings(index, ("unet", "vae"))
        if Path(self.config.path).is_dir():
            for component in ("unet", "vae"):
                self._unread = [*self._unread, *check_component(index, component, self.config.variant)]
            latents.encoder.check()
        return TeacherPlan(index.name)

    def untrained(self) -> Teacher:
        """A teacher with random weights. Decoding returns grey images, and no text encoder is loaded."""
        index = self._index(self.config.path)
        latents = self._latents(index)
        shape = latents.shape
        return self._teacher(
            index,
            latents,
            blank_component(index, "unet"),
            "untrained",
            PlaceholderPrompts(latents.encoder.length, latents.encoder.width),
            decode=lambda z: z.new_zeros(len(z), *self.dataset.shape),
            to_latents=lambda x: x.new_zeros(len(x), *shape),
        )

    def load(self, progress: Progress) -> Teacher:
        index = self._index(self.config.path, ("unet", "vae", "text_encoder"))
        latents, variant = self._latents(index), self.config.variant
        encoder, reading = latents.encoder, latents.reading
        texts = self._encoded(encoder, progress)
        autoencoder = Autoencoder(load_component(index, "vae", variant), self.device)
        weights = identity(index, ["unet", "vae"], variant, reading)
        teacher = self._teacher(
            index,
            latents,
            load_component(index, "unet", variant),
            hashlib.sha256(f"{weights} {encoder.sha256}".encode()).hexdigest(),
            texts,
            decode=self._in_slices(autoencoder, autoencoder.decode),
            to_latents=self._in_slices(autoencoder, autoencoder.encode),
        )
        drawn = self._in_slices(autoencoder, autoencoder.posterior) if self.config.latents == "drawn" else None
        both = autoencoder.offloaded, encoder.offloaded
        return dataclasses.replace(teacher, encode=encoder, offloaded=both, to_posterior=drawn)

    def _in_slices(self, autoencoder: Autoencoder, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`call` in batches of `decode_batch`: an image of 512x512 takes gigabytes."""
        size = self.config.decode_batch

        def sliced(x: Tensor) -> Tensor:
            with autoencoder.offloaded.on_device():
                return torch.cat([call(part) for part in x.split(size)])

        return sliced

    def _latents(self, index: Index) -> _Latents:
        """Read the configs. Raises UserError if they do not fit each other or the dataset."""
        self._prompts()
        reading, encoder = self._reading(index), TextEncoder(index, self.config.variant, self.device, self.encoders)
        index.component(("vae",), ["AutoencoderKL"])
        unet, vae = index.full_config("unet"), index.full_config("vae")
        self._check_width(index, encoder.width)
        channels = vae["latent_channels"]
        if (unet["in_channels"], unet["out_channels"]) != (channels, channels):
            raise UserError(
                f"teacher.path: the network in {index.name!r} has {unet['in_channels']} input and "
                f"{unet['out_channels']} output channels, its latents have {channels}: it edits or upscales images "
                "and does not make them from texts only"
            )
        _, *factors = Autoencoder.image_shape(vae, (channels, 1, 1))
        _, height, width = self.dataset.shape
        if height % factors[0] or width % factors[1]:
            raise UserError(
                f"dataset.resolution must be a multiple of {factors[0]} for the autoencoder of {index.name!r}, "
                f"got {height}x{width}"
            )
        shape = (channels, height // factors[0], width // factors[1])
        if (made := Autoencoder.image_shape(vae, shape)) != tuple(self.dataset.shape):
            raise UserError(
                f"the teacher does not fit the dataset: its images are (C,H,W) = {made}, the dataset's are "
                f"{tuple(self.dataset.shape)}"
            )
        return _Latents(reading, encoder, shape)

    def _teacher(
        self,
        index: Index,
        latents: _Latents,
        unet: Any,
        sha256: str,
        texts: Texts,
        decode: Callable[[Tensor], Tensor],
        to_latents: Callable[[Tensor], Tensor],
    ) -> Teacher:
        reading = latents.reading
        return Teacher(
            self.name,
            Denoiser(TextUNet(unet, reading.call), reading.schedule, reading.prediction).to(self.device),
            latents.shape,
            sha256,
            self._provenance(index, reading) | {"latents": list(latents.shape)},
            Conditioning(self.conditioning.classes, texts=texts),
            blank=lambda: TextUNet(blank_component(index, "unet"), reading.call),
            decode=decode,
            to_latents=to_latents,
            decoded=self.dataset.shape,
            clip=reading.clip,
        )


@hookimpl(api=2)
def register_teachers(register) -> None:
    register(StableDiffusion)
