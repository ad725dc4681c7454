"""Reference statistics: features of the real images, computed once, cached, exported and imported.

A file is an .npz in the layout of pytorch-fid and EDM: `mu` (D,) and `sigma` (D,D), plus `provenance`, JSON that names
the images, the network and the preprocessing. A file whose provenance does not match the run is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillbench.datasets.dataset import Dataset, to_uint8
from distillbench.errors import Unavailable, UserError, quoted
from distillbench.evaluation.features import FeatureNetwork, ImageSet, Networks
from distillbench.evaluation.frechet import GaussianStatistics
from distillbench.storage.checksummed import read_tensors, write_tensors
from distillbench.storage.files import key_of, sha256_file, write_atomically
from distillbench.storage.npz import Npz

BATCH = 256  # images read at a time
DRAWN_SEED = 2020  # of the real images that are drawn if not all features are kept
LARGEST = 2**29  # bytes of an array in a file: 8,192 features
IMAGE_KEYS = ("dataset", "dataset_sha256", "split", "shape", "resizer")  # keys of provenance for the images
READ = ("mu", "sigma", "provenance", "features")  # arrays of a file
NETWORK_KEYS = ("network", "protocol", "weights_sha256")  # and for the network


@dataclass(frozen=True)
class ReferenceFile:
    """Statistics that were read from a file."""

    path: Path
    statistics: GaussianStatistics
    provenance: dict[str, Any]  # empty for a file of another tool
    sha256: str
    features: Tensor | None = None  # (M,D) float32, of some of the images


def write_reference(
    path: Path, statistics: GaussianStatistics, provenance: dict[str, Any], features: Tensor | None = None
) -> None:
    """Write an .npz with float64 arrays and with `provenance`, to which the number of images is added.

    `features` (M,D) are those of some of the images, for precision and recall.
    """
    mu, sigma = statistics.mean.cpu().numpy(), statistics.covariance.cpu().numpy()
    some: dict[str, Any] = {} if features is None else {"features": features.cpu().numpy()}
    text = np.array(json.dumps(provenance | {"images": statistics.n}, sort_keys=True))

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:  # given a path, numpy would append .npz to it
            np.savez(file, mu=mu, sigma=sigma, provenance=text, **some)

    write_atomically(path, write)


def read_reference(path: Path) -> ReferenceFile:
    """Read an .npz of distillbench, pytorch-fid or EDM; raises UserError if `path` is not one."""
    try:
        arrays = Npz(path)
        missing = [name for name in ("mu", "sigma") if name not in arrays.names]
        if missing:
            raise UserError(f"{path.name}: no array {missing[0]!r}; a reference holds mu and sigma")
        read = [arrays.infos[name] for name in READ if name in arrays.infos]
        if any(info.file_size > LARGEST for info in read):  # ADM's files hold the images too
            raise ValueError(f"an array has more than {LARGEST:,} bytes, more than any network's features")
        mu, sigma = arrays["mu"], arrays["sigma"]
        provenance = json.loads(str(arrays["provenance"])) if "provenance" in arrays.names else {}
        features = arrays["features"] if provenance and "features" in arrays.names else None
    except FileNotFoundError:
        raise UserError(f"no reference file {str(path)!r}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read as a reference (.npz with mu and sigma): {error}") from error
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
        raise UserError(f"{path.name}: mu (D,) and sigma (D,D) do not fit, got {mu.shape} and {sigma.shape}")
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise UserError(f"{path.name}: mu and sigma must be floating point, got {mu.dtype} and {sigma.dtype}")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all() and np.allclose(sigma, sigma.T, atol=1e-4)):
        raise UserError(f"{path.name}: mu and sigma must be finite, and sigma symmetric")
    if not isinstance(provenance, dict):
        raise UserError(f"{path.name}: provenance is not a JSON object")
    n = provenance.get("images", 0)
    if type(n) is not int or not 0 <= n < 2**53:
        raise UserError(f"{path.name}: images in provenance must be their number, got {quoted(repr(n))}")
    if features is not None and (
        features.dtype != np.float32 or features.shape[1:] != mu.shape or not np.isfinite(features).all()
    ):
        raise UserError(
            f"{path.name}: features must be finite float32 (M,{len(mu)}), got {features.dtype} {features.shape}"
        )
    statistics = GaussianStatistics(n, torch.from_numpy(mu), given=torch.from_numpy(sigma))
    kept = None if features is None else torch.from_numpy(features)
    return ReferenceFile(path, statistics, provenance, sha256_file(path), kept)


def provenance_of(dataset: Dataset, network: dict[str, Any]) -> dict[str, Any]:
    """The provenance of a reference of `dataset` with `network`, the identity of a feature network."""
    return {
        "dataset": dataset.name,
        "dataset_sha256": dataset.sha256 if len(dataset) else None,
        "split": dataset.split,
        "shape": list(dataset.shape),
        "resizer": dataset.resizer,
        **network,
    }


def check_reference(file: ReferenceFile, wanted: dict[str, Any], width: int) -> None:
    """Raise UserError unless `file` has the provenance `wanted` (:func:`provenance_of`) and `width` features."""
    name = file.path.name
    if not file.provenance:
        raise UserError(f"{name} has no provenance. Declare it once: distillbench reference import {name} ...")
    for key in (*IMAGE_KEYS, *NETWORK_KEYS):
        found, expected = file.provenance.get(key), wanted[key]
        if found != expected and not (key == "dataset_sha256" and None in (found, expected)):
            raise UserError(f"{name} is a reference of another {key}: {found!r}, this run has {expected!r}")
    if len(file.statistics.mean) != width:
        raise UserError(f"{name} holds {len(file.statistics.mean)} features, {wanted['network']} has {width}")
    if not isinstance(file.provenance.get("images"), int) or file.statistics.n < 2:
        raise UserError(f"{name} does not say how many images it was computed from")


def declared(
    file: ReferenceFile, wanted: dict[str, Any], width: int, images: int
) -> tuple[GaussianStatistics, dict[str, Any]]:
    """Statistics of another tool's file, and their provenance as the user declares it.

    Raises UserError if the file has a provenance, or another number of features than `width`.
    """
    if file.provenance:
        raise UserError(f"{file.path.name} already has a provenance: it needs no import")
    if len(file.statistics.mean) != width:
        raise UserError(f"{file.path.name} holds {len(file.statistics.mean)} features, {wanted['network']} has {width}")
    statistics = GaussianStatistics(images, file.statistics.mean, given=file.statistics.covariance)
    origin = f"{file.path.name}, sha256 {file.sha256}, as its user declared"
    return statistics, wanted | {"dataset_sha256": None, "origin": origin}


class RealImages(ImageSet):
    """The real images of a dataset. Their features are cached on disk, under a key of all that determines them.

    With 0 < `drawn` < their number, :meth:`features` are those of so many of them, drawn at random, and no others are
    read for it; :meth:`statistics` are always those of all.
    """

    def __init__(
        self, dataset: Dataset, networks: Networks, cache: Path, files: Iterable[ReferenceFile] = (),
        kept: frozenset[type[FeatureNetwork]] = frozenset(), drawn: int = 0,
    ) -> None:  # fmt: skip
        self.drawn: DrawnImages | None = None
        if 0 < drawn < len(dataset):
            self.drawn, kept = DrawnImages(dataset, networks, cache, drawn), frozenset()
        super().__init__(lambda: _batches(dataset), len(dataset), dataset.shape, networks, kept)
        self.dataset, self.cache = dataset, cache
        self.files = {file.provenance.get("network", ""): file for file in files}
        self._imported: dict[type[FeatureNetwork], GaussianStatistics] = {}  # those of `files`, on the device

    def describe(self, network: type[FeatureNetwork]) -> str:
        """A description of the reference that metrics of `network` use."""
        file = self.files.get(network.name)
        if file is None:
            return f"{self.count} images"
        return f"{file.statistics.n} images, {file.path.name} {file.sha256[:8]}"

    def features(self, network: type[FeatureNetwork]) -> Tensor:
        file = self.files.get(network.name)
        if file is not None and file.features is not None:
            return file.features
        if file is not None and not self.count:
            raise Unavailable(f"{file.path.name} holds no features, only their mean and covariance")
        return super().features(network) if self.drawn is None else self.drawn.features(network)

    def statistics(self, network: type[FeatureNetwork]) -> GaussianStatistics:
        file = self.files.get(network.name)
        if file is None:
            return super().statistics(network)
        if network not in self._imported:
            self._imported[network] = file.statistics.to(self.networks.device)
        return self._imported[network]

    def has(self, network: type[FeatureNetwork]) -> bool:
        """Whether the features of `network` that the run needs seem to be there: the files are not checked."""
        file = self.files.get(network.name)
        if file is not None and (network not in self._kept or file.features is not None or not self.count):
            return True
        path, _ = self._place(network)
        return path.is_file() and (network not in self._kept or _features_path(path).is_file())

    def _place(self, network: type[FeatureNetwork]) -> tuple[Path, dict[str, Any]]:
        """The cached file of statistics, and its provenance."""
        wanted = self._provenance(network)
        return self.cache / f"{network.name}-{key_of(wanted)}.npz", wanted

    def _extract(self, network: type[FeatureNetwork], keep: bool) -> None:
        path, wanted = self._place(network)
        if self._read_cached(network, path, wanted, keep):
            return
        super()._extract(network, keep)
        self._statistics[network] = self._statistics[network].dense()  # as in the file: the same digits next time
        write_reference(path, self._statistics[network], wanted)
        if keep:
            write_tensors(_features_path(path), {"features": self._features[network].contiguous()})

    def _provenance(self, network: type[FeatureNetwork]) -> dict[str, Any]:
        return provenance_of(self.dataset, network.identity(self.networks.folder))

    def _read_cached(self, network: type[FeatureNetwork], path: Path, wanted: dict[str, Any], keep: bool) -> bool:
        """Read the cached files; False if they are missing, damaged, or lack the features that `keep` requires."""
        try:
            file = read_reference(path)
            check_reference(file, wanted, network.width)
            features = read_tensors(_features_path(path))["features"] if keep else None
        except (UserError, OSError, ValueError, KeyError):
            return False
        if features is not None:
            if features.shape != (self.count, network.width):
                return False
            self._features[network] = features
        self._statistics[network] = file.statistics.to(self.networks.device)  # the device of the samples' moments
        return True


class DrawnImages(RealImages):
    """`count` images of a dataset, drawn without replacement by a generator of their own."""

    def __init__(self, dataset: Dataset, networks: Networks, cache: Path, count: int) -> None:
        super().__init__(dataset, networks, cache)
        generator = torch.Generator().manual_seed(DRAWN_SEED)
        indices = torch.randperm(len(dataset), generator=generator)[:count].sort().values
        self.read, self.count = (lambda: _batches(dataset, indices)), count

    def _provenance(self, network: type[FeatureNetwork]) -> dict[str, Any]:
        return super()._provenance(network) | {"drawn": drawn_in_words(self.count)}


def drawn_in_words(count: int) -> str:
    """What a protocol says of `count` real images that :class:`DrawnImages` draws."""
    return f"features of {count:,} real images, drawn at random without replacement, seed {DRAWN_SEED}"


def _batches(dataset: Dataset, indices: Tensor | None = None) -> Iterator[Tensor]:
    """The images at `indices`; None: all."""
    for part in (torch.arange(len(dataset)) if indices is None else indices).split(BATCH):
        yield to_uint8(dataset.read(part))


def _features_path(path: Path) -> Path:
    return path.with_suffix(".features.safetensors")
