"""LPIPS as a distance: the values of another implementation, what it is counted as, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch_fidelity.sample_similarity_lpips as fidelity
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor
from torchvision.models import vgg16

from analytic import mlp_teacher
from distillbench import UserError
from distillbench.cli import commands
from distillbench.diffusion.distances import DISTANCE_NAMES, DISTANCES, LPIPS, LpipsForm, mean_absolute
from distillbench.evaluation.pretrained_weights import VARIABLE, weights_folder
from distillbench.execution.run import run
from distillbench.networks.lpips import LpipsNetwork
from distillbench.registry import load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.distances import Distances, Lpips, lpips_flops
from distillbench.runs.plan import plan
from distillbench.storage.files import sha256_file
from distillbench.system.progress import Progress
from distillbench.testing.method_bench import CONDITIONINGS, MethodBench
from distillbench.training.budget import BudgetConfig, Meter
from distillbench.training.flops import count_flops
from distillbench.training.network_rows import NetworkRows
from lpips_weights import LINEAR, VGG, use_random_weights, write_random_weights

FORMS = dict(LPIPS)  # before tests put smaller ones in their place
SETTING = {"direct": "loss", "lcm": "loss", "reflow": "distil_metric"}  # others: metric
METHODS = ("boot", "cm", "ct", "ctm", "direct", "ect", "lcm", "reflow")


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_random_weights(folder)
    return folder


@pytest.fixture
def weights(folder, monkeypatch) -> Path:
    use_random_weights(folder, monkeypatch)
    return folder


@pytest.fixture
def none_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def network(folder: Path, form: LpipsForm) -> LpipsNetwork:
    return LpipsNetwork(form).load(folder / VGG, folder / LINEAR)


def images(seed: int, channels: int = 3, side: int = 32) -> Tensor:
    return 2 * torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(seed)) - 1


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reference(folder, monkeypatch) -> fidelity.SampleSimilarityLPIPS:
    """torch-fidelity's LPIPS with the random weights; its images have values from 0 to 255."""
    with torch.device("meta"):
        net = vgg16(weights=None, init_weights=False)
    net.load_state_dict(torch.load(folder / VGG), strict=False, assign=True)
    monkeypatch.setattr(fidelity, "torchvision_load_pretrained_vgg16", lambda: net)
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: torch.load(folder / LINEAR))
    return fidelity.SampleSimilarityLPIPS("lpips")


@pytest.mark.parametrize("side", [0, 48])
def test_it_is_torch_fidelitys(side, folder, reference):
    reference.sample_similarity_resize = side or None
    a, b = images(1), images(2)
    expected = reference(127.5 * (a + 1), 127.5 * (b + 1)).flatten()
    torch.testing.assert_close(network(folder, LpipsForm(side=side))(a, b), expected, rtol=1e-4, atol=0)


def test_average_pooling_is_the_formula_written_out(folder):
    """With torchvision's normalisation of pixels in [0, 1], as piq has it."""
    vgg, linear = torch.load(folder / VGG), torch.load(folder / LINEAR)

    def features(x: Tensor) -> Iterator[Tensor]:
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            x = F.avg_pool2d(x, 2) if block[0] else x
            for k in block:
                x = F.conv2d(x, vgg[f"features.{k}.weight"], vgg[f"features.{k}.bias"], padding=1).relu()
            yield F.normalize(x, dim=1)

    a, b = images(1), images(2)
    pairs = zip(features(a), features(b), strict=True)
    each = [F.conv2d((x - y) ** 2, linear[f"lin{k}.model.1.weight"]).mean((1, 2, 3)) for k, (x, y) in enumerate(pairs)]
    found = network(folder, LpipsForm(average_pooling=True, side=0))(a, b)
    torch.testing.assert_close(found, torch.stack(each).sum(dim=0), rtol=1e-4, atol=0)


def test_its_gradient_is_that_of_finite_differences(folder):
    lpips = network(folder, LpipsForm(side=24)).double()
    a, b, direction = images(1, side=16).double(), images(2, side=16).double(), images(3, side=16).double()
    gradient = torch.autograd.functional.jacobian(lambda x: lpips(x, b).sum(), a)
    step = 1e-6
    difference = (lpips(a + step * direction, b) - lpips(a - step * direction, b)).sum() / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-5)


def test_equal_images_have_distance_and_gradient_zero(folder):
    lpips, a = network(folder, LpipsForm(side=0)), images(1).requires_grad_()
    d = lpips(a, a.detach())
    (gradient,) = torch.autograd.grad(d.sum(), a)
    assert not d.any() and not gradient.any()
    assert (lpips(a, images(2)) > 0.01).all()


def test_a_grey_image_is_one_of_three_equal_channels(folder):
    lpips, a, b = network(folder, LpipsForm(side=0)), images(1, channels=1), images(2, channels=1)
    torch.testing.assert_close(lpips(a, b), lpips(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_images_below_256_pixels_are_resized_to_224():
    for name in ("lpips", "lpips_avgpool"):
        assert [FORMS[name].size(side, side) for side in (32, 255, 256)] == [(224, 224), (224, 224), (256, 256)]
    assert FORMS["lpips_unresized"].size(32, 32) == (32, 32)
    assert [form.average_pooling for form in FORMS.values()] == [False, True, False]


def test_the_distance_of_absolute_values():
    a, b, w = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 0.0]]]]), torch.zeros(2, 1, 1, 2), torch.tensor([1.0, 5.0])
    assert mean_absolute(a, b).item() == 1.0
    assert mean_absolute(a, b + 1, w.view(2, 1, 1, 1)).item() == (0 + 2 + 5 + 5) / 4
    assert mean_absolute(a, b, 3.0).item() == 3.0


# --- what methods get ------------------------------------------------------------------------------------------------


def distances(weights: Path, teacher=None, dry: bool = False) -> tuple[Distances, Meter]:
    teacher = teacher or dataclasses.replace(mlp_teacher(), shape=(3, 32, 32))
    meter = Meter(BudgetConfig(), teacher, "cpu")
    return Distances(teacher, meter, weights, "cpu", dry), meter


def test_it_is_a_weighted_mean_whose_rows_are_counted_and_are_no_evaluations(weights):
    """Each of two calls compares two images with two; a gradient reaches the first ones alone."""
    found, meter = distances(weights)
    a, b, w = images(1).requires_grad_(), images(2), torch.tensor([0.5, 2.0])
    each = network(weights, LPIPS["lpips_unresized"])(a, b).detach()
    torch.testing.assert_close(found["lpips_unresized"](a, b).detach(), each.mean())
    loss = found["lpips_unresized"](a, b, w.view(2, 1, 1, 1))
    torch.testing.assert_close(loss.detach(), (w * each).mean())
    (rows,) = meter.cost().networks
    assert (rows.counted, rows.forward, rows.to_weights, rows.to_input) == ("distance", 8, 0, 4)
    assert rows.network.endswith("LpipsNetwork at 32x32") and rows.weights == 14_714_688 + sum((64, 128, 256, 512, 512))
    assert meter.evaluations == 0
    assert not [weight for weight in found["lpips_unresized"].network.parameters() if weight.requires_grad]
    assert found["l2"] is DISTANCES["l2"] and set(DISTANCE_NAMES) == {*DISTANCES, *LPIPS}


def test_its_rows_are_those_of_the_whole_training(weights):
    """Also after an interruption, and without those of a pause."""
    (found, meter), a, b = distances(weights, dry=True), images(1), images(2)
    found["lpips"](a, b)
    meter.restart(meter.cost(), meter.energy())
    with meter.pause():
        found["lpips"](a, b)
    found["lpips"](a, b)
    assert [rows.forward for rows in meter.cost().networks] == [8]


def test_a_dry_run_counts_the_same_without_the_network(weights):
    (found, meter), a = distances(weights, dry=True), images(1).requires_grad_()
    assert found["lpips"](a, images(2)).item() == pytest.approx(F.mse_loss(a, images(2)).item())
    (rows,) = meter.cost().networks
    assert (rows.forward, rows.to_input) == (4, 2) and rows.network.endswith("at 16x16")


def test_flops_are_those_that_torch_counts(folder):
    """Of a row forward, and of one backward to the image alone."""
    rows = NetworkRows("distance", "LPIPS at 32x32", 0, 0, 4, 0, 2)
    (flops,) = lpips_flops([rows]).values()
    lpips, a = network(folder, LpipsForm(side=0)), images(1).requires_grad_()
    made = count_flops(lambda: lpips(a, images(2)).sum().backward()).flops
    assert 4 * flops.forward + 2 * flops.backward_input == made and flops.forward == flops.backward_input


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"shape": (4, 32, 32)}, "images of 1 or 3 channels, these have 4: take l2, l1, pseudo_huber"),
        ({"shape": (1, 8, 8)}, "images of at least 16 pixels a side, these have 8x8: take lpips, which resizes them"),
        ({"shape": (4, 32, 32), "decode": lambda x: x}, "compares images, and teacher=mlp has latents: take l2, l1"),
    ],
)
def test_what_it_cannot_compare_is_refused(changed, words, weights):
    found, _ = distances(weights, dataclasses.replace(mlp_teacher(), **changed))
    with pytest.raises(UserError, match=f"the distance lpips_unresized .*{words}"):
        found["lpips_unresized"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_compares_its_student_with_a_target(name, registry):
    """The first of two images of each pair has a gradient, the second one has none."""
    cls, seen = registry.methods[name].cls, []
    settings = {SETTING.get(name, "metric"): "lpips"} | ({"distil_share": 0.5} if name == "reflow" else {})

    def recording(a: Tensor, b: Tensor, w: Tensor | float = 1.0) -> Tensor:
        seen.append((a.requires_grad, b.requires_grad, a.shape == b.shape, a.dim()))
        return (w * (a - b).square()).mean()

    bench = MethodBench("lpips", cls, cls.Config(**settings), CONDITIONINGS["unconditional"], 0)
    for event in bench.walk():
        event.method.distances = {"lpips": recording}
    assert seen and set(seen) == {(True, False, True, 4)}
    with pytest.raises(UserError, match=f"{SETTING.get(name, 'metric')} must be one of .*lpips_avgpool"):
        cls.Config(**{SETTING.get(name, "metric"): "lpip"})


# --- a run -----------------------------------------------------------------------------------------------------------

RUN = [
    "methods=[cm]", "dataset=digits", "device=cpu", "methods.cm.metric=lpips", "budget.images=8", "batch_size=4",
    "evaluation.images=16", "evaluation.batch_size=16", "evaluation.metrics=[teacher_rmse]", "evaluation.nfe=[1]",
    "evaluation.teacher_steps=[1]", "evaluation.timing=off", "isolate=false",
]  # fmt: skip


def test_a_run_counts_it_and_says_so(weights, registry, tmp_path):
    words = [*RUN, f"results_dir={tmp_path}", "microbatch=2", "methods.cm.metric=l2,lpips"]
    configs = compose_runs(words, registry)
    cells = plan(configs, registry)
    assert {cell.method_config.metric: cell.compared for cell in cells if cell.entry} == {"l2": 0, "lpips": 2}
    table = run(cells, configs, Progress(Console(file=io.StringIO())), lambda rows: None).table
    assert list(table["status"].unique()) == ["ok"]
    tflops = {"lpips" in row["settings"]: row["train_tflops"] for row in table.to_dict("records") if row["budget"]}
    records = [json.loads(file.read_bytes()) for file in tmp_path.glob("cells/*/train.json")]
    (rows,) = [each for record in records for each in record["cost"]["networks"] if each["counted"] == "distance"]
    assert (rows["forward"], rows["to_input"]) == (16, 8)
    (flops,) = lpips_flops([NetworkRows(**rows)]).values()
    assert tflops[True] - tflops[False] == pytest.approx(24 * flops.forward / 1e12, rel=1e-9)
    evaluations = {(record["cost"]["teacher_nfe"], record["cost"]["student_nfe"]) for record in records}
    assert len(records) == 2 and len(evaluations) == 1


def test_without_weights_nothing_starts(none_there, registry, tmp_path):
    with pytest.raises(UserError) as caught:
        plan(compose_runs([*RUN, f"results_dir={tmp_path}"], registry), registry)
    assert "the distance lpips: the weights of lpips are not there" in str(caught.value)
    assert "(distillbench fetch lpips, or evaluation.download=true in a run)" in str(caught.value)
    assert not list(tmp_path.glob("cells"))


def test_a_plan_says_that_it_is_no_evaluation(weights, capfd, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as done:
        commands.main(["run", *RUN, f"results_dir={tmp_path}", "budget.limit=seconds", "--dry-run"])
    said = capfd.readouterr().out
    assert not done.value.code, said
    assert "LPIPS is evaluated for each training image: cm on 2 images, which costs seconds and train_tflops" in said


# --- its files -------------------------------------------------------------------------------------------------------


def test_the_published_files_are_named():
    """Torchvision has the first digits of the hash in its own name of the file."""
    (linear,) = Lpips.also
    assert Lpips.weights.file == VGG and Lpips.weights.sha256.startswith("397923af") and len(linear.sha256) == 64
    assert Lpips.weights.url.endswith(VGG) and linear.file == LINEAR and linear.url.endswith("weights/v0.1/vgg.pth")


def test_fetch_copies_both_files(weights, folder, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    done = CliRunner().invoke(commands.cli, ["fetch", "lpips", "--from", str(folder)])
    assert done.exit_code == 0, done.output
    for name in (VGG, LINEAR):
        assert sha256_file(weights_folder() / name) == sha256_file(folder / name)
    assert "lpips" in CliRunner().invoke(commands.cli, ["fetch"]).output
