"""The diffusers pipelines that a folded student is written as.

| network               | conditioning               | pipeline                                                      |
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

from distillbench.errors import UserError, unknown
from distillbench.export import bundled_pipeline
from distillbench.export.bundle import FILE, OneStepNetwork, save_network
from distillbench.export.fold import Core, OneStep, OwnCore, TextCore, TransformerCore, UNetCore, ddim_of
from distillbench.networks.diffusers_wrappers import AUTOENCODERS
from distillbench.teachers.teacher import Teacher, TeacherSource

diffusers: Any = untyped_diffusers
EXAMPLES = 8  # images per call in the check and the card
INDEX = "model_index.json"

# Components that are copied from a teacher's pipeline, and the library of each class.
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
    """A pipeline: how it is written, loaded and called."""

    pipeline: str
    write: Callable[[Path], None]
    loading: dict[str, Any]  # arguments of DiffusionPipeline.from_pretrained
    asks: dict[str, Any]  # arguments of a call, as in the card's example
    fold: str  # how the network was changed, for the card


@dataclass(frozen=True)
class Parts:
    """The components of the teacher's pipeline, a folder in diffusers' format."""

    folder: Path
    index: dict[str, Any]  # its model_index.json
    variant: str  # of the weights, such as fp16

    def kind(self, name: str) -> str:
        """The class of a component. Raises UserError if there is none, or one that is not in COMPONENTS."""
        found = self.index.get(name)
        kind = str(found[1]) if isinstance(found, list) and len(found) == 2 else "none"
        if kind not in COMPONENTS:
            raise unknown("class", kind, COMPONENTS, f" as {name} of the teacher's pipeline")
        return kind

    def load(self, name: str) -> Any:
        """Load a component, its weights in float32."""
        kind = self.kind(name)
        cls = getattr(importlib.import_module(COMPONENTS[kind]), kind)
        settings: dict[str, Any] = {"local_files_only": True}
        if kind in TOKENIZERS:
            return cls.from_pretrained(str(self.folder / name), **settings)
        settings |= {"variant": self.variant} if self.variant else {}
        settings |= {"low_cpu_mem_usage": False} if kind in AUTOENCODERS else {}
        return cls.from_pretrained(str(self.folder / name), use_safetensors=True, **settings).to(torch.float32)

    def decoder(self) -> str:
        """The name of the autoencoder in the pipeline."""
        return "vqvae" if "vqvae" in self.index else "vae"


def parts_of(source: TeacherSource) -> Parts | None:
    """The components of the pipeline that a teacher is loaded from; None for other teachers."""
    pipeline = source.pipeline()
    if pipeline is None:
        return None
    return Parts(pipeline.folder, json.loads((pipeline.folder / INDEX).read_text(encoding="utf-8")), pipeline.variant)


def form_of(
    core: Core, step: OneStep, teacher: Teacher, parts: Parts | None, labels: list[int], prompts: list[str]
) -> Form:
    """The pipeline for a step; `labels` or `prompts` are its conditions in the check. Changes the network of `core`."""
    if teacher.decode is not None and parts is None:
        raise UserError(f"teacher={teacher.name} has a decoder that diffusers cannot load: no way to export students")
    ddim = ddim_of(step)
    fitted = _bundled if ddim is None else FORMS[type(core)]
    scheduler = None if ddim is None else diffusers.DDIMScheduler(**ddim.settings)
    return fitted(Folded(core, step, scheduler, ddim.gain if ddim else 0.0, teacher, parts, labels, prompts))


@dataclass(frozen=True)
class Folded:
    """A folded student, and what its pipeline needs."""

    core: Core
    step: OneStep
    scheduler: Any
    gain: float
    teacher: Teacher
    parts: Parts | None
    labels: list[int]
    prompts: list[str]

    def scaled(self) -> bool:
        """Fold k and the gain into the network; False if that is not possible."""
        return self.core.scale(self.step.k, self.step.q, self.gain)


def _explain(student: Folded, scaled: bool) -> str:
    """How the network was changed, for the card."""
    step, own = student.step, isinstance(student.core, OwnCore)
    embedding = "is stored beside its weights" if own else "became the bias of the layer that embeds the time"
    rest = "a, b, k and q are in model_index.json, and the bundled pipeline computes the sum."
    if scaled:
        rest = (
            "k became part of the first layer's weights, and a DDIMScheduler for one step, of prediction_type "
            f"{student.scheduler.config.prediction_type}, gives the sum once the last layer is multiplied by "
            f"{student.gain:.6g}."
        )
    return (
        "The student's one step is x_0 = a eps + b F(k eps + q), F its network at one time and with one embedding for "
        f"all images, here with a = {step.a:.6g}, b = {step.b:.6g}, k = {step.k:.6g} and q = {step.q:.6g}. The "
        f"embedding {embedding}, so that the network returns the same for every timestep. {rest}"
    )


def _unconditional(student: Folded) -> Form:
    """The pipeline of a UNet2DModel."""
    config, decoded = student.core.module.config, student.teacher.decode is not None
    decoder = student.parts.decoder() if decoded and student.parts is not None else ""
    quantised = decoder and student.parts is not None and student.parts.kind(decoder) == "VQModel"
    fits = not config.num_class_embeds and (not decoded or (quantised and isinstance(config.sample_size, int)))
    if not fits or not student.scaled():
        return _bundled(student)
    unet, scheduler, parts = student.core.module, student.scheduler, student.parts
    asks = {"batch_size": EXAMPLES, "num_inference_steps": 1}

    def write(folder: Path) -> None:
        if parts is None or not decoded:
            diffusers.DDIMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
        else:
            vqvae = parts.load(decoder)
            diffusers.LDMPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler).save_pretrained(folder)

    return Form("LDMPipeline" if decoded else "DDIMPipeline", write, {}, asks, _explain(student, True))


def _of_classes(student: Folded) -> Form:
    """The pipeline of a DiTTransformer2DModel."""
    parts = student.parts
    if parts is None or student.teacher.decode is None or not student.labels or not student.scaled():
        return _bundled(student)

    def write(folder: Path) -> None:
        names = parts.index.get("id2label")
        names = names if isinstance(names, dict) else None
        vae = parts.load(parts.decoder())
        pipeline = diffusers.DiTPipeline(student.core.module, vae, student.scheduler, names)
        if names:
            pipeline.register_to_config(id2label=names)
        pipeline.save_pretrained(folder)

    asks = {"class_labels": student.labels, "num_inference_steps": 1, "guidance_scale": 1.0}
    return Form("DiTPipeline", write, {}, asks, _explain(student, True))


def _of_texts(student: Folded) -> Form:
    """The pipeline of a UNet2DConditionModel."""
    parts = student.parts
    if parts is None or student.teacher.conditioning.small is not None:
        raise UserError("text-to-image students can be exported, students that also take an image (upscalers) cannot")
    if not student.scaled():
        raise UserError("the student's one step is not a DDIM step, which text-to-image pipelines need")
    asks = {"prompt": student.prompts, "num_inference_steps": 1, "guidance_scale": 1.0}

    def write_pixels(folder: Path) -> None:
        settings = dict(student.scheduler.config) | {"variance_type": "fixed_small"}  # IFPipeline reads it
        diffusers.IFPipeline(
            text_encoder=parts.load("text_encoder"),
            tokenizer=parts.load("tokenizer"),
            unet=_with_variance(student.core.module, student.core.channels),
            scheduler=diffusers.DDIMScheduler.from_config(settings),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)

    if student.teacher.decode is None:
        return Form("IFPipeline", write_pixels, {}, asks, _explain(student, True))

    def write(folder: Path) -> None:
        diffusers.StableDiffusionPipeline(
            vae=parts.load("vae"),
            text_encoder=parts.load("text_encoder"),
            tokenizer=parts.load("tokenizer"),
            unet=student.core.module,
            scheduler=student.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)

    return Form("StableDiffusionPipeline", write, {}, asks, _explain(student, True))


def _with_variance(unet: Any, channels: int) -> Any:
    """The network with additional zero channels, which IFPipeline takes for a variance and drops."""
    config = {name: value for name, value in unet.config.items() if name[0] != "_"}
    wide, weights = type(unet).from_config(config | {"out_channels": 2 * channels}), dict(unet.state_dict())
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])])
    wide.load_state_dict(weights)
    return wide.eval()


def _bundled(student: Folded) -> Form:
    """The bundled pipeline, which takes any network except text-to-image ones, unchanged."""
    core, step, teacher, parts = student.core, student.step, student.teacher, student.parts
    if isinstance(core, TextCore):
        raise UserError(f"the student's one step, {step}, is not a DDIM step, which text-to-image students need")
    labels = student.labels
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
    return Form(name, write, {"trust_remote_code": True}, asks, _explain(student, False))


FORMS: dict[type[Core], Callable[[Folded], Form]] = {
    UNetCore: _unconditional,
    TransformerCore: _of_classes,
    TextCore: _of_texts,
    OwnCore: _bundled,
}
