"""FID and other Inception scores against torch-fidelity, clean-fid and pytorch-fid, on random weights."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor

from distillbench import Unavailable
from distillbench.builtin import inception
from distillbench.builtin.inception import Fid, FidClean, InceptionScore, InceptionV3, InceptionV3Clean, Kid
from distillbench.evaluation.features import ImageSet, Networks
from distillbench.evaluation.metric import Samples
from distillbench.storage.files import sha256_file
from inception_weights import pictures, write_random_weights

OFFICIAL = InceptionV3.weights  # the fixture below puts others in its place
OURS, REAL, SIDE = 14, 18, 16
SUBSET = 8
TOLERANCE = {"rel": 1e-4, "abs": 0}


class SmallKid(Kid):
    subset = SUBSET


class SmallInceptionScore(InceptionScore):
    fewest = 10


@dataclass
class World:
    """Two sets of pictures, and a folder with the random weights."""

    folder: Path
    ours: Tensor
    real: Tensor
    samples: Samples


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("weights")
    weights = write_random_weights(folder / "random.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InceptionV3, "weights", weights)
        patch.setattr(InceptionV3, "batch", 7)  # of both sides, so that the last digits agree
        networks = Networks(folder, "cpu")
        ours, real = pictures(OURS, SIDE, 1.0, 1), pictures(REAL, SIDE, 0.8, 2)
        yield World(folder, ours, real, samples_of(ours, real, networks))


def image_set(images: Tensor, networks: Networks) -> ImageSet:
    kept = frozenset({InceptionV3, InceptionV3Clean})
    return ImageSet(lambda: images.split(5), len(images), tuple(images.shape[1:]), networks, kept)


def samples_of(ours: Tensor, real: Tensor, networks: Networks) -> Samples:
    x = torch.zeros(len(ours), *ours.shape[1:])
    mine = image_set(ours, networks)
    return Samples(x, x, mine, mine, image_set(real, networks), keeps_noise=True)


class Pictures(torch.utils.data.Dataset):
    """What torch-fidelity takes as an input."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def torch_fidelity_finds(world: World, **what: bool) -> dict[str, float]:
    from torch_fidelity import calculate_metrics

    return calculate_metrics(
        input1=Pictures(world.ours), input2=Pictures(world.real), feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(world.folder / "random.pth"), cuda=False, cache=False, save_cpu_ram=True,
        batch_size=7, kid_subset_size=SUBSET, verbose=False, **what,
    )  # fmt: skip


@pytest.mark.slow
def test_fid_kid_and_inception_score_are_torch_fidelitys(world):
    theirs = torch_fidelity_finds(world, fid=True, kid=True, isc=True)
    assert Fid().score(world.samples) == pytest.approx(theirs["frechet_inception_distance"], **TOLERANCE)
    assert SmallKid().score(world.samples) == pytest.approx(theirs["kernel_inception_distance_mean"], **TOLERANCE)
    score = SmallInceptionScore().score(world.samples)
    assert score == pytest.approx(theirs["inception_score_mean"], **TOLERANCE) and score > 1.05


@pytest.mark.nightly
@pytest.mark.slow
def test_precision_and_recall_are_torch_fidelitys(world):
    theirs = torch_fidelity_finds(world, prc=True)
    ours = [metric().score(world.samples) for metric in (inception.PrecisionInception, inception.RecallInception)]
    assert ours == pytest.approx([theirs["precision"], theirs["recall"]], **TOLERANCE)
    assert min(ours) > 0 and max(ours) < 1


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum")
def test_fid_clean_is_clean_fids_on_png_files(world, tmp_path, monkeypatch):
    """Its own reading, resizing and (pytorch-fid's) network; the distance by SciPy, in the features' joint span."""
    from cleanfid import inception_pytorch
    from cleanfid.fid import get_folder_features

    tensors = torch.load(world.folder / "random.pth", weights_only=True)
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: tensors)
    network = inception_pytorch.InceptionV3([3], resize_input=False, normalize_input=False).eval()

    def features(images: Tensor, name: str) -> np.ndarray:
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:03}.png")
        return get_folder_features(
            str(tmp_path / name), model=lambda x: network((x - 128) / 128)[0].flatten(1), num_workers=0, batch_size=7,
            device=torch.device("cpu"), mode="clean", verbose=False,
        ).astype(np.float64)  # fmt: skip

    theirs, theirs_real = features(world.ours, "ours"), features(world.real, "real")
    clean = world.samples.images.features(InceptionV3Clean)
    np.testing.assert_allclose(clean, theirs, rtol=1e-4, atol=1e-4)
    assert FidClean().score(world.samples) == pytest.approx(by_scipy(theirs, theirs_real), rel=1e-4, abs=0)
    plain = world.samples.images.features(InceptionV3)
    assert (clean - plain).norm() > 0.02 * plain.norm()  # another resizing is another number


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """The squared Frechet distance of features (n,D), n < D, by a matrix root in the span of all of them."""
    basis = np.linalg.qr(np.concatenate([a, b]).T)[0]
    a, b = a @ basis, b @ basis
    sa, sb = np.cov(a.T), np.cov(b.T)
    root = sqrtm(sa @ sb)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sa + sb - 2 * root.real))


def test_body_is_the_network_behind_its_resizing(world):
    """At 299x299 TensorFlow's resizing does nothing, so the forward of torch-fidelity is the body alone: to the bit."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = InceptionV3(world.folder / "random.pth", "cpu")
    images = pictures(1, 299, 1.0, 3)
    with torch.inference_mode():
        features = network(images)
        assert torch.equal(features, network.body((images.float() - 128) / 128))
        assert features.shape == (1, InceptionV3.width) and features.dtype is torch.float32
        theirs = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["logits_unbiased"], feature_extractor_weights_path=str(world.folder / "random.pth")
        )
        (logits,) = theirs(images)
        torch.testing.assert_close(network.logits(features), logits)


def test_weights_may_lack_the_counters_of_norms(world, tmp_path):
    """Old files of weights have no num_batches_tracked and no metadata."""
    tensors = torch.load(world.folder / "random.pth", weights_only=True)
    torch.save({k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    old, new = InceptionV3(tmp_path / "old.pth", "cpu").network, InceptionV3(world.folder / "random.pth", "cpu").network
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(old.buffers(), new.buffers(), strict=True) if a.ndim)


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


def test_a_file_of_weights_is_not_executed(tmp_path):
    file, touched = tmp_path / "hostile.pth", tmp_path / "touched"
    torch.save({"fc.weight": Touch(touched)}, file)
    with pytest.raises(pickle.UnpicklingError):
        InceptionV3(file, "cpu")
    assert not touched.exists()


@pytest.mark.parametrize("metric", [Fid, FidClean, Kid, InceptionScore])
def test_without_weights_the_value_is_empty_and_the_reason_has_a_command(metric, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(InceptionV3, "weights", OFFICIAL)
    samples = samples_of(pictures(4, 8, 1.0, 0), pictures(4, 8, 1.0, 1), Networks(tmp_path, "cpu"))
    with pytest.raises(Unavailable, match=r"not there.*distillbench fetch inception, or evaluation\.download=true"):
        metric().score(samples)
    assert metric.identity(tmp_path)["seen"]["weights_sha256"] is None


@pytest.mark.parametrize("name", [OFFICIAL.file, *OFFICIAL.others])
def test_other_weights_under_the_right_name_are_refused(world, name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(InceptionV3, "weights", OFFICIAL)
    os.link(world.folder / "random.pth", tmp_path / name)
    found = sha256_file(tmp_path / name)[:8]
    samples = samples_of(world.ours, world.real, Networks(tmp_path, "cpu"))
    for metric in (Fid, FidClean):
        with pytest.raises(Unavailable, match=rf"is not the file that inception .*{found}.*fetch inception, or"):
            metric().score(samples)
        assert metric.identity(tmp_path)["seen"]["weights_sha256"] is None


def test_weights_are_the_file_that_torch_fidelity_downloads():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert OFFICIAL.url == URL_INCEPTION_V3 and URL_INCEPTION_V3.endswith(OFFICIAL.file)
    assert OFFICIAL.file.endswith(f"{OFFICIAL.sha256[:8]}.pth")
    assert InceptionV3Clean.weights is InceptionV3.weights


def test_few_images_have_no_inception_score_and_no_kid(world):
    for metric in (InceptionScore, Kid):
        with pytest.raises(Unavailable, match="1000"):
            metric().score(world.samples)
