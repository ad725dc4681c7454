"""The distances that a training may use: those of pixel values, and LPIPS with its weights, device and cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distillbench.diffusion.autograd_levels import needs_gradient
from distillbench.diffusion.distances import DISTANCES, LPIPS, Distance
from distillbench.diffusion.losses import mean_square
from distillbench.errors import Unavailable, UserError
from distillbench.evaluation.pretrained_weights import WeightsFile, locate
from distillbench.networks.lpips import SMALLEST, LpipsNetwork
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import Meter
from distillbench.training.flops import NetworkFlops, count_flops
from distillbench.training.network_rows import NetworkRows, name_of

COUNTED = "distance"  # the word for its rows beside "teacher" and "student"


class Lpips:
    """VGG16 of torchvision, and LPIPS's weights of its channels. Both files are checked by their SHA-256."""

    name = "lpips"
    weights = WeightsFile(
        file="vgg16-397923af.pth",
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        licence="BSD-3-Clause",
        mib=528,
    )
    also = (
        WeightsFile(
            file="lpips-0.1-vgg.pth",
            sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
            url="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
            licence="BSD-2-Clause",
            mib=1,
            others=("vgg.pth",),  # the name in the package lpips
        ),
    )

    @classmethod
    def locate(cls, folder: Path) -> list[Path]:
        """The files of VGG16 and of the channels' weights. Raises Unavailable if one is missing or damaged."""
        return [locate(cls.name, file, folder) for file in (cls.weights, *cls.also)]


class Distances(dict[str, Distance]):
    """Distances by name. LPIPS's network is loaded when it is first asked for, at no cost to the method.

    Its rows (images) are counted by `meter`, apart from those of teacher and student. `dry`: its weights must be there,
    but the squared error stands in for it.
    """

    def __init__(self, teacher: Teacher, meter: Meter, weights: Path, device: str, dry: bool = False) -> None:
        super().__init__(DISTANCES)
        self.teacher, self.meter, self.weights, self.device, self.dry = teacher, meter, weights, device, dry

    def __missing__(self, name: str) -> Distance:
        """LPIPS in the form `name`. Raises UserError if it cannot compare the teacher's images or has no weights."""
        size = _size(name, self.teacher)
        with self.meter.pause():
            try:
                vgg, channels = Lpips.locate(self.weights)
            except Unavailable as missing:
                raise UserError(f"the distance {name}: {missing}") from missing
            network = None if self.dry else LpipsNetwork(LPIPS[name]).load(vgg, channels).to(self.device)
        self[name] = distance = _Counted(network, _kind(size), self.meter)
        return distance


class _Counted:
    """The mean of w times LPIPS, whose rows are counted; without a network, the squared error."""

    def __init__(self, network: LpipsNetwork | None, kind: NetworkRows, meter: Meter) -> None:
        self.network, self.kind, self.meter = network, kind, meter

    def __call__(self, a: Tensor, b: Tensor, w: Tensor | float = 1.0) -> Tensor:
        differentiated = sum(len(images) for images in (a, b) if needs_gradient(images))
        self.meter.add(replace(self.kind, forward=len(a) + len(b), to_input=differentiated))
        if self.network is None:
            return mean_square(a, b, w)
        d = self.network(a, b)
        return (w.flatten() * d).mean() if isinstance(w, Tensor) else w * d.mean()


def _size(name: str, teacher: Teacher) -> tuple[int, int]:
    """Height and width of what the network of LPIPS in the form `name` gets."""
    channels, height, width = teacher.shape
    others = ", ".join(DISTANCES)
    if teacher.decode is not None:
        raise UserError(f"the distance {name} compares images, and teacher={teacher.name} has latents: take {others}")
    if channels not in (1, 3):
        raise UserError(f"the distance {name} compares images of 1 or 3 channels, these have {channels}: take {others}")
    size = LPIPS[name].size(height, width)
    if min(size) < SMALLEST:
        raise UserError(
            f"the distance {name} needs images of at least {SMALLEST} pixels a side, these have {height}x{width}: "
            "take lpips, which resizes them"
        )
    return size


def _kind(size: tuple[int, int]) -> NetworkRows:
    """How rows of the network are counted: their FLOPs depend on the size alone."""
    weights = sum(weight.numel() for weight in LpipsNetwork(LPIPS["lpips"]).parameters())
    return NetworkRows(COUNTED, f"{name_of(LpipsNetwork)} at {size[0]}x{size[1]}", weights, 0)


def compared(rows: Iterable[NetworkRows]) -> int:
    """Images that LPIPS evaluates."""
    return sum(each.forward for each in rows if each.counted == COUNTED)


def lpips_flops(rows: Iterable[NetworkRows]) -> dict[NetworkRows, NetworkFlops]:
    """The FLOPs of one row of each kind that LPIPS has in `rows`, counted by torch on the meta device."""
    return {each.kind: _flops(*_size_of(each)) for each in rows if each.counted == COUNTED}


def _size_of(kind: NetworkRows) -> tuple[int, int]:
    height, width = kind.network.rpartition(" ")[2].split("x")
    return int(height), int(width)


def _flops(height: int, width: int) -> NetworkFlops:
    network = LpipsNetwork(LPIPS["lpips_unresized"]).to("meta")
    image = torch.empty(1, 3, height, width, device="meta")
    given = image.clone().requires_grad_()
    with torch.no_grad():
        forward = count_flops(lambda: network(image, image))
    out = network(given, image)
    backward = count_flops(lambda: torch.autograd.grad(out.sum(), given))
    names = {*forward.not_counted, *backward.not_counted}
    return NetworkFlops(forward.flops // 2, 0, backward.flops, not_counted=tuple(sorted(names)))
