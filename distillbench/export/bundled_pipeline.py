"""A one-step student as a diffusers pipeline, for networks that diffusers has no pipeline for.

    x_0 = a eps + b F(k eps + q, class)

`distillbench export` copies this file as pipeline.py into its folder. It needs only torch and diffusers. Load and
sample with

    pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    images = pipeline(batch_size=4).images                # class-conditional students: class_labels=[0, 1, 2]

| symbol     | meaning                                             | shape     |
|------------|-----------------------------------------------------|-----------|
| eps        | standard normal noise                               | (B,C,H,W) |
| F          | the network, at its fixed time and guidance         | (B,C,H,W) |
| x_0        | images in [-1, 1], or latents of them               | (B,C,H,W) |
| a, b, k, q | numbers in model_index.json                         |           |
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

TIMESTEP = 1  # the network's output does not depend on it, but some networks divide by it


class OneStepPipeline(DiffusionPipeline):
    """Samples a student in one step. `network` is F; `vae`, if there is one, decodes latents to images."""

    model_cpu_offload_seq: Any = "network->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        network: Any,
        vae: Any = None,
        a: float = 0.0,
        b: float = 1.0,
        k: float = 1.0,
        q: float = 0.0,
        shape: list[int] | None = None,  # C,H,W of the noise
        classes: int = 0,
        label: int | None = None,  # the network's class if the student is unconditional
    ) -> None:
        super().__init__()
        self.register_modules(network=network, vae=vae)
        self.register_to_config(a=a, b=b, k=k, q=q, shape=shape, classes=classes, label=label)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: list[int] | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample one image for each of `class_labels` (class-conditional students), else `batch_size` images.

        `latents` is the noise eps to start from. `output_type`: pil, np ((B,H,W,C) in [0, 1]), pt ((B,C,H,W) in [0, 1])
        or latent (x_0 itself, (B,C,H,W)).
        """
        settings: Any = self.config
        device, dtype = self._execution_device, self.network.dtype
        labels = self._labels(class_labels, device)
        size = len(latents) if latents is not None else batch_size if labels is None else len(labels)
        if labels is not None and len(labels) != size:
            raise ValueError(f"{len(labels)} class_labels and {size} latents")
        shape = (size, *settings.shape)
        eps = randn_tensor(shape, generator, device, dtype) if latents is None else latents.to(device, dtype)
        if labels is None and settings.label is not None:
            labels = torch.full((size,), settings.label, device=device)
        timestep = torch.full((size,), TIMESTEP, device=device)
        out = self.network(settings.k * eps + settings.q, timestep, class_labels=labels, return_dict=False)[0]
        x_0 = settings.a * eps + settings.b * out[:, : shape[1]]
        images: Any = x_0 if output_type == "latent" else self._finished(x_0, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, class_labels: list[int] | torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        settings: Any = self.config
        classes = settings.classes
        if (class_labels is None) != (classes == 0):
            wanted = f"class_labels, from 0 to {classes - 1}" if classes else "no class_labels"
            raise ValueError(f"this student needs {wanted}")
        if class_labels is None:
            return None
        labels = torch.as_tensor(class_labels, device=device).long().reshape(-1)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"class_labels lie from 0 to {classes - 1}, got {labels.tolist()}")
        return labels

    def _finished(self, x_0: torch.Tensor, output_type: str) -> Any:
        """x_0 as images of the wanted type."""
        if self.vae is not None:
            config = self.vae.config
            shift = config.get("shift_factor") or 0.0
            x_0 = self.vae.decode(x_0 / config.scaling_factor + shift, return_dict=False)[0]
        images = (x_0 / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "np":
            return array
        if output_type != "pil" or array.shape[-1] not in (1, 3):
            raise ValueError(f"output_type is pil (of 1 or 3 channels), np, pt or latent, got {output_type!r}")
        return self.numpy_to_pil(array)
