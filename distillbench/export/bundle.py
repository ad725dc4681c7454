"""Networks of this package as components of a pipeline that loads without this package.

Such a component is a folder with the source of the architecture as standalone code, a config with its settings, and
safetensors. :class:`OneStepNetwork` is copied into that source: it has the signature of diffusers' networks and holds
the student's fixed time and embedding.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import save_file
from torch import Tensor, nn

from distillbench.diffusion.conditioning import Condition
from distillbench.diffusion.embeddings import TimeEmbedding
from distillbench.errors import UserError
from distillbench.export.fold import OwnCore
from distillbench.networks.architectures import ResidualMLP
from distillbench.networks.edm import DhariwalUNet, Fourier, SongUNet

FILE = "network"  # name of the source file without .py
WEIGHTS = "diffusion_pytorch_model.safetensors"

HEAD = '''"""A one-step student's network with the signature of diffusers' networks, written by `distillbench export`.

It needs only torch and diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn


@dataclass(frozen=True)
class Condition:
    """The conditions of a batch of images: `labels` (B,) int64, or none."""

    labels: Tensor | None = None
    augmentation: Tensor | None = None  # of training


UNCONDITIONAL = Condition()
'''
DEFINED = {"Condition", "UNCONDITIONAL"}  # defined in HEAD instead of imported from distillbench


class OneStepNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A network with the signature of a UNet2DModel. Its time and embedding are fixed; `timestep` is ignored."""

    @register_to_config
    def __init__(self, architecture: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.network = globals()[architecture](**settings)
        self.register_buffer("time", torch.zeros(1))
        self.register_buffer("embedding", torch.zeros(1, self.network.embedding_channels))

    def forward(
        self, sample: Tensor, timestep: Any = None, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        size = len(sample)
        embedding = self.embedding.expand(size, -1)
        out = self.network(sample, self.time.expand(size), embedding, Condition(labels=class_labels))
        return UNet2DOutput(sample=out) if return_dict else (out,)


def source_of(architecture: type[nn.Module]) -> str:
    """The source of `architecture`, of what it uses of its module and of `embeddings`, and of OneStepNetwork.

    Raises UserError if that imports more of distillbench than HEAD defines.
    """
    embeddings, module = inspect.getmodule(TimeEmbedding), inspect.getmodule(architecture)
    assert embeddings is not None and module is not None
    texts = [inspect.getsource(source) for source in (embeddings, module)]
    lines = {part: text.splitlines() for text in texts for part in ast.parse(text).body if _defined(part)}
    parts, copied = list(lines), DEFINED | set(embeddings.__all__)
    needed, wanted = set(), {architecture.__name__}
    while wanted:
        for part in [part for part in parts if part not in needed and _defined(part) & wanted]:
            needed.add(part)
            wanted |= {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}
        wanted &= {name for part in parts if part not in needed for name in _defined(part)}
    kept = [HEAD.rstrip()]
    for part in (part for part in parts if part in needed):
        foreign = {node.module for node in ast.walk(part) if isinstance(node, ast.ImportFrom) and _ours(node.module)}
        if not foreign:
            decorators: list[ast.expr] = part.decorator_list if isinstance(part, ast.ClassDef | ast.FunctionDef) else []
            first = min([part.lineno, *(node.lineno for node in decorators)])
            kept.append("\n".join(lines[part][first - 1 : part.end_lineno]))
        elif not (isinstance(part, ast.ImportFrom) and _defined(part) <= copied):
            raise UserError(
                f"{architecture.__name__} needs {', '.join(sorted(map(str, foreign)))}: it cannot be exported"
            )
    return "\n\n\n".join([*dict.fromkeys(kept), inspect.getsource(OneStepNetwork)])


def _ours(module: str | None) -> bool:
    return (module or "").split(".")[0] == "distillbench"


def _defined(part: ast.stmt) -> set[str]:
    """The names that a statement of a module defines, without those of __future__."""
    if isinstance(part, ast.Import | ast.ImportFrom):
        known = isinstance(part, ast.ImportFrom) and part.module == "__future__"
        return set() if known else {(name.asname or name.name).split(".")[0] for name in part.names}
    if isinstance(part, ast.ClassDef | ast.FunctionDef):
        return {part.name}
    targets = part.targets if isinstance(part, ast.Assign) else [part.target] if isinstance(part, ast.AnnAssign) else []
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


# --- settings of a built network -------------------------------------------------------------------------------------


def _of_mlp(network: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    classes = 0 if network.classes is None else network.classes.num_embeddings - 1
    width, depth = network.entry.out_features, len(network.blocks)
    return {"shape": list(shape), "width": width, "depth": depth, "classes": classes}


def _of_unet(network: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "img_resolution": shape[1],
        "in_channels": shape[0],
        "out_channels": shape[0],
        "label_dim": network.classes,
        "augment_dim": 0 if network.map_augment is None else network.map_augment.in_features,
        "model_channels": network.model_channels,
        "channel_mult": [width // network.model_channels for width in network.widths],
        "channel_mult_emb": network.embedding_channels // network.model_channels,
        "num_blocks": network.num_blocks,
        "attn_resolutions": list(network.attn_resolutions),
    }


def _of_song_unet(network: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    filters = [buffer for name, buffer in network.named_buffers() if name.endswith("resample_filter")]
    taps = {"resample_filter": filters[0].sum(dim=(0, 1, 2)).tolist()} if filters else {}  # their sum is 1 each way
    return {
        **_of_unet(network, shape),
        "embedding_type": "fourier" if isinstance(network.map_noise, Fourier) else "positional",
        "channel_mult_noise": network.map_layer0.in_features // network.model_channels,
        "encoder_type": network.encoder_type,
        "decoder_type": network.decoder_type,
        **taps,
    }


SETTINGS: dict[type[nn.Module], Callable[[Any, tuple[int, int, int]], dict[str, Any]]] = {
    ResidualMLP: _of_mlp,
    SongUNet: _of_song_unet,
    DhariwalUNet: _of_unet,
}


# --- writing ---------------------------------------------------------------------------------------------------------


def save_network(core: OwnCore, shape: tuple[int, int, int], folder: Path) -> None:
    """Write the component: its source, its config and its weights."""
    architecture = type(core.module)
    settings = SETTINGS[architecture](core.module, shape)
    tensors = {f"network.{name}": tensor for name, tensor in core.module.state_dict().items()}
    tensors |= {"time": core.time, "embedding": core.embedding}
    whole = OneStepNetwork(architecture.__name__, settings)
    tensors = {name: tensor.detach().to(whole.state_dict()[name].dtype) for name, tensor in tensors.items()}
    whole.load_state_dict(tensors)  # raises unless the settings are those of these weights
    folder.mkdir(parents=True)
    config = {
        "_class_name": OneStepNetwork.__name__,
        "_diffusers_version": diffusers.__version__,
        "architecture": architecture.__name__,
        "settings": settings,
    }
    (folder / f"{FILE}.py").write_text(source_of(architecture), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    kept = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
