"""The pipelines that a folded student becomes.

| network               | of a student that asks for | pipeline                                                      |
|-----------------------|----------------------------|---------------------------------------------------------------|
| UNet2DModel           | nothing                    | DDIMPipeline; of latents of a VQModel LDMPipeline             |
| DiTTransformer2DModel | classes                    | DiTPipeline                                                   |
| UNet2DConditionModel  | texts                      | StableDiffusionPipeline; of pixels IFPipeline                 |
| any but the last      | nothing, classes           | the bundled one (bundled_pipeline.py), where none above fits  |
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import torch

from distillbench import bundled_pipeline
from distillbench.diffusers_networks import AUTOENCODERS
from distillbench.errors import UserError, unknown
from distillbench.export_bundle import FILE, OneStepNetwork, save_network
from distillbench.export_fold import Core, OneStep, OwnCore, TextCore, TransformerCore, UNetCore, ddim_of
from distillbench.teachers import Teacher, TeacherSource

diffusers: Any = untyped_diffusers
EXAMPLES = 8  # images that a form asks for
INDEX = "model_index.json"

# What is taken along from a teacher's pipeline, and the library of each class.
TOKENIZERS = (
    *("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"),
    *("PreTrainedTokenizerFast", "TokenizersBackend"),
)
COMPONENTS = {
    **dict.fromkeys(AUTOENCODERS, "diffusers"),
    **dict.fromkeys(("CLIPTextModel", "T5EncoderModel", *TOKENIZERS), "transformers"),
}


@dataclass(frozen=True)
class Form:
    """A pipeline: how it is written, read and asked."""

    pipeline: str
    write: Callable[[Path], None]
    loading: dict[str, Any]  # beside the folder, for DiffusionPipeline.from_pretrained
    asks: dict[str, Any]  # for images of a condition, as examples in the card show them
    fold: str  # what was done to the network, for the card


@dataclass(frozen=True)
class Parts:
    """The components of the teacher's pipeline, which is a folder of diffusers' format."""

    folder: Path
    index: dict[str, Any]  # its model_index.json
    variant: str  # of the weights

    def kind(self, name: str) -> str:
        """The class of a component. Raises UserError where there is none, or one that is not taken along."""
        found = self.index.get(name)
        kind = str(found[1]) if isinstance(found, list) and len(found) == 2 else "none"
        if kind not in COMPONENTS:
            raise unknown("class", kind, COMPONENTS, f" as {name} of the teacher's pipeline")
        return kind

    def load(self, name: str) -> Any:
        """A component, with its weights in float32 where it has any."""
        kind = self.kind(name)
        cls = getattr(importlib.import_module(COMPONENTS[kind]), kind)
        settings: dict[str, Any] = {"local_files_only": True}
        if kind in TOKENIZERS:
            return cls.from_pretrained(str(self.folder / name), **settings)
        settings |= {"variant": self.variant} if self.variant else {}
        settings |= {"low_cpu_mem_usage": False} if kind in AUTOENCODERS else {}
        return cls.from_pretrained(str(self.folder / name), use_safetensors=True, **settings).to(torch.float32)

    def decoder(self) -> str:
        """What the pipeline calls its autoencoder."""
        return "vqvae" if "vqvae" in self.index else "vae"


def parts_of(source: TeacherSource) -> Parts | None:
    """Those of the pipeline that a teacher is read from; None where it is read from none."""
    pipeline = source.pipeline()
    if pipeline is None:
        return None
    return Parts(pipeline.folder, json.loads((pipeline.folder / INDEX).read_text(encoding="utf-8")), pipeline.variant)


def form_of(
    core: Core, step: OneStep, teacher: Teacher, parts: Parts | None, labels: list[int], prompts: list[str]
) -> Form:
    """The pipeline for a step; `labels` or `prompts` are what is asked of it. Scales the network of `core`."""
    if teacher.decode is not None and parts is None:
        raise UserError(f"teacher={teacher.name} decodes latents by what diffusers cannot read: no way to export it")
    ddim = ddim_of(step)
    fitted = _bundles if ddim is None else FORMS[type(core)]
    scheduler = None if ddim is None else diffusers.DDIMScheduler(**ddim.settings)
    return fitted(Asked(core, step, scheduler, ddim.gain if ddim else 0.0, teacher, parts, labels, prompts))


@dataclass(frozen=True)
class Asked:
    """What forms are made of."""

    core: Core
    step: OneStep
    scheduler: Any
    gain: float
    teacher: Teacher
    parts: Parts | None
    labels: list[int]
    prompts: list[str]

    def scaled(self) -> bool:
        """Fold k and the gain into the network; False where it cannot take them."""
        return self.core.scale(self.step.k, self.step.q, self.gain)


def _told(asked: Asked, scaled: bool) -> str:
    """What was done to the network, in three sentences."""
    step, own = asked.step, isinstance(asked.core, OwnCore)
    embedding = "stands beside its weights" if own else "became the bias of the layer that embeds the time"
    rest = "a, b, k and q are in model_index.json, and the bundled pipeline computes the sum."
    if scaled:
        rest = (
            "k became part of the first layer's weights, and a DDIMScheduler for one step, of prediction_type "
            f"{asked.scheduler.config.prediction_type}, gives the sum once the last layer is multiplied by "
            f"{asked.gain:.6g}."
        )
    return (
        "The student's one step is x_0 = a eps + b F(k eps + q), F its network at one time and with one embedding for "
        f"all images, here with a = {step.a:.6g}, b = {step.b:.6g}, k = {step.k:.6g} and q = {step.q:.6g}. The "
        f"embedding {embedding}, so that the network answers alike to every timestep. {rest}"
    )


def _unconditional(asked: Asked) -> Form:
    """Of a UNet2DModel."""
    config, decoded = asked.core.module.config, asked.teacher.decode is not None
    decoder = asked.parts.decoder() if decoded and asked.parts is not None else ""
    quantised = decoder and asked.parts is not None and asked.parts.kind(decoder) == "VQModel"
    fits = not config.num_class_embeds and (not decoded or (quantised and isinstance(config.sample_size, int)))
    if not fits or not asked.scaled():
        return _bundles(asked)
    unet, scheduler, parts = asked.core.module, asked.scheduler, asked.parts
    asks = {"batch_size": EXAMPLES, "num_inference_steps": 1}

    def write(folder: Path) -> None:
        if parts is None or not decoded:
            diffusers.DDIMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
        else:
            vqvae = parts.load(decoder)
            diffusers.LDMPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler).save_pretrained(folder)

    return Form("LDMPipeline" if decoded else "DDIMPipeline", write, {}, asks, _told(asked, True))


def _of_classes(asked: Asked) -> Form:
    """Of a DiTTransformer2DModel."""
    parts = asked.parts
    if parts is None or asked.teacher.decode is None or not asked.labels or not asked.scaled():
        return _bundles(asked)

    def write(folder: Path) -> None:
        names = parts.index.get("id2label")
        names = names if isinstance(names, dict) else None
        vae = parts.load(parts.decoder())
        pipeline = diffusers.DiTPipeline(asked.core.module, vae, asked.scheduler, names)
        if names:
            pipeline.register_to_config(id2label=names)
        pipeline.save_pretrained(folder)

    asks = {"class_labels": asked.labels, "num_inference_steps": 1, "guidance_scale": 1.0}
    return Form("DiTPipeline", write, {}, asks, _told(asked, True))


def _of_texts(asked: Asked) -> Form:
    """Of a UNet2DConditionModel."""
    parts = asked.parts
    if parts is None or asked.teacher.conditioning.small is not None:
        raise UserError("students of texts are exported where they make images from texts alone; upscalers are not")
    if not asked.scaled():
        raise UserError("the student's one step is not one of DDIM, which is all that pipelines of texts take")
    asks = {"prompt": asked.prompts, "num_inference_steps": 1, "guidance_scale": 1.0}

    def write_pixels(folder: Path) -> None:
        settings = dict(asked.scheduler.config) | {"variance_type": "fixed_small"}  # IFPipeline asks what it is
        diffusers.IFPipeline(
            text_encoder=parts.load("text_encoder"),
            tokenizer=parts.load("tokenizer"),
            unet=_with_variance(asked.core.module, asked.core.channels),
            scheduler=diffusers.DDIMScheduler.from_config(settings),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)

    if asked.teacher.decode is None:
        return Form("IFPipeline", write_pixels, {}, asks, _told(asked, True))

    def write(folder: Path) -> None:
        diffusers.StableDiffusionPipeline(
            vae=parts.load("vae"),
            text_encoder=parts.load("text_encoder"),
            tokenizer=parts.load("tokenizer"),
            unet=asked.core.module,
            scheduler=asked.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)

    return Form("StableDiffusionPipeline", write, {}, asks, _told(asked, True))


def _with_variance(unet: Any, channels: int) -> Any:
    """The same network with further channels of zeros, where IFPipeline looks for a variance that it then drops."""
    config = {name: value for name, value in unet.config.items() if name[0] != "_"}
    wide, weights = type(unet).from_config(config | {"out_channels": 2 * channels}), dict(unet.state_dict())
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])])
    wide.load_state_dict(weights)
    return wide.eval()


def _bundles(asked: Asked) -> Form:
    """With the bundled pipeline: any network but those of texts, as it is."""
    core, step, teacher, parts = asked.core, asked.step, asked.teacher, asked.parts
    if isinstance(core, TextCore):
        raise UserError(f"the student's one step, {step}, is not one of DDIM, which is all that it can be with texts")
    labels = asked.labels
    name = bundled_pipeline.OneStepPipeline.__name__

    def write(folder: Path) -> None:
        source = Path(inspect.getfile(bundled_pipeline))
        index: dict[str, Any] = {"_class_name": ["pipeline", name], "_diffusers_version": diffusers.__version__}
        if isinstance(core, OwnCore):
            save_network(core, teacher.shape, folder / "network")
            index["network"] = [FILE, OneStepNetwork.__name__]
        else:
            core.module.save_pretrained(folder / "network")
            index["network"] = ["diffusers", type(core.module).__name__]
        if teacher.decode is not None and parts is not None:
            decoder = parts.load(parts.decoder())
            decoder.save_pretrained(folder / "vae")
            index["vae"] = ["diffusers", type(decoder).__name__]
        classes = teacher.conditioning.classes
        index |= dataclasses.asdict(step) | {"shape": list(teacher.shape), "classes": classes}
        if isinstance(core, TransformerCore) and not classes:
            index["label"] = 0
        (folder / "pipeline.py").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    asks = {"class_labels": labels} if labels else {"batch_size": EXAMPLES}
    return Form(name, write, {"trust_remote_code": True}, asks, _told(asked, False))


FORMS: dict[type[Core], Callable[[Asked], Form]] = {
    UNetCore: _unconditional,
    TransformerCore: _of_classes,
    TextCore: _of_texts,
    OwnCore: _bundles,
}
