"""Feature networks, and sets of images with their features.

A network always gets batches of its own fixed size, whatever the batches that images come in: convolutions of another
batch size round differently, and a score must not depend on how images were batched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from distillbench.errors import Unavailable
from distillbench.evaluation.frechet import GaussianStatistics, Moments
from distillbench.evaluation.pretrained_weights import WeightsFile, known_sha256, locate
from distillbench.system.precision import float32_products
from distillbench.system.transfers import to_device, to_host

__all__ = ["FeatureNetwork", "ImageSet", "full_precision", "resized"]


class FeatureNetwork(ABC):
    """A pretrained network, with its preprocessing, whose features metrics use.

    Constructed with the file of its weights, whose SHA-256 has been checked, and the device.
    """

    name: ClassVar[str]
    label: ClassVar[str] = ""  # the name in tables, such as "EffNet-Lite0"; empty: the name without underscores
    title: ClassVar[str] = ""  # the same in full, such as "EfficientNet-Lite0"; empty: the label
    protocol: ClassVar[str]  # everything but the weights that determines the features, with a version
    width: ClassVar[int]  # D
    weights: ClassVar[WeightsFile]
    also: ClassVar[tuple[WeightsFile, ...]] = ()  # further files that are found and checked alike, such as a vocabulary
    batch: ClassVar[int] = 128  # images per batch

    @classmethod
    def names(cls) -> tuple[str, str]:
        """Its name in tables, and in full."""
        label = cls.label or cls.name.replace("_", " ")
        return label, cls.title or label

    @classmethod
    def locate(cls, folder: Path) -> Path:
        """The file of its weights, in `folder` or torch.hub's. Raises Unavailable if it is missing or damaged."""
        for file in cls.also:
            locate(cls.name, file, folder)
        return locate(cls.name, cls.weights, folder)

    @abstractmethod
    def __init__(self, file: Path, device: str) -> None: ...

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B,D) float32 of colour images (B,3,H,W) uint8, both on the network's device."""

    @classmethod
    def identity(cls, folder: Path) -> dict[str, Any]:
        """All that determines its features, as plain values; without the weights, their hash is None."""
        try:
            cls.locate(folder)
        except Unavailable:
            return {"network": cls.name, "protocol": cls.protocol, "weights_sha256": None}
        return {"network": cls.name, "protocol": cls.protocol, "weights_sha256": known_sha256(cls.weights, folder)}


class Networks:
    """The feature networks of a run on one device; each is loaded when it is first needed."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self._loaded: dict[type[FeatureNetwork], FeatureNetwork] = {}

    def get(self, network: type[FeatureNetwork]) -> FeatureNetwork:
        """The loaded network; raises Unavailable if its weights are missing."""
        if network not in self._loaded:
            self._loaded[network] = network(network.locate(self.folder), self.device)
        return self._loaded[network]

    def extract(self, network: type[FeatureNetwork], images: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """Features of uint8 images (b,C,H,W) in batches of any size, in blocks (at most network.batch, D).

        Close it if not all features are read: a subclass may use other processes.
        """
        return extract(self.get(network), images, self.device)


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 inside the block: no TF32, no autocast, and deterministic cuDNN, whatever the run trains with."""
    dtype, cudnn = torch.get_default_dtype(), torch.backends.cudnn
    before = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
    torch.set_default_dtype(torch.float32)
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = True, False, True
    try:
        with float32_products():
            yield
    finally:
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = before
        torch.set_default_dtype(dtype)


def resized(images: Tensor, resize: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Apply `resize` (uint8 (H,W,3) -> (h,w,3)) to each of `images` (B,3,H,W) uint8; float32 (B,3,h,w) on their device.

    For networks whose preprocessing uses the resizing of another library, one image at a time.
    """
    arrays = [resize(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    return to_device(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float(), images.device)


def extract(network: FeatureNetwork, images: Iterable[Tensor], device: str) -> Generator[Tensor, None, None]:
    """Features of uint8 images (b,C,H,W) in batches of any size, in blocks (at most network.batch, D).

    Grey images are repeated to three channels. The last block is padded with copies of its last image.
    """
    with torch.inference_mode(), full_precision():
        for block in in_blocks(images, network.batch):
            count = len(block)
            x = to_device(block, device)
            if count < network.batch:
                x = torch.cat([x, x[-1:].expand(network.batch - count, -1, -1, -1)])
            yield network(x.expand(-1, 3, -1, -1))[:count].float()


def in_blocks(images: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The images in blocks of `size`; the last block may be smaller."""
    parts: list[Tensor] = []
    count = 0
    for batch in images:
        for part in batch.split(size):
            parts.append(part)
            count += len(part)
            if count >= size:
                joined = torch.cat(parts) if len(parts) > 1 else parts[0]
                yield joined[:size]
                parts, count = [joined[size:]] if count > size else [], count - size
    if count:
        yield torch.cat(parts)


class ImageSet:
    """Images, uint8 (N,C,H,W), and their features: each network is run once.

    `read` returns an iterable of batches of the images at each call. All features of the networks in `kept` stay in
    memory, because a metric needs them; of other networks only their mean and covariance do.
    """

    def __init__(
        self, read: Callable[[], Iterable[Tensor]], count: int, shape: tuple[int, int, int], networks: Networks,
        kept: frozenset[type[FeatureNetwork]] = frozenset(),
    ) -> None:  # fmt: skip
        self.read, self.count, self.shape, self.networks, self._kept = read, count, shape, networks, kept
        self._features: dict[type[FeatureNetwork], Tensor] = {}
        self._statistics: dict[type[FeatureNetwork], GaussianStatistics] = {}
        self._results: dict[Any, Any] = {}

    def statistics(self, network: type[FeatureNetwork]) -> GaussianStatistics:
        """Mean and covariance of the features; raises Unavailable without weights or with fewer than two images."""
        if network not in self._statistics:
            self._extract(network, network in self._kept)
        return self._statistics[network]

    def features(self, network: type[FeatureNetwork]) -> Tensor:
        """All features (N,D) float32, on the CPU; raises Unavailable like :meth:`statistics`."""
        if network not in self._features:
            self._extract(network, True)
        return self._features[network]

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """compute(), or its earlier result under this `name`: for metrics that share work."""
        if name not in self._results:
            self._results[name] = compute()
        return self._results[name]

    def _extract(self, network: type[FeatureNetwork], keep: bool) -> None:
        """Run `network` over the images: store statistics and, with `keep`, all features."""
        if self.shape[0] not in (1, 3):
            raise Unavailable(f"{network.name} takes images of 1 or 3 channels, these have {self.shape[0]}")
        if self.count < 2:
            raise Unavailable(f"a covariance needs at least two images, got {self.count}")
        moments, device = Moments(), self.networks.device
        kept: list[Tensor] = []
        with closing(self.networks.extract(network, self.read())) as features:
            blocks = _added(moments, features)
            if keep:
                kept.extend(block for (block,) in to_host(((block,) for block in blocks), device))
            else:
                deque(blocks, maxlen=0)
        self._statistics[network] = moments.statistics()
        if keep:
            self._features[network] = torch.cat(kept)


def _added(moments: Moments, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The blocks, each after it is added to `moments`."""
    for block in blocks:
        moments.add(block)
        yield block
