"""Reference statistics: cached under all that determines them, in the layout of other tools, refused on a mismatch.

Features: independent of batches, threads and processes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distillbench.builtin.efficientnet_lite0 import EfficientNetLite0, network_input
from distillbench.cli import commands
from distillbench.datasets.dataset import Dataset
from distillbench.errors import Unavailable, UserError
from distillbench.evaluation.feature_metrics import precision_and_recall
from distillbench.evaluation.features import FeatureNetwork, ImageSet, Networks, extract
from distillbench.evaluation.frechet import Moments, frechet_distance
from distillbench.evaluation.metric import Samples
from distillbench.evaluation.pretrained_weights import WeightsFile
from distillbench.evaluation.reference_statistics import (
    RealImages,
    check_reference,
    provenance_of,
    read_reference,
    write_reference,
)
from distillbench.registry import load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.shared_context import SharedContexts

GIVEN = {"mu": np.zeros(3), "sigma": np.eye(3), "provenance": np.array('{"images": 9}')}
IDENTITY = {"network": "toy", "protocol": "toy/1", "weights_sha256": "ab"}


class Toy(FeatureNetwork):
    """Five linear features of 2x2 images; records the sizes of its blocks."""

    name, protocol, width, batch = "toy", "toy/1", 5, 4
    weights = WeightsFile("toy", "ab", "", "none", 0)
    blocks: list[int] = []

    @classmethod
    def locate(cls, folder):
        return folder

    def __init__(self, file, device):
        self.matrix = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))

    def __call__(self, images):
        self.blocks.append(len(images))
        return images.float().flatten(1) @ self.matrix


class Numbers(Dataset):
    """Twenty random colour images of 2x2."""

    name, licence, shape, sha256 = "numbers", "none", (3, 2, 2), "01"

    def __init__(self, config=None, count=20):
        self.images = torch.randint(0, 256, (count, 3, 2, 2), generator=torch.Generator().manual_seed(1)).to(
            torch.uint8
        )

    def __len__(self):
        return len(self.images)

    def read(self, indices):
        return self.images[indices]


def real(cache, dataset=None, files=(), kept=frozenset(), drawn=0):
    networks = Networks(Path("weights"), "cpu")
    return RealImages(Numbers() if dataset is None else dataset, networks, cache, files, kept, drawn)


@pytest.fixture(autouse=True)
def no_blocks():
    Toy.blocks.clear()


# --- a part of the images --------------------------------------------------------------------------------------------


def test_only_drawn_images_are_read_for_features_and_all_for_statistics(tmp_path, monkeypatch):
    read, images = [], Numbers().images
    monkeypatch.setattr(Numbers, "read", lambda self, indices: read.extend(indices.tolist()) or self.images[indices])
    some = real(tmp_path, drawn=7, kept=frozenset({Toy}))
    features = some.features(Toy)
    assert len(set(read)) == len(read) == 7 and read == sorted(read) != list(range(7))
    torch.testing.assert_close(features, images[read].float().flatten(1) @ Toy(None, "cpu").matrix)
    assert some.statistics(Toy).n == 20 and len(read) == 27
    assert torch.equal(some.statistics(Toy).covariance, real(tmp_path).statistics(Toy).covariance)
    assert torch.equal(real(tmp_path, drawn=7).features(Toy), features) and len(read) == 27  # cached
    assert not torch.equal(real(tmp_path, drawn=6).features(Toy), features[:6])
    assert len(real(tmp_path, drawn=20).features(Toy)) == len(real(tmp_path).features(Toy)) == 20


def test_scores_of_single_images_use_the_drawn_ones(tmp_path):
    """Precision and recall by their definition, over numpy's distances."""
    some, networks = real(tmp_path, Numbers(count=60), drawn=30), Networks(Path("weights"), "cpu")
    made = torch.randint(0, 256, (40, 3, 2, 2), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    seen = ImageSet(lambda: [made], 40, (3, 2, 2), networks)
    x, y = (features.double().numpy() for features in (seen.features(Toy), some.features(Toy)))
    apart = lambda a, b: np.linalg.norm(a[:, None] - b[None], axis=2)
    radius = lambda a: np.sort(apart(a, a), axis=1)[:, 3]
    expected = (apart(x, y) <= radius(y)).any(1).mean(), (apart(y, x) <= radius(x)).any(1).mean()
    samples = Samples(made, made, seen, seen, some, False)
    assert precision_and_recall(samples, Toy) == pytest.approx(expected) and 0 < expected[0] < 1


def test_the_drawn_number_is_part_of_the_protocol_of_scores_that_depend_on_it(tmp_path):
    registry = load_registry()
    words = ["methods=[boot]", "dataset=digits", f'results_dir="{tmp_path}"', "device=cpu"]
    words += ["evaluation.metrics=[precision_inception,fid,teacher_rmse]"]

    def context(*more):
        return SharedContexts().of(compose_runs([*words, *more], registry)[0], registry)

    plain, all_of_them, drawn = (
        context(),
        context("evaluation.real_features=1797"),
        context("evaluation.real_features=99"),
    )
    assert plain.metric_identities() == all_of_them.metric_identities()
    changed = {name for name, seen in drawn.metric_identities().items() if seen != plain.metric_identities()[name]}
    assert changed == {"precision_inception"}
    said = {name: facts["protocol"] for name, facts in drawn.columns().items()}
    assert said["precision_inception"].endswith(
        "; features of 99 real images, drawn at random without replacement, seed 2020"
    )
    assert said["fid"] == plain.columns()["fid"]["protocol"]
    assert plain.columns()["precision_inception"] == registry.metrics["precision_inception"].cls.describe()
    with pytest.raises(UserError, match=r"evaluation\.real_features|real_features"):
        context("evaluation.real_features=-1")
    for metric, count in (("precision_inception", 4), ("coverage_dinov2", 6), ("kid", 1000)):
        named, few = f"evaluation.metrics=[{metric}]", f"evaluation.real_features={count - 1}"
        with pytest.raises(UserError, match=rf"{few} is too few for {metric}, which needs .* at least {count:,} real"):
            context(named, few)
        context(named, f"evaluation.real_features={count}")
    context("evaluation.metrics=[fid]", "evaluation.real_features=1")  # of all images


# --- the cache -------------------------------------------------------------------------------------------------------


def test_statistics_are_computed_once_and_then_read(tmp_path):
    first = real(tmp_path).statistics(Toy)
    assert Toy.blocks == [4] * 5
    again = real(tmp_path).statistics(Toy)
    assert Toy.blocks == [4] * 5
    assert torch.equal(first.mean, again.mean) and torch.equal(first.covariance, again.covariance) and again.n == 20
    features = Numbers().images.float().flatten(1) @ Toy(None, "cpu").matrix
    np.testing.assert_allclose(again.covariance, np.cov(features.double().numpy().T), rtol=1e-10)


def test_a_score_is_the_same_with_a_computed_and_with_a_cached_reference(tmp_path):
    """Also with fewer images than features, where the covariance is singular."""
    dataset = Numbers(count=4)
    samples = ImageSet(lambda: [255 - Numbers(count=4).images], 4, (3, 2, 2), Networks(Path("weights"), "cpu"))
    values = [frechet_distance(real(tmp_path, dataset).statistics(Toy), samples.statistics(Toy)) for _ in range(2)]
    assert values[0] == values[1] > 0


@pytest.mark.parametrize("source", ["cache", "file"])
def test_cached_statistics_are_moved_to_the_device_of_the_samples(tmp_path, source):
    """The meta device stands for a GPU."""
    real(tmp_path).statistics(Toy)
    files = [read_reference(path) for path in tmp_path.glob("*.npz")] if source == "file" else []
    there = RealImages(Numbers(), Networks(Path("weights"), "meta"), tmp_path, files).statistics(Toy)
    assert there.mean.device.type == there.covariance.device.type == "meta" and there.n == 20
    assert Toy.blocks == [4] * 5


def test_features_are_cached_too_if_a_metric_needs_them(tmp_path):
    first = real(tmp_path, kept=frozenset({Toy})).features(Toy)
    Toy.blocks.clear()
    again = real(tmp_path, kept=frozenset({Toy}))
    assert torch.equal(again.features(Toy), first) and again.statistics(Toy).n == 20 and not Toy.blocks


@pytest.mark.parametrize("change", ["dataset", "resizer", "split", "network"])
def test_all_that_determines_them_is_in_the_key(tmp_path, monkeypatch, change):
    real(tmp_path).statistics(Toy)
    if change == "network":
        monkeypatch.setattr(Toy, "protocol", "toy/2")
    else:
        monkeypatch.setattr(Numbers, "sha256" if change == "dataset" else change, "other")
    real(tmp_path).statistics(Toy)
    assert len(Toy.blocks) == 10 and len(list(tmp_path.glob("*.npz"))) == 2


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"])
def test_a_damaged_file_is_computed_again(tmp_path, content):
    whole = real(tmp_path).statistics(Toy)
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(content)
    assert torch.equal(real(tmp_path).statistics(Toy).mean, whole.mean) and len(Toy.blocks) == 10
    assert read_reference(path).statistics.n == 20


def test_no_images_and_other_channels_have_no_statistics(tmp_path):
    with pytest.raises(Unavailable, match="at least two images, got 0"):
        real(tmp_path, Numbers(count=0)).statistics(Toy)
    five = ImageSet(lambda: [], 9, (5, 2, 2), Networks(Path("w"), "cpu"))
    with pytest.raises(Unavailable, match="1 or 3 channels, these have 5"):
        five.statistics(Toy)


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_layout_is_that_of_pytorch_fid_and_edm(tmp_path):
    statistics = real(tmp_path).statistics(Toy)
    write_reference(tmp_path / "out.npz", statistics, provenance_of(Numbers(), IDENTITY))
    with np.load(tmp_path / "out.npz", allow_pickle=False) as arrays:
        assert arrays["mu"].shape == (5,) and arrays["sigma"].shape == (5, 5)
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
        provenance = json.loads(str(arrays["provenance"]))
    assert provenance["images"] == 20 and provenance["dataset"] == "numbers" and provenance["network"] == "toy"
    check_reference(read_reference(tmp_path / "out.npz"), provenance_of(Numbers(), IDENTITY), 5)


@pytest.mark.parametrize(
    "fact", ["dataset", "dataset_sha256", "split", "shape", "resizer", "network", "protocol", "weights_sha256"]
)
def test_a_reference_with_another_provenance_is_refused(tmp_path, fact):
    wanted = provenance_of(Numbers(), IDENTITY)
    write_reference(tmp_path / "out.npz", real(tmp_path).statistics(Toy), wanted | {fact: "another"})
    with pytest.raises(UserError, match=f"of another {fact}: 'another'"):
        check_reference(read_reference(tmp_path / "out.npz"), wanted, 5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "no array 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, "do not fit"),
        ({"mu": np.zeros(3, np.int64), "sigma": np.zeros((3, 3))}, "floating point"),
        ({"mu": np.full(3, np.nan), "sigma": np.zeros((3, 3))}, "finite"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "symmetric"),
        ({"mu": np.array([None, 1]), "sigma": np.zeros((2, 2))}, "cannot be read"),  # would need a pickle
        ({"mu": np.zeros(3), "sigma": np.eye(3), "provenance": np.array("{")}, "cannot be read"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "provenance": np.array("[]")}, "not a JSON object"),
        (GIVEN | {"features": np.zeros((4, 2), np.float32)}, r"features must be finite float32 \(M,3\), got float32"),
        (GIVEN | {"features": np.zeros((4, 3))}, "features must be finite float32"),
        (GIVEN | {"features": np.full((4, 3), np.nan, np.float32)}, "features must be finite float32"),
    ],
)
def test_an_invalid_reference_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_reference(tmp_path / "bad.npz")


def test_float32_of_another_tool_becomes_float64(tmp_path):
    np.savez(tmp_path / "theirs.npz", mu=np.ones(3, np.float32), sigma=np.eye(3, dtype=np.float32))
    found = read_reference(tmp_path / "theirs.npz")
    assert found.statistics.mean.dtype is torch.float64 and found.provenance == {}
    with pytest.raises(UserError, match="distillbench reference import"):
        check_reference(found, provenance_of(Numbers(), IDENTITY), 3)


# --- on the command line ---------------------------------------------------------------------------------------------


def call(*words):
    with pytest.raises(SystemExit) as stop:
        commands.main(words)
        raise SystemExit(0)
    return stop.value.code or 0


def test_export_import_and_use(tmp_path, capsys):
    """An exported reference and a declared one of another tool give the same score as the dataset."""
    where = f'results_dir="{tmp_path / "results"}"'
    dataset = ["dataset=gmm", "dataset.means=[[-0.5,0.1,0],[0.13,-0.27,0.2],[0.4,0.37,0.1]]", "dataset.count=40"]
    exported, theirs, declared = (str(tmp_path / name) for name in ("gmm.npz", "theirs.npz", "declared.npz"))
    network = ["--network", "efficientnet_lite0"]
    assert call("reference", "export", *dataset, where, *network, "-o", exported) == 0
    assert call("reference", "show", exported) == 0
    assert "40 images" in capsys.readouterr().out
    with np.load(exported) as arrays:
        np.savez(theirs, mu=arrays["mu"], sigma=arrays["sigma"])
    run = ["run", "methods=[cm]", "teacher=gmm", *dataset, "experiment=smoke", where, "budget.images=200"]
    run += ["evaluation.images=32", "evaluation.teacher_steps=[2]", "evaluation.nfe=[1]", "evaluation.timing=off"]
    run += ["evaluation.metrics=[fd_efficientnet_lite0]"]
    assert call(*run, f'evaluation.references=["{theirs}"]') == 2
    assert "has no provenance" in capsys.readouterr().err
    assert call("reference", "import", theirs, *dataset, *network, "--images", "40", "-o", declared) == 0
    assert call("reference", "import", theirs, *dataset, "--network", "inception", "--images", "9", "-o", "x.npz") == 2
    assert "1280 features" in capsys.readouterr().err
    values = []
    for name, words in {"a": [], "b": [exported], "c": [declared]}.items():
        files = [f'evaluation.references=["{word}"]' for word in words]
        assert call(*run, *files, f"run_name={name}") == 0
        table = (tmp_path / "results" / name / "table.csv").read_text()
        assert ("gmm.npz" in table, "declared.npz" in table) == (name == "b", name == "c")
        line = next(one for one in table.splitlines() if ",cm," in one)
        values.append(line.split(",")[table.splitlines()[0].split(",").index("fd_efficientnet_lite0")])
    assert values[0] == values[1] == values[2] != ""
    assert call(*run, f'evaluation.references=["{exported}","{declared}"]') == 2
    assert "both references" in capsys.readouterr().err
    assert call(*run, f'evaluation.references=["{exported}"]', "evaluation.metrics=[teacher_rmse]") == 2
    assert "this run's metrics use: none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fetch", "inseption"], "Did you mean 'inception'?"),
        (["fetch", "efficientnet_lite0"], "nothing to fetch"),
        (["fetch", "inception", "--from", "nowhere.pth"], "no file 'nowhere.pth'"),
        (["reference", "show", "nowhere.npz"], "no reference file"),
        (["reference", "export", "dataset=digits", "--network", "toy", "-o", "a.npz"], "no feature network 'toy'"),
        (["reference", "export", "dataset=digits", "--network", "inception", "-o", "a.txt"], "must name a .npz file"),
    ],
)
def test_invalid_commands_are_refused(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path))
    assert call(*words) == 2
    assert message in capsys.readouterr().err


# --- independence of batches, threads and processes ------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 images, which take an eighth of the time."""
    monkeypatch.setattr(EfficientNetLite0, "batch", 16)


def images(count=20):
    return torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(2)).to(torch.uint8)


def features(batches):
    networks = Networks(Path("."), "cpu")
    return torch.cat(list(extract(networks.get(EfficientNetLite0), batches, "cpu")))


def test_features_do_not_depend_on_batches(small_blocks):
    """Bit by bit: the network gets blocks of its own size, the last one padded."""
    whole = features([images()])
    assert whole.shape == (20, 1280)
    for size in (1, 7, 16, 19):
        assert torch.equal(features(images().split(size)), whole)
    assert torch.equal(features([images()[:16]]), whole[:16])


def test_features_do_not_depend_on_threads(small_blocks):
    one = features([images()])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = features([images()])
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(one, two, rtol=0, atol=1e-5)


def test_merged_moments_of_two_processes_are_those_of_one(small_blocks):
    """Each process extracts the features of one block. (test_data_parallel has the processes.)"""
    moments = Moments(), Moments(), Moments()
    for part, x in zip(moments, (images(), images()[:16], images()[16:]), strict=True):
        part.add(features([x]))
    moments[1].merge(moments[2])
    whole, merged = moments[0].statistics(), moments[1].statistics()
    assert torch.allclose(whole.mean, merged.mean, rtol=1e-12, atol=1e-12)
    assert torch.allclose(whole.covariance, merged.covariance, rtol=1e-9, atol=1e-10)


def test_the_folded_network_agrees_with_timms():
    import timm

    network = EfficientNetLite0(EfficientNetLite0.locate(Path(".")), "cpu")
    theirs = torch.load(EfficientNetLite0.locate(Path(".")), map_location="cpu", weights_only=True)
    plain = timm.create_model("tf_efficientnet_lite0")
    names = [name for name in plain.state_dict() if not name.endswith("num_batches_tracked")]
    plain.load_state_dict(
        dict(zip(names, (v for k, v in theirs.items() if "tracked" not in k), strict=True)), strict=False
    )
    with torch.inference_mode():
        x = network_input(images()[:8].expand(-1, 3, -1, -1))
        truth = plain.eval().forward_head(plain.forward_features(x), pre_logits=True)
        torch.testing.assert_close(network(images()[:8].expand(-1, 3, -1, -1)), truth, rtol=1e-4, atol=1e-4)


def test_images_in_a_reference_file_are_not_read(tmp_path, monkeypatch):
    """ADM's files hold 10,000 images beside mu and sigma."""
    monkeypatch.setattr("distillbench.evaluation.reference_statistics.LARGEST", 1000)
    images = np.zeros((2, 8, 8, 64), np.uint8)
    np.savez(tmp_path / "batch.npz", arr_0=images, mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(9))
    assert torch.equal(read_reference(tmp_path / "batch.npz").statistics.mean, torch.zeros(4).double())
    np.savez(tmp_path / "large.npz", mu=np.zeros(200), sigma=np.eye(2))
    with pytest.raises(UserError, match="an array has more than 1,000 bytes"):
        read_reference(tmp_path / "large.npz")
