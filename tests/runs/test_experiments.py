"""Every prepared experiment, found by its file: it composes, has a planned cost, and takes two steps on shrunken files.

The files are of the real formats, 8 or 16 pixels a side, and the teachers are tiny networks of random weights: only
paths, sizes, the budget and what is scored differ from what the experiment says. An experiment of a teacher or a
dataset that has no small files here fails until somebody adds some.
"""

from __future__ import annotations

import functools
import io
import json
import math
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from omegaconf import OmegaConf
from rich.console import Console

from by_day import by_day
from distillbench.cli import commands
from distillbench.diffusion.distances import LPIPS
from distillbench.diffusion.samplers import Solver
from distillbench.execution.run import run
from distillbench.networks.edm import DhariwalUNet, SongUNet
from distillbench.registry import load_registry
from distillbench.runs.config import RunConfig, compose_runs
from distillbench.runs.distances import lpips_flops
from distillbench.runs.overrides import config_folder
from distillbench.runs.plan import plan
from distillbench.system.progress import Progress
from distillbench.training.network_rows import NetworkRows
from edm_files import DDPM, EdmWriter
from image_sources import cifar, edm, pixels, png, write_folder, write_zip
from lpips_weights import use_random_weights, write_random_weights

EXPERIMENTS = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))
PLANNED_BY_DAY = ("boot_sd15", "compare_cifar10", "smoke")
TWO_STEPS_BY_DAY = ("boot_deepfloyd", "boot_sd15", "cd_cifar10", "dmd_imagenet64", "smoke")
SIDE = 8
IMAGES = 12  # of a dataset
BATCH, STEPS = 4, 2  # four is the smallest batch of which BOOT's boundary loss takes a quarter
TEXTS = ["a cat", "two dogs in the snow", "seven seas", "an owl on a tree"]
SMALL = [
    "device=cpu",
    f"batch_size={BATCH}",
    f"budget.images={BATCH * STEPS}",
    "evaluation.images=16",
    "evaluation.batch_size=16",
    "evaluation.seeds=[0]",
    "evaluation.checkpoints=0",
    "evaluation.metrics=[teacher_rmse]",
    "evaluation.teacher_steps=[1,2]",
    "evaluation.timing=off",
    "isolate=false",
    "run_name=here",
]
LESS = {  # where an experiment's own number would take a minute, or two steps are too few for it
    "direct": "methods.direct.pairs=8 methods.direct.held_out=8",
    "ct": "methods.ct.s1=10",
    "sid": "methods.sid.generator_start=0",
    "reflow": "methods.reflow.pairs=8",
}
PAIRED = {"direct", "reflow"}  # methods with noise-image pairs
ABSENT = {  # what an experiment names and its small files have not
    "sida_cifar10": ["methods.sid.layer=enc.4x4_block0"],
    "reflow_cifar10": ["methods.reflow.distil_metric=lpips"],  # 8 pixels are too few for LPIPS
}
if find_spec("bitsandbytes") is None:
    ABSENT["lcm_sd15"] = ["methods.lcm.optimizer=adamw"]
CYCLES = {"dmd": 5}  # steps after which the cost repeats, of methods whose steps differ
ESTIMATE = re.compile(
    r"Estimate: (?:[\d.]+ M evaluations for the pairs and )?([\d.,]+ M|[\d,]+) images x \(?([\d.]+) "
    r"forward-equivalents,?(?: and [\d.]+ M evaluations for pairs,)? x ([\d,]+) GFLOP(?: \+ (\d+) GFLOP of LPIPS\))?"
    r" = (\d\.\d)e(\d+) FLOP, ([\d,.]+) GPU-hours at 40"
)


# --- small files of the real formats ---------------------------------------------------------------------------------


def _prompts(folder: Path) -> list[str]:
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    return [f"dataset.path={folder / 'prompts.txt'}"]


def _captions(folder: Path) -> list[str]:
    files: dict[str, bytes | str] = {f"{n}.png": png(image) for n, image in enumerate(pixels(len(TEXTS), 2 * SIDE))}
    return [f"dataset.path={write_folder(folder / 'captions', files | {f'{n}.txt': t for n, t in enumerate(TEXTS)})}"]


def _cifar(folder: Path) -> list[str]:
    """CIFAR's own batches; shrunk as they are read, as the format has one size."""
    path = write_folder(folder / "cifar", cifar()[1])
    return [f"dataset.path={path}", "dataset.resize=pillow_box"]


def _edm_zip(folder: Path) -> list[str]:
    return [f"dataset.path={write_zip(folder / 'images.zip', edm(IMAGES))}"]


def _labelled_edm_zip(folder: Path) -> list[str]:
    return [f"dataset.path={write_zip(folder / 'images.zip', edm(IMAGES, [n % 5 for n in range(IMAGES)]))}"]


def _image_folder(folder: Path) -> list[str]:
    files = {f"{n}.png": png(image) for n, image in enumerate(pixels(IMAGES, 2 * SIDE))}
    return [f"dataset.path={write_folder(folder / 'images', files)}"]


DATASETS: dict[str, Callable[[Path], list[str]]] = {
    "cifar10": _cifar,
    "ffhq": _edm_zip,
    "imagenet64": _labelled_edm_zip,
    "lsun_bedroom": _image_folder,
    "celebahq": _image_folder,
    "folder": _captions,
    "prompts": _prompts,
    "digits": lambda folder: [],
}


def _edm_pickle(folder: Path, config: RunConfig, write: EdmWriter) -> list[str]:
    """As NVIDIA's training writes them: ADM with ImageNet's classes, DDPM++ without, and NCSN++'s features of time."""
    fourier = {"embedding_type": "fourier"} if config.teacher.release.endswith("-ve") else {}
    adm = DhariwalUNet, {"model_channels": 64, "label_dim": 1000}
    kind, settings = adm if config.conditional else (SongUNet, fourier)
    _, path = write.network(kind, DDPM | settings)
    return [f"teacher.path={path}", f"dataset.resolution={SIDE}"]


def _pixel_pipeline(folder: Path, config: RunConfig, write: EdmWriter) -> list[str]:
    unet = UNet2DModel(
        sample_size=SIDE,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "teacher")
    return [f"teacher.path={folder / 'teacher'}", f"dataset.resolution={SIDE}"]


def _stable_diffusion(folder: Path, config: RunConfig, write: EdmWriter) -> list[str]:
    """Stable Diffusion 2.1 at 768 pixels predicts v."""
    pytest.importorskip("transformers")
    import text_pipelines

    prediction = "v_prediction" if getattr(config.dataset, "resolution", 0) == 768 else "epsilon"
    path = text_pipelines.stable_diffusion(folder / "teacher", prediction, size=2 * SIDE)
    return [f"teacher.path={path}", f"dataset.resolution={2 * SIDE}"]


def _deepfloyd(folder: Path, config: RunConfig, write: EdmWriter) -> list[str]:
    pytest.importorskip("transformers")
    import text_pipelines

    return [f"teacher.path={text_pipelines.deepfloyd_1(folder / 'teacher', SIDE)}", f"dataset.resolution={SIDE}"]


def _trained(folder: Path, config: RunConfig, write: EdmWriter) -> list[str]:
    return ["teacher.width=16", "teacher.depth=1", "teacher.budget.images=128"]


TEACHERS: dict[str, Callable[[Path, RunConfig, EdmWriter], list[str]]] = {
    "edm": _edm_pickle,
    "diffusers": _pixel_pipeline,
    "stable_diffusion": _stable_diffusion,
    "deepfloyd": _deepfloyd,
    "trained": _trained,
}


def plain(name: str) -> dict:
    """What the file itself says."""
    return OmegaConf.to_container(OmegaConf.load(config_folder() / "experiment" / f"{name}.yaml"))


def chosen(name: str) -> list[str]:
    """The experiment, and the choices that it leaves to its user."""
    groups = {next(iter(line)).split("/")[-1] for line in plain(name).get("defaults", [])}
    left = {"dataset": "dataset=digits", "methods": "methods=[direct]"}
    return [f"experiment={name}", *(word for group, word in left.items() if group not in groups)]


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def written(registry) -> Callable[[str], RunConfig]:
    """``written(name)``: the experiment's settings, as its user meets them."""

    @functools.cache
    def composed(name: str) -> RunConfig:
        (config,) = compose_runs(chosen(name), registry)
        return config

    return composed


@pytest.fixture(scope="module")
def lpips_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lpips")
    write_random_weights(folder)
    return folder


@pytest.fixture
def words(request, tmp_path, monkeypatch, written) -> Callable[[str], list[str]]:
    """``words(name)``: the experiment's command line, on small files in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def shrunk(name: str) -> list[str]:
        config = written(name)
        if with_lpips(config):
            use_random_weights(request.getfixturevalue("lpips_folder"), monkeypatch)
        write = request.getfixturevalue("edm_writer")
        teacher = TEACHERS[config.teacher.kind](tmp_path, config, write)
        return [*chosen(name), *DATASETS[config.dataset.kind](tmp_path), *teacher, *ABSENT.get(name, [])]

    return shrunk


# --- what is tested --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_composes_as_it_is_written(name, written):
    config = written(name)
    composed = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    asked = {key: value for key, value in plain(name).items() if key != "defaults"}
    asked["methods"] = {method: told for method, told in asked["methods"].items() if method in config.methods}
    assert _given(asked, composed) == asked


def _given(asked, composed):
    """`composed` at the places that `asked` names, numbers in YAML's 1e-4 read as such."""
    if isinstance(asked, dict):
        return {key: _given(value, composed[key]) for key, value in asked.items()}
    return asked if isinstance(composed, float) and float(asked) == composed else composed


@pytest.mark.parametrize("name", by_day(EXPERIMENTS, PLANNED_BY_DAY))
def test_a_dry_run_plans_it(name, words, written, capfd, monkeypatch):
    """With its own batch, budget, steps, grids, samplers and scores."""
    monkeypatch.setenv("COLUMNS", "160")  # a narrower table cuts large numbers off
    with pytest.raises(SystemExit) as done:
        commands.main(["run", *words(name), "device=cpu", "estimate_seconds=0", "--dry-run"])
    said = capfd.readouterr().out
    assert not done.value.code, said
    config = written(name)
    for method in config.methods:
        (line,) = [line for line in said.splitlines() if line.strip(" │").startswith(f"{method} ")]
        assert f"{config.budget.images:,}" in line
    assert "dry run: nothing was run or written" in said and "would fail" not in said


@pytest.mark.slow
@pytest.mark.parametrize("name", by_day(EXPERIMENTS, TWO_STEPS_BY_DAY))
def test_it_takes_two_steps_and_is_scored(name, words, written, registry):
    less = [word for method, words in LESS.items() if method in written(name).methods for word in words.split()]
    images = BATCH * max([STEPS, *(CYCLES.get(method, 0) for method in written(name).methods)])
    configs = compose_runs([*words(name), *SMALL, f"budget.images={images}", *less], registry)
    outcome = run(plan(configs, registry), configs, Progress(Console(file=io.StringIO())), lambda rows: None)
    table = outcome.table
    assert not outcome.failed and list(table["status"].unique()) == ["ok"], table[["method", "nfe", "reason"]]
    students = table[~table["method"].str.startswith("teacher:")]
    assert set(students["method"]) == set(configs[0].methods)
    assert (students["train_images"] == images).all() and (students["images"] == 16).all()
    assert (outcome.folder / "samples.png").is_file()
    if (estimate := estimated(name)) is not None:
        records = [json.loads(file.read_bytes()) for file in outcome.folder.parent.glob("cells/*/train.json")]
        if estimate["lpips"]:  # two images forward, one of them with a gradient
            (rows,) = [rows for rows in records[0]["cost"]["networks"] if rows["counted"] == "distance"]
            assert (rows["forward"], rows["to_input"]) == (2 * images, images)
        made = sum(forwards(record, configs[0]) for record in records)
        assert made == pytest.approx(estimate["forwards"], rel=2e-4)  # of four digits


def forwards(record: dict, config: RunConfig) -> float:
    """Forward-equivalents of a training image, pairs left out: a gradient of weights counts two, of an input one, a
    derivative along a direction two.

    CTM draws its teacher's steps of Heun, n of at most M with P(n) ~ n: they are replaced by their mean, (2 M + 1) / 3.
    """
    cost, name = record["cost"], record["inputs"]["method"]["name"]
    evaluations = cost["teacher_nfe"] + cost["student_nfe"] - evaluations_for_pairs(config, name)
    if name == "ctm":
        evaluations = cost["student_nfe"] + 2 * (2 * config.methods[name].solver_steps + 1) / 3 * cost["images"]
    backward = 2 * cost["student_backward"] - cost["student_backward_input"] + cost["teacher_backward"]
    along = 2 * (cost["teacher_along"] + cost["student_along"])
    return (evaluations + backward + along) / cost["images"]


def with_lpips(config: RunConfig) -> list[str]:
    """The forms of LPIPS that its methods train with."""
    return [value for method in config.methods.values() for value in vars(method).values() if value in [*LPIPS]]


def evaluations_for_pairs(config: RunConfig, method: str) -> int:
    """For all noise-image pairs of `method`, those of a student and losses on them included; 0 if it has none."""
    if method not in PAIRED:
        return 0
    settings = config.methods[method]
    each = Solver.parse(settings.solver).evaluations(settings.steps)
    if method == "reflow":
        return each * settings.pairs * (2 if settings.distil_pairs == "own" else 1)
    return each * (settings.pairs + settings.held_out) + settings.checks * settings.held_out


def estimated(name: str) -> dict[str, float] | None:
    """The estimate in the experiment's comment, as numbers; None where there is none."""
    lines = (config_folder() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    found = ESTIMATE.search(" ".join(line.lstrip("# ") for line in lines if line.startswith("#")))
    if found is None:
        return None
    images, equivalents, gflop, lpips, digits, power, hours = found.groups()
    millions = 1e6 if images.endswith("M") else 1.0
    return {
        "images": float(images.rstrip(" M").replace(",", "")) * millions,
        "forwards": float(equivalents),
        "gflop": float(gflop.replace(",", "")),
        "lpips": float(lpips or 0),
        "flop": float(f"{digits}e{power}"),
        "hours": float(hours.replace(",", "")),
    }


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "smoke"])
def test_its_estimate_adds_up(name, written):
    told = estimated(name)
    assert told is not None, "no line 'Estimate: N images x E forward-equivalents x F GFLOP = ... FLOP, ... GPU-hours'"
    config = written(name)
    assert told["images"] == pytest.approx(config.budget.images, rel=0.005)
    ahead = sum(evaluations_for_pairs(config, method) for method in config.methods)
    (resized,) = lpips_flops([NetworkRows("distance", "LPIPS at 224x224", 0, 0)]).values()
    assert told["lpips"] == any(LPIPS[form].side for form in with_lpips(config)) * round(3 * resized.forward / 1e9)
    flop = ((told["images"] * told["forwards"] + ahead) * told["gflop"] + told["images"] * told["lpips"]) * 1e9
    assert told["flop"] == pytest.approx(flop, rel=0.05)  # of two digits
    assert told["hours"] == pytest.approx(flop / (40e12 * 3600), rel=0.03)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_its_page_names_it(name):
    page = config_folder().parent / "docs" / "experiments.md"
    if not page.is_file():
        pytest.skip("installed without docs")
    assert f"experiment={name}" in page.read_text(encoding="utf-8")


def test_halflives_are_those_of_the_decay_that_their_comment_names():
    """`887 # ...: d = .9999 ...; 128 ln .5 / ln .9999 / 1000` is computed anew."""
    pattern = re.compile(r"ema_halflife_kimg: ([\d.]+) .*; ([\d,]+) ln \.5 / ln (\.\d+) / 1000")
    found = 0
    for name in EXPERIMENTS:
        text = (config_folder() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
        assert yaml.safe_load(text)
        for value, images, decay in pattern.findall(text):
            expected = int(images.replace(",", "")) * math.log(0.5) / math.log(float(decay)) / 1000
            assert float(value) == pytest.approx(expected, rel=0.012), name
            found += 1
    assert found >= 10


def test_gradients_of_mean_losses_are_clipped_as_much_as_those_of_the_published_sums():
    """`3.26e-4 # ...: 1 for a loss summed over 3,072 pixels` is computed anew. Ours are means over pixels."""
    pattern = re.compile(r"grad_clip: ([\d.e-]+) # .*: (\d+) for a loss summed over ([\d,]+) pixels")
    found = {}
    for name in EXPERIMENTS:
        text = (config_folder() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
        for ours, theirs, summed in pattern.findall(text):
            found[name] = float(ours), int(theirs) / int(summed.replace(",", ""))
    assert found.keys() >= {"tract_cifar10", "sida_cifar10"}  # the losses of both programs are sums
    for name, (ours, expected) in found.items():
        assert ours == pytest.approx(expected, rel=0.01), name
