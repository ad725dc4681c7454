"""Exported students: a fresh process without distillbench samples them in one step, and gets the student's images.

The students have random weights, as the export is tested and not the training. All folders are sampled by one process
in which distillbench cannot be imported.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distillbench import Denoiser, Method, MethodConfig, Teacher, UserError
from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Condition, Conditioning
from distillbench.diffusion.samplers import time_like, x_at_t_max
from distillbench.diffusion.schedules import SCHEDULES, VE
from distillbench.execution.run import run
from distillbench.networks import smooth_times
from distillbench.networks.architectures import DiT as PixelDiT
from distillbench.networks.architectures import OfDiffusers, ResidualMLP, UNet
from distillbench.networks.diffusers_calls import Call, ScoreCall
from distillbench.networks.diffusers_wrappers import PixelUNet
from distillbench.networks.edm import DhariwalUNet, SongUNet
from distillbench.records.records import signed
from distillbench.registry import load_registry
from distillbench.runs.config import compose_runs, to_yaml
from distillbench.runs.plan import plan
from distillbench.runs.saved_settings import read_config
from distillbench.system.progress import Progress
from distillbench_boot import Boot
from distillbench_cm import ConsistencyDistillation
from distillbench_direct import Direct
from distillbench_lcm import LatentConsistency
from distillbench_pd import ProgressiveDistillation

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

from diffusers.utils import dynamic_modules_utils  # noqa: E402

from distillbench.builtin.diffusers_pipelines import Diffusers  # noqa: E402
from distillbench.export import bundle, run_export  # noqa: E402
from distillbench.export import card as export_card  # noqa: E402
from distillbench.export import write as exporting  # noqa: E402
from distillbench.export.fold import OneStep, ddim_of, fit, fold, record_step  # noqa: E402
from distillbench.export.forms import Form, parts_of  # noqa: E402

try:
    from text_pipelines import PROMPTS
except ImportError:  # of transformers
    PROMPTS = None

ALLOWED = 1e-4
PIXELS = (3, 8, 8)
SILENT = Progress(None)

FRESH = """
import json, sys
sys.modules["distillbench"] = None  # an import of it fails
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for job in json.load(open(sys.argv[1])):
    pipeline = DiffusionPipeline.from_pretrained(job["folder"], **job["loading"])
    pipeline.set_progress_bar_config(disable=True)
    steps, scheduler = [], getattr(pipeline, "scheduler", None)
    if scheduler is not None:
        step = scheduler.step
        scheduler.step = lambda *a, **k: (steps.append(step(*a, **k)), steps[-1])[1]
    generator = torch.Generator().manual_seed(0)
    images = pipeline(**job["asks"], generator=generator, output_type="np").images
    found = {"images": np.asarray(images), "name": type(pipeline).__name__}
    if steps:
        found["x_0"] = (steps[-1][0] if isinstance(steps[-1], tuple) else steps[-1].prev_sample).numpy()
    if scheduler is None:
        found["x_0"] = pipeline(**job["asks"], generator=generator.manual_seed(0), output_type="latent").images.numpy()
    np.savez(job["answer"], **found)
"""


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """Where diffusers copies pipelines' own code to: not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield


# --- students --------------------------------------------------------------------------------------------------------


class Jump(Method):
    """The student itself, at t_max."""

    name, paper, needs_data = "jump", "none", False
    Config = MethodConfig

    def train_step(self, batch):
        raise NotImplementedError

    def sample(self, noise, nfe, c):
        eps, schedule = noise(0), self.teacher.schedule
        return self.student(x_at_t_max(schedule, eps), time_like(eps, schedule.t_max), c)


def unet(channels: int = 3, **settings: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=settings.pop("out_channels", channels),
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=settings.pop("down_block_types", ("DownBlock2D", "AttnDownBlock2D")),
        up_block_types=settings.pop("up_block_types", ("AttnUpBlock2D", "UpBlock2D")),
        norm_num_groups=4,
        attention_head_dim=8,
        **settings,
    ).eval()


def teacher_of(
    network: nn.Module, prediction: str, schedule: Any, asked: Conditioning = WITHOUT_CLASSES, shape: Any = PIXELS
) -> Teacher:
    schedule = SCHEDULES[schedule]() if isinstance(schedule, str) else schedule
    return Teacher("made", Denoiser(network, schedule, prediction), shape, "0" * 64, conditioning=asked)


def student_of(teacher: Teacher, method: type[Method] = Jump, **settings: Any) -> Method:
    """A student of `method` whose weights are random, also those that start at zero."""
    torch.manual_seed(1)
    made = method(method.Config(**settings), teacher).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return made


@dataclass
class Exported:
    """A folder, and what it should give."""

    folder: Path
    form: Form
    x_0: Tensor  # unclipped, of latents where the teacher's are
    images: Tensor
    difference: float = 0.0
    step: OneStep | None = None
    found: dict[str, np.ndarray] = field(default_factory=dict)


def exported(folder: Path, method: Method, source: Any = None, prompts: Any = None) -> Exported:
    folder.mkdir()
    teacher = method.teacher
    parts = None if source is None else parts_of(source)
    form, difference = exporting.write_pipeline(method, teacher, parts, prompts, folder)
    eps = torch.randn(8, *teacher.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x_0 = method.sample(lambda k: eps, 1, teacher.conditioning.of_images(range(8), "cpu"))
        images = x_0 if teacher.decode is None else teacher.decode(x_0)
    seen = record_step(method, eps, teacher.conditioning.of_images(range(8), "cpu"))
    return Exported(folder, form, x_0, images.clamp(-1, 1), difference, fit(seen, fold(seen)))


def smooth(network: nn.Module) -> nn.Module:
    """The network with features of time as continuous-time methods need them."""
    return smooth_times(Denoiser(network, SCHEDULES["vp_cosine"](), "v")).network


def wrapped(prediction: str, schedule: Any, call: Call = Call(1000.0), asked=WITHOUT_CLASSES, **settings):  # noqa: B008
    return teacher_of(PixelUNet(unet(**settings), call), prediction, schedule, asked)


CLASSES = Conditioning(4)
GUIDED = Conditioning(4, 3.0, (1.0, 5.0))
SONG = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 8, "channel_mult": [1, 2]}
SONG |= {"num_blocks": 1, "attn_resolutions": [4]}
NCSN = {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
NCSN |= {"channel_mult_noise": 2}
SKIPS = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}
SKIPS |= {"time_embedding_type": "fourier"}
SCORE = ScoreCall(0.5)

# name: (the pipeline that it becomes, the student)
CASES: dict[str, tuple[str, Callable[[], Method]]] = {
    "eps": ("DDIMPipeline", lambda: student_of(wrapped("eps", "ddpm_linear"))),
    "v": ("DDIMPipeline", lambda: student_of(wrapped("v", "vp_linear"))),
    "x0": ("DDIMPipeline", lambda: student_of(wrapped("x0", "vp_cosine"))),
    "flow": ("DDIMPipeline", lambda: student_of(wrapped("flow", "flow_matching"))),
    "edm": ("DDIMPipeline", lambda: student_of(wrapped("edm", "ve", Call(1.0)))),
    "eps on ve, k = 80": ("DDIMPipeline", lambda: student_of(wrapped("eps", "ve", Call(0.5)))),
    "learned variance": ("DDIMPipeline", lambda: student_of(wrapped("v", "vp_linear", out_channels=6))),
    "fourier": (
        "DDIMPipeline",
        lambda: student_of(wrapped("x0", VE(0.02, 4.0), Call(1.0), time_embedding_type="fourier")),
    ),
    "score, centred": (
        "DDIMPipeline",
        lambda: student_of(
            wrapped("eps", VE(0.02, 4.0), SCORE, time_embedding_type="fourier", center_input_sample=True)
        ),
    ),
    "score, not centred": (
        "OneStepPipeline",
        lambda: student_of(wrapped("eps", VE(0.02, 4.0), SCORE, time_embedding_type="fourier")),
    ),
    "ncsn++ of diffusers": ("OneStepPipeline", lambda: student_of(wrapped("eps", VE(0.02, 4.0), SCORE, **SKIPS))),
    "boot": ("DDIMPipeline", lambda: student_of(wrapped("v", "ddpm_linear"), Boot)),
    "boot of eps": ("DDIMPipeline", lambda: student_of(wrapped("eps", "ddpm_scaled_linear"), Boot)),
    "pd": ("DDIMPipeline", lambda: student_of(wrapped("v", "ddpm_linear"), ProgressiveDistillation)),
    "direct": ("DDIMPipeline", lambda: student_of(wrapped("v", "ddpm_linear"), Direct)),
    "cm": ("DDIMPipeline", lambda: student_of(wrapped("eps", "ddpm_linear"), ConsistencyDistillation)),
    "unet": ("DDIMPipeline", lambda: student_of(teacher_of(UNet(PIXELS, 8, 1), "v", "vp_cosine"), Boot)),
    "smooth unet": (
        "DDIMPipeline",
        lambda: student_of(teacher_of(smooth(UNet(PIXELS, 8, 1)), "v", "vp_cosine"), Boot),
    ),
    "unet of classes": (
        "OneStepPipeline",
        lambda: student_of(teacher_of(UNet(PIXELS, 8, 1, 4), "v", "vp_cosine", GUIDED), Boot),
    ),
    "unet from a config": (
        "DDIMPipeline",
        lambda: student_of(
            teacher_of(OfDiffusers(PIXELS, {"_class_name": "UNet2DModel", **unet().config}), "v", "vp_cosine"), Boot
        ),
    ),
    "dit of pixels": (
        "OneStepPipeline",
        lambda: student_of(teacher_of(PixelDiT(PIXELS, 16, 2), "v", "vp_cosine"), Boot),
    ),
    "dit of pixels and classes": (
        "OneStepPipeline",
        lambda: student_of(teacher_of(PixelDiT(PIXELS, 16, 2, 4), "v", "vp_cosine", GUIDED), Boot),
    ),
    "classes": (
        "OneStepPipeline",
        lambda: student_of(wrapped("v", "ddpm_linear", asked=CLASSES, num_class_embeds=5)),
    ),
    "classes, w = 3 of a range": (
        "OneStepPipeline",
        lambda: student_of(wrapped("eps", "ddpm_linear", asked=GUIDED, num_class_embeds=5), Boot),
    ),
    "mlp": (
        "OneStepPipeline",
        lambda: student_of(teacher_of(ResidualMLP((1, 8, 8), 32, 2), "v", "vp_cosine", shape=(1, 8, 8)), Boot),
    ),
    "mlp of classes, guided": (
        "OneStepPipeline",
        lambda: student_of(
            teacher_of(ResidualMLP((1, 8, 8), 32, 2, 4), "v", "vp_cosine", GUIDED, (1, 8, 8)), ConsistencyDistillation
        ),
    ),
    "ddpm++ of edm": ("OneStepPipeline", lambda: student_of(teacher_of(SongUNet(**SONG), "edm", "ve"), Boot)),
    "ncsn++ of edm": (
        "OneStepPipeline",
        lambda: student_of(teacher_of(SongUNet(**SONG, **NCSN, label_dim=4), "edm", "ve", CLASSES)),
    ),
    "adm of edm": (
        "OneStepPipeline",
        lambda: student_of(teacher_of(DhariwalUNet(**SONG, label_dim=4, augment_dim=9), "edm", "ve", CLASSES)),
    ),
}


def autoencoder(**settings: Any) -> Any:
    torch.manual_seed(5)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **settings,
    ).eval()


def dit_folder(folder: Path) -> Path:
    torch.manual_seed(1)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=12,
    ).eval()  # fmt: skip
    labels = {0: "tench, Tinca tinca", 1: "goldfish"}
    pipeline = diffusers.DiTPipeline(transformer, autoencoder(), diffusers.DDIMScheduler(clip_sample=False), labels)
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text()) | {"id2label": labels}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def latent_folder(folder: Path) -> Path:
    """An unconditional pipeline with an AutoencoderKL."""
    scheduler = diffusers.DDPMScheduler(clip_sample=False, prediction_type="v_prediction")
    diffusers.DDPMPipeline(unet(4), scheduler).save_pretrained(folder)
    autoencoder(shift_factor=0.1).save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text()) | {"vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def ldm_folder(folder: Path) -> Path:
    torch.manual_seed(5)
    vq = diffusers.VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=3, sample_size=16,
        num_vq_embeddings=16,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    diffusers.LDMPipeline(vq, unet(3), scheduler).save_pretrained(folder)
    return folder


FOLDERS: dict[str, tuple[str, Callable[[Path], Path], Conditioning]] = {
    "dit, w = 3 of a range": ("DiTPipeline", dit_folder, Conditioning(12, 3.0, (1.0, 5.0))),
    "latents": ("OneStepPipeline", latent_folder, WITHOUT_CLASSES),
    "latents, quantised": ("LDMPipeline", ldm_folder, WITHOUT_CLASSES),
}


def source_of(folder: Path, asked: Conditioning) -> Diffusers:
    config = Diffusers.Config(kind="diffusers", path=str(folder))
    return Diffusers(config, SimpleNamespace(shape=(3, 16, 16)), Path("cache"), "cpu", asked)


NIGHTLY = {  # a prediction, method or architecture whose way to a folder another case takes too
    *("v", "flow", "fourier", "boot of eps", "pd", "direct", "unet from a config", "dit of pixels", "classes"),
    "ddpm++ of edm",
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory, students, of_texts) -> dict[str, Exported]:
    """Every case but the nightly ones, sampled in one fresh process, as importing diffusers takes long."""
    base = tmp_path_factory.mktemp("exported")
    made = {"run": from_a_run(students, base / "run", "boot", 1, {"batch_size": 8}, {"trust_remote_code": True})}
    if of_texts is not None:
        asks = {"prompt": PROMPTS, "num_inference_steps": 1, "guidance_scale": 1.0}
        made["texts"] = from_a_run(of_texts, base / "texts", "boot", None, asks, {})
    made |= export_cases(base, CASES.keys() - NIGHTLY)
    for number, (name, (_, write, asked)) in enumerate(FOLDERS.items()):
        source = source_of(write(base / f"teacher {number}"), asked)
        method = student_of(source.load(SILENT).conditioned(asked), Boot)
        made[name] = exported(base / f"latent {number}", method, source)
    sample_afresh(base, list(made.values()))
    return made


@pytest.fixture(scope="module")
def at_night(tmp_path_factory) -> dict[str, Exported]:
    """The nightly cases, sampled in one fresh process."""
    base = tmp_path_factory.mktemp("nightly")
    made = export_cases(base, NIGHTLY)
    sample_afresh(base, list(made.values()))
    return made


def export_cases(base: Path, names: Iterable[str]) -> dict[str, Exported]:
    return {name: exported(base / str(number), CASES[name][1]()) for number, name in enumerate(sorted(names))}


def from_a_run(ran: Ran, output: Path, method: str, seed: int | None, asks: Any, loading: Any) -> Exported:
    """A student of a run, exported as the command does it."""
    log = io.StringIO()
    exporting.export(ran.folder, method, seed, output, ran.registry, Progress(Console(file=log, width=300)))
    (pipeline,) = re.findall(r"a (\w+); largest difference", log.getvalue())
    student = run_export.find_student(ran.folder, method, seed, ran.registry, SILENT)
    teacher, size = student.teacher, asks.get("batch_size") or len(asks["prompt"])
    eps = torch.randn(size, *teacher.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x_0 = student.method.sample(lambda k: eps, 1, teacher.conditioning.of_images(range(size), "cpu"))
        images = x_0 if teacher.decode is None else teacher.decode(x_0)
    form = Form(pipeline, lambda folder: None, loading, asks, "")
    return Exported(output, form, x_0, images.clamp(-1, 1), 0.0, OneStep(0, 1, 1, 0))


def sample_afresh(base: Path, folders: list[Exported]) -> None:
    """Sample the folders in a process that cannot import distillbench."""
    jobs = []
    for number, one in enumerate(folders):
        answer = str(base / f"answer {number}.npz")
        asked = {"loading": one.form.loading, "asks": one.form.asks}
        jobs.append({"folder": str(one.folder), "answer": answer, **asked})
    (base / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_HOME": str(base / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", FRESH, str(base / "jobs.json")]
    ran = subprocess.run(command, env=environment, cwd=base, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for job, one in zip(jobs, folders, strict=True):
        one.found = dict(np.load(job["answer"]))


def check_case(one: Exported, pipeline: str, record: Callable[[str, str], None]) -> None:
    images = torch.from_numpy(one.found["images"]).permute(0, 3, 1, 2) * 2 - 1
    difference = float((images - one.images).abs().max())
    rounding = 4 * torch.finfo(torch.float32).eps * float(one.x_0.abs().max())  # where it is clipped to [-1, 1]
    record("max_difference", f"{difference:.1e}")
    assert str(one.found["name"]) == pipeline == one.form.pipeline
    assert one.images.std() > 0.01 and (one.images[0] - one.images[1]).abs().max() > 0.01  # there is what to compare
    assert difference <= max(ALLOWED, rounding) and one.difference <= max(ALLOWED, rounding)
    if "x_0" in one.found:  # before it is clipped: up to what float32 leaves of the terms
        assert one.step is not None
        unclipped = float((torch.from_numpy(one.found["x_0"]) - one.x_0).abs().max())
        record("max_difference_unclipped", f"{unclipped:.1e} of {float(one.x_0.abs().max()):.1f}")
        assert unclipped <= ALLOWED * max(1.0, float(one.x_0.abs().max()))


@pytest.mark.parametrize("name", [name for name in CASES if name not in NIGHTLY])
def test_a_fresh_process_samples_the_same_images(everything, name, record_property):
    check_case(everything[name], CASES[name][0], record_property)


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(NIGHTLY))
def test_a_fresh_process_samples_the_same_images_of_further_cases(at_night, name, record_property):
    check_case(at_night[name], CASES[name][0], record_property)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_fresh_process_decodes_the_same_images(everything, name, record_property):
    check_case(everything[name], FOLDERS[name][0], record_property)


def test_folders_hold_no_pickles_no_local_paths_and_no_import_of_distillbench(everything):
    for one in everything.values():
        for file in one.folder.rglob("*"):
            assert file.is_dir() or file.suffix in (".safetensors", ".json", ".py", ".md", ".txt")
            assert file.is_dir() or one.folder.name not in ("run", "texts") or file.stat().st_mode & 0o044
            if file.suffix in (".py", ".json", ".md"):
                text = file.read_text()
                assert not re.search(r"^\s*(from|import) distillbench", text, re.MULTILINE)
                assert str(one.folder.parent.parent) not in text  # where all of this runs


def test_a_dit_pipeline_keeps_the_names_of_classes(everything):
    index = json.loads((everything["dit, w = 3 of a range"].folder / "model_index.json").read_text())
    assert index["id2label"] == {"0": "tench, Tinca tinca", "1": "goldfish"}


@pytest.mark.parametrize("name", ["eps", "boot", "dit, w = 3 of a range"])
def test_more_than_one_step_is_an_error(everything, name):
    one = everything[name]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(one.folder)
    pipeline.set_progress_bar_config(disable=True)
    for steps in (2, 50):
        with pytest.raises((ValueError, IndexError)):
            pipeline(**{**one.form.asks, "num_inference_steps": steps})


def test_the_bundled_pipeline_checks_its_arguments(everything):
    folder = everything["mlp of classes, guided"].folder
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="class_labels, from 0 to 3"):
        pipeline(batch_size=2)
    with pytest.raises(ValueError, match="lie from 0 to 3"):
        pipeline(class_labels=[4])
    with pytest.raises(ValueError, match="output_type"):
        pipeline(class_labels=[0], output_type="gif")
    eps = torch.randn(2, 1, 8, 8)
    (a,) = pipeline(class_labels=[3, 1], latents=eps, output_type="latent", return_dict=False)
    b = pipeline(class_labels=torch.tensor([3, 1]), latents=eps, output_type="latent").images
    assert torch.equal(a, b)
    (picture,) = pipeline(class_labels=[0]).images
    assert picture.size == (8, 8)
    with pytest.raises(ValueError, match="no class_labels"):
        mlp = diffusers.DiffusionPipeline.from_pretrained(everything["mlp"].folder, trust_remote_code=True)
        mlp(class_labels=[0])


# --- one step of DDIM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0, 1e-5, 0.3, 0.999999, 1, 1.0000001, 14.6, 2696])
def test_one_step_as_ddim(a, record_property):
    ddim = ddim_of(OneStep(a, -1.7, 1.0, 0.0))
    scheduler = diffusers.DDIMScheduler(**ddim.settings)
    scheduler.set_timesteps(1)
    eps, out = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    got = scheduler.step(out * ddim.gain, scheduler.timesteps[0], eps).prev_sample
    wanted = a * eps.double() - 1.7 * out.double()
    difference = float((got - wanted).abs().max()) / max(1, a)
    record_property("max_difference", f"{difference:.1e}")
    assert difference < 3e-6


def test_a_negative_step_is_not_ddim():
    assert ddim_of(OneStep(-0.1, 1.0, 1.0, 0.0)) is None


# --- what is not exported --------------------------------------------------------------------------------------------


class Odd(Jump):
    """A sampler that is not one affine step, in the way `how`."""

    @dataclasses.dataclass
    class Config(MethodConfig):
        how: str = ""

    def sample(self, noise, nfe, c):
        eps, t = noise(0), time_like(noise(0), self.teacher.schedule.t_max)
        ways: dict[str, Callable[[], Tensor]] = {
            "clipped": lambda: self.student(eps, t, c).clamp(-0.1, 0.1),
            "twice": lambda: self.student(self.student(eps, t, c), t, c),
            "never": lambda: eps,
            "fresh": lambda: self.student(noise(1), t, c),
            "squared": lambda: self.student(eps**3, t, c),
            "times": lambda: self.student(eps, t * torch.linspace(0.5, 1, len(t)).view(-1, 1, 1, 1), c),
            "nan": lambda: self.student(eps, t, c) * torch.nan,
            "embedded": lambda: self.student(eps, t, c, eps.flatten(1)[:, :32]),
        }
        return ways[self.config.how]()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("clipped", r"x_0 is not a eps \+ b network\(k eps\), up to \d\.\de-\d\d of it"),
        ("twice", "evaluates its network 2 times"),
        ("never", "evaluates its network 0 times"),
        ("fresh", "draws further noise"),
        ("squared", "input is not k eps"),
        ("times", "time differs from image to image"),
        ("nan", "not finite"),
        ("embedded", "beside the time differs"),
    ],
)
def test_other_forms_of_a_step_are_errors(tmp_path, how, message):
    student = student_of(wrapped("x0", "vp_cosine"), Odd, how=how)
    with pytest.raises(UserError, match=message):
        exporting.write_pipeline(student, student.teacher, None, None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_network_is_an_error(tmp_path):
    class Strange(ResidualMLP):
        pass

    student = student_of(teacher_of(Strange((1, 8, 8)), "v", "vp_cosine", shape=(1, 8, 8)))
    with pytest.raises(
        UserError, match=r"network of class Strange\. Possible: DhariwalUNet, DiT, OfDiffusers, PixelUNet"
    ):
        exporting.write_pipeline(student, student.teacher, None, None, tmp_path)


def test_a_negative_step_becomes_the_bundled_pipeline(tmp_path, record_property):
    class Backwards(Jump):
        def sample(self, noise, nfe, c):
            return super().sample(noise, nfe, c) - 0.5 * noise(0)

    one = exported(tmp_path / "out", student_of(wrapped("x0", "vp_cosine"), Backwards))
    assert one.form.pipeline == "OneStepPipeline" and one.step.a == pytest.approx(-0.5)


def test_a_difference_is_an_error_and_nothing_is_written(tmp_path, monkeypatch, students):
    """The weights are written with an error: the check finds it and the folder is removed."""
    written = bundle.save_file
    spoilt = lambda tensors, *more, **words: written({n: t * 1.001 for n, t in tensors.items()}, *more, **words)
    monkeypatch.setattr(bundle, "save_file", spoilt)
    with pytest.raises(UserError, match=r"does not give the student's images: they differ by .*Nothing was written"):
        exporting.export(students.folder, "boot", 0, tmp_path / "out", students.registry, SILENT)
    assert not list(tmp_path.iterdir())


# --- own networks as components --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network",
    [
        ResidualMLP((2, 4, 6), 16, 3, 5),
        SongUNet(**SONG, **NCSN),
        SongUNet(**SONG | {"channel_mult": [1]}, decoder_type="skip", encoder_type="skip", augment_dim=3),
        DhariwalUNet(**SONG | {"channel_mult_emb": 3}, label_dim=2),
    ],
)
def test_a_network_is_rebuilt_from_its_settings(network):
    shape = (2, 4, 6) if isinstance(network, ResidualMLP) else PIXELS
    settings = bundle.SETTINGS[type(network)](network, shape)
    twin = bundle.OneStepNetwork(type(network).__name__, json.loads(json.dumps(settings)))
    twin.network.load_state_dict(network.state_dict())
    x, labels = torch.randn(2, *shape), torch.tensor([0, 1])
    with torch.no_grad():
        wanted = network.eval()(x, torch.zeros(2), None, Condition(labels))
        assert torch.equal(twin.eval()(x, 7, labels).sample, wanted)


def test_source_stands_alone():
    """The architecture's module, run where nothing of distillbench can be imported."""
    for architecture in bundle.SETTINGS:
        source = bundle.source_of(architecture)
        assert "import distillbench" not in source and "from distillbench" not in source
        compile(source, "network.py", "exec")


# --- runs ------------------------------------------------------------------------------------------------------------

SMALL = [
    "experiment=smoke", "budget.images=200", "batch_size=64", "evaluation.images=16", "evaluation.batch_size=16",
    "evaluation.timing=off", "evaluation.metrics=[teacher_rmse]", "device=cpu", "run_name=here",
]  # fmt: skip


@dataclass
class Ran:
    """A finished run."""

    folder: Path
    registry: Any
    configs: list[Any]

    @property
    def results(self) -> Path:
        return self.folder.parent


def go(results: Path, *words: str) -> Ran:
    registry = load_registry()
    configs = compose_runs([*words, f'results_dir="{results}"'], registry)
    log = io.StringIO()
    outcome = run(plan(configs, registry), configs, Progress(Console(file=log, width=300)), lambda rows: None)
    assert not outcome.failed, log.getvalue()
    return Ran(outcome.folder, registry, configs)


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> Ran:
    """`experiment=smoke` on digits, two seeds of two methods."""
    words = ["methods=[boot,cm]", "dataset=digits", "seed=0,1", "evaluation.seeds=[0,1]", *SMALL]
    return go(tmp_path_factory.mktemp("run") / "results", *words)


@pytest.fixture(scope="module")
def of_texts(tmp_path_factory) -> Ran | None:
    """A latent text-to-image pipeline through BOOT with random guidance, and scores; None without transformers."""
    if PROMPTS is None:
        return None
    import text_pipelines

    base = tmp_path_factory.mktemp("texts")
    text_pipelines.stable_diffusion(base / "pipeline")
    (base / "prompts.txt").write_text("\n".join(PROMPTS))
    return go(
        base / "results", "methods=[boot]", "dataset=prompts", f'dataset.path="{base}/prompts.txt"',
        "dataset.resolution=16", "teacher=stable_diffusion", f'teacher.path="{base}/pipeline"', "conditional=true",
        "guidance=3", "guidance_range=[1,5]", *SMALL, "budget.images=32", "batch_size=8", "evaluation.nfe=[1]",
    )  # fmt: skip


def test_from_a_run_to_a_folder(everything, record_property):
    check_case(everything["run"], "OneStepPipeline", record_property)
    names = {path.name for path in everything["run"].folder.iterdir()}
    assert names == {"README.md", "model_index.json", "network", "pipeline.py"}
    assert not list(everything["run"].folder.parent.glob(".*"))


@pytest.mark.skipif(PROMPTS is None, reason="the text encoder is of transformers, which is not installed")
def test_texts(everything, record_property):
    check_case(everything["texts"], "StableDiffusionPipeline", record_property)
    card = (everything["texts"].folder / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "w = 3" in card and r"\[1.0, 5.0\]" in card
    assert "guidance_scale` must be 1" in card


@pytest.mark.skipif(PROMPTS is None, reason="the text encoder is of transformers, which is not installed")
def test_a_latent_consistency_model_is_one_of_diffusers(tmp_path):
    """A student with a projected w in one step, and its U-Net in diffusers' own pipeline of LCM, with its scheduler."""
    import text_pipelines
    from distillbench.builtin.stable_diffusion import StableDiffusion

    folder = text_pipelines.stable_diffusion(tmp_path / "pipeline")
    asked = Conditioning(len(PROMPTS), 8.5, (6.0, 16.0))
    config = StableDiffusion.Config(kind="stable_diffusion", path=str(folder))
    source = StableDiffusion(config, text_pipelines.Captions(text_pipelines.Captions.Config()), tmp_path, "cpu", asked)
    method = student_of(source.load(SILENT).conditioned(asked), LatentConsistency, w_input="projected")
    one = exported(tmp_path / "exported", method, source, PROMPTS)
    assert one.form.pipeline == "StableDiffusionPipeline" and one.difference < ALLOWED
    assert "`unet_with_w` has the U-Net as it was trained" in one.form.fold
    unet = diffusers.UNet2DConditionModel.from_pretrained(one.folder, subfolder="unet_with_w")
    theirs = diffusers.LatentConsistencyModelPipeline.from_pretrained(
        folder, unet=unet, safety_checker=None, scheduler=diffusers.LCMScheduler.from_pretrained(folder / "scheduler")
    )
    theirs.set_progress_bar_config(disable=True)
    eps = torch.randn(8, *method.teacher.shape, generator=torch.Generator().manual_seed(0))
    x_t = (1 - theirs.scheduler.alphas_cumprod[-1]).sqrt() * eps  # their pipeline starts from eps itself
    asks = {"num_inference_steps": 1, "latents": x_t, "output_type": "latent"}
    sample = lambda w: theirs([PROMPTS[i % len(PROMPTS)] for i in range(8)], guidance_scale=w, **asks).images
    largest = float(one.x_0.abs().max())
    torch.testing.assert_close(sample(8.5), one.x_0, atol=1e-5 * largest, rtol=0)
    assert (sample(6.0) - one.x_0).abs().max() > 0.01 * largest


def test_the_card(students, tmp_path):
    out = tmp_path / "out"
    exporting.export(students.folder, "cm", 0, out, students.registry, SILENT)
    text = (out / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("---\n", 1)
    header = yaml.safe_load(front)
    assert header["library_name"] == "diffusers" and header["license"] == "unknown" and "cm" in header["tags"]
    environment = json.loads((students.folder / "environment.json").read_text())
    commit = (environment["git"] or {}).get("commit", "not known")
    for words in (
        "trained-511ee56c", "Song et al. 2023", "CC BY 4.0", "200 images, batch 64, seed 0", commit, "steps: 12",
        "trust_remote_code=True", "n = 16 images per sampling seed, means over 2 sampling seeds", "over training seeds",
        f"torch {torch.__version__.split('+')[0]}", "a eps + b F(k eps + q)", r"teacher\_rmse", "200 images, ",
    ):  # fmt: skip
        assert words in body
    assert str(tmp_path) not in text and str(students.results) not in text
    example = re.search(r"```python\n(.*?)```", body, re.DOTALL).group(1)
    space: dict[str, Any] = {}
    exec(example.replace("path/to/this/folder", str(out)), space)
    assert len(space["images"]) == 4


def test_third_party_text_is_escaped_in_a_card():
    assert export_card.plain("a|b\n<script>[x](y)`") == r"a\|b \<script\>\[x\](y)\`"
    assert export_card._fenced("a ```` b", "json") == "`````json\na ```` b\n`````"


def test_settings_are_read_as_they_were_written(students):
    text = (students.folder / "config.yaml").read_text()
    assert read_config(text, students.registry) == students.configs
    assert "---\n".join(map(to_yaml, read_config(text, students.registry))) == text
    older = text.replace("\nmicrobatch: 0\n", "\naccumulate: 1\n")
    assert older != text and read_config(older, students.registry) == students.configs


@pytest.mark.parametrize(
    ("method", "seed", "message"),
    [
        ("boot", None, r"the run has 2 students of boot: name a seed, or one of boot-seed0-\w+, boot-seed1-\w+"),
        ("boot", 7, r"no weights of boot \(seed 7\)\. Seeds that it has: 0, 1"),
        ("boat", 0, r"no method 'boat' in the run 'here'\. Did you mean 'boot'\? Possible: boot, cm"),
        ("pd", 0, r"no method 'pd' in the run 'here'"),
    ],
)
def test_an_ambiguous_or_unknown_student_is_an_error(students, tmp_path, method, seed, message):
    with pytest.raises(UserError, match=message):
        exporting.export(students.folder, method, seed, tmp_path / "out", students.registry, SILENT)
    assert not list(tmp_path.iterdir())


def test_a_student_by_the_name_of_its_weights(students, tmp_path):
    (file,) = (students.folder / "weights").glob("boot-seed1-*")
    exporting.export(students.folder, file.stem, None, tmp_path / "out", students.registry, SILENT)
    assert "seed 1" in (tmp_path / "out" / "README.md").read_text()


def test_an_existing_output_is_not_overwritten(students, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="exists already"):
            exporting.export(students.folder, "boot", 0, output, students.registry, SILENT)
    (tmp_path / "empty").mkdir()
    exporting.export(students.folder, "boot", 0, tmp_path / "empty", students.registry, SILENT)
    assert (tmp_path / "empty" / "model_index.json").is_file()


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(signed(json.loads(file.read_text()) | changes)))


def no_weights(ran: Ran) -> None:
    for file in ran.results.glob("**/*.safetensors"):
        if file.name.startswith(("student", "boot")):
            file.unlink()


def other_weights(ran: Ran) -> None:
    for file in [*ran.results.glob("cells/*/student.safetensors"), *ran.results.glob("here/weights/*")]:
        tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
        file.unlink()
        save_file(tensors, file)


def each(pattern: str, change: Callable[[Path], Any]) -> Callable[[Ran], None]:
    return lambda ran: [change(file) for file in ran.results.glob(pattern)] and None


def of_another_version(ran: Ran) -> None:
    file = ran.folder / "config.yaml"
    file.write_text(file.read_text().replace("batch_size:", "batch_sizes:", 1))


def of_other_settings(ran: Ran) -> None:
    file = ran.folder / "config.yaml"
    file.write_text(file.read_text().replace("lr: 0.002", "lr: 0.003"))


def failed_in_the_table(ran: Ran) -> None:
    for file in ran.folder.glob("weights/boot*"):
        file.unlink()
    table = ran.folder / "table.csv"
    text = re.sub(r"^(.*,boot,0,.*?),ok,[^,]*", r"\1,diverged,the loss is nan", table.read_text(), flags=re.MULTILINE)
    table.write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (each("here/config.yaml", Path.unlink), r"no run in '.*here': it has no config\.yaml"),
        (each("here/table.csv", Path.unlink), r"no run in '.*here': it has no table\.csv"),
        (of_another_version, r"config\.yaml cannot be read; it may be of another version"),
        (of_other_settings, r"config\.yaml of '.*here' does not describe the training boot-seed0-"),
        (no_weights, r"no weights of boot \(seed 0\)"),
        (other_weights, r"weights of boot-seed0-\w+ are missing or damaged"),
        (each("cells/*/train.json", Path.unlink), r"record of boot-seed0-(\w+) is missing: no cells/\1/train\.json"),
        (each("cells/*/train.json", lambda f: f.write_text("{")), r"boot-seed0-\w+ cannot be read: .* is damaged"),
        (each("cells/*/train.json", lambda f: edited(f, status="failed", reason="nan")), r"not trained.*failed: nan"),
        (failed_in_the_table, r"boot \(seed 0\) was not trained to the end: diverged: the loss is nan"),
    ],
)
def test_damaged_runs_are_errors(students, tmp_path, damage, message):
    shutil.copytree(students.results, tmp_path / "results")
    ran = dataclasses.replace(students, folder=tmp_path / "results" / "here")
    damage(ran)
    with pytest.raises(UserError, match=message):
        exporting.export(ran.folder, "boot", 0, tmp_path / "out", ran.registry, SILENT)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_runs_is_not_a_run(students, tmp_path):
    with pytest.raises(UserError, match=r"it has no config\.yaml\. Runs in it: here"):
        exporting.export(students.results, "boot", 0, tmp_path / "out", students.registry, SILENT)


def test_a_student_that_needs_several_steps_is_an_error(students, tmp_path, monkeypatch):
    monkeypatch.setattr(Boot, "supports", lambda self, nfe: nfe in (2, 4))
    with pytest.raises(UserError, match=r"boot does not sample in one step.*It does 2, 4"):
        exporting.export(students.folder, "boot", 0, tmp_path / "out", students.registry, SILENT)
