"""Files of networks in the format of NVIDIA's EDM release, written as its training script writes them."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from distillbench.builtin.edm import Edm
from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Condition, Conditioning
from distillbench.networks.edm import Block, Conv, DhariwalUNet, Fourier, Positional, SongUNet

DDPM = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 9}


class EDMPrecond(nn.Module):
    """The wrapper in the files, as the paper has it (Karras et al. 2022, table 1): x^, tau, c -> E[x_0 | x^, c]."""

    def __init__(self, model: nn.Module, **attributes: object) -> None:
        super().__init__()
        self.model = model
        self.img_resolution, self.img_channels, self.label_dim, self.use_fp16 = 8, 3, model.classes, False
        self.sigma_min, self.sigma_max, self.sigma_data = 0, float("inf"), 0.5
        self.__dict__.update(attributes)

    def forward(self, x: Tensor, sigma: Tensor, c: Condition) -> Tensor:
        total = sigma**2 + 0.5**2
        c_skip, c_out = 0.5**2 / total, sigma * 0.5 / total.sqrt()
        return c_skip * x + c_out * self.model(x / total.sqrt(), sigma.log().flatten() / 4, None, c)


class Plain:
    """Stands for the loss, which is also in the files."""

    def __init__(self) -> None:
        self.P_mean, self.weights = -1.2, torch.ones(2)


CLASSES = {  # our classes and the names of NVIDIA's classes that they stand for
    EDMPrecond: "EDMPrecond",
    SongUNet: "SongUNet",
    DhariwalUNet: "DhariwalUNet",
    Block: "UNetBlock",
    Conv: "Conv2d",
    nn.Linear: "Linear",
    nn.GroupNorm: "GroupNorm",
    Positional: "PositionalEmbedding",
    Fourier: "FourierEmbedding",
    Plain: "EDMLoss",
}


class EdmWriter:
    """Writes pickles as EDM's training does: through torch_utils.persistence, with source text beside the state."""

    def __init__(self, folder: Path, persistence: ModuleType, easy_dict: type) -> None:
        self.folder, self.easy_dict = folder, easy_dict
        self.marker = folder / "marker"
        source = f"open({str(self.marker)!r}, 'w')\n"  # what a reader that executes the source would do

        class Pickler(pickle.Pickler):
            def reducer_override(self, value: object):
                if type(value) not in CLASSES:
                    return NotImplemented
                own = {"_init_args": (), "_init_kwargs": easy_dict(getattr(value, "built_with", {}))}
                state = {name: part for name, part in vars(value).items() if name != "built_with"} | own
                if isinstance(value, Block):
                    state["skip_scale"] = np.sqrt(0.5)
                meta = {"type": "class", "version": 6, "module_src": source, "class_name": CLASSES[type(value)]}
                return persistence._reconstruct_persistent_obj, (easy_dict(meta | {"state": state}),)

        self.pickler = Pickler

    def write(self, content: object, name: str = "network-snapshot-001000.pkl") -> Path:
        buffer = io.BytesIO()
        self.pickler(buffer, protocol=4).dump(content)
        (self.folder / name).write_bytes(buffer.getvalue())
        return self.folder / name

    def network(self, cls=SongUNet, settings: dict = DDPM, **attributes: object) -> tuple[EDMPrecond, Path]:
        """A network with random weights, and a file of it."""
        torch.manual_seed(0)
        built_with = {"img_resolution": 8, "in_channels": 3, "out_channels": 3} | settings
        model = cls(**built_with)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.built_with = built_with
        wrapper = EDMPrecond(model, **attributes).eval().requires_grad_(False)
        dataset = self.easy_dict(class_name="training.dataset.ImageFolderDataset", use_labels=False, xflip=False)
        content = {"ema": wrapper, "loss_fn": Plain(), "augment_pipe": None, "dataset_kwargs": dict(dataset)}
        return wrapper, self.write(content)


@contextmanager
def edm_writer_in(folder: Path) -> Iterator[EdmWriter]:
    """A writer, with stand-ins for NVIDIA's modules, whose names the files contain, while the files are written."""
    persistence, util = ModuleType("torch_utils.persistence"), ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        exec(meta["module_src"], {})  # as the original does

    class EasyDict(dict):
        pass

    for owner, part in ((persistence, _reconstruct_persistent_obj), (util, EasyDict)):
        part.__module__, part.__qualname__ = owner.__name__, part.__name__
        setattr(owner, part.__name__, part)
    modules = {"torch_utils": ModuleType("torch_utils"), "dnnlib": ModuleType("dnnlib")}
    modules |= {"torch_utils.persistence": persistence, "dnnlib.util": util}
    assert not modules.keys() & sys.modules.keys()
    sys.modules.update(modules)
    try:
        yield EdmWriter(folder, persistence, EasyDict)
    finally:
        for name in modules:
            del sys.modules[name]


def edm_source(
    path: Path | str,
    shape: tuple[int, int, int] = (3, 8, 8),
    conditioning: Conditioning = WITHOUT_CLASSES,
    name: str = "ffhq",
    **settings: object,
) -> Edm:
    """``teacher=edm`` with the file at `path`, for a dataset of this name and shape."""
    dataset = SimpleNamespace(name=name, shape=shape)
    return Edm(Edm.Config("edm", str(path), **settings), dataset, Path(), "cpu", conditioning)
