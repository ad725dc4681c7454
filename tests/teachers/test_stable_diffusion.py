"""Stable Diffusion as a teacher: the same images as diffusers' own pipeline, texts encoded once, and whole runs."""

import dataclasses
import io
import json
from functools import partial

import pytest

pytest.importorskip("transformers")

import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console

import text_pipelines
from distillbench import UserError
from distillbench.builtin import stable_diffusion
from distillbench.builtin.stable_diffusion import StableDiffusion
from distillbench.diffusion.conditioning import Conditioning
from distillbench.diffusion.samplers import Solver, ddim
from distillbench.networks.diffusers_wrappers import Autoencoder
from distillbench.runs import cell_training
from distillbench.system.progress import Progress
from text_pipelines import PROMPTS, TOKENS, WIDTH, Captions, run_here

SILENT = Progress(Console(file=io.StringIO()))


def source(folder, cache, size=16, w=1.0, w_range=None, **settings):
    config = StableDiffusion.Config(kind="stable_diffusion", path=str(folder), **settings)
    dataset = Captions(Captions.Config(size=size))
    return StableDiffusion(config, dataset, cache / "teachers", "cpu", Conditioning(dataset.classes, w, w_range))


def loaded(folder, cache, **settings):
    made = source(folder, cache, **settings)
    return made.load(SILENT).conditioned(made.conditioning)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline for each prediction type."""
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: text_pipelines.stable_diffusion(folder / kind, kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


# --- the same images -------------------------------------------------------------------------------------------------


def diffusers_answers(folder, latents, w, steps, output, **scheduler):
    """What diffusers' own pipeline makes of `latents`, image i of prompt i, with DDIM."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    kind = pipeline.scheduler.config.prediction_type
    pipeline.scheduler = text_pipelines.stable_diffusion_scheduler(kind, **scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=PROMPTS[: len(latents)],
        latents=latents,
        guidance_scale=w,
        num_inference_steps=steps,
        eta=0.0,
        output_type=output,
    ).images


FEW = [("epsilon", "leading", 5, 7.5), ("v_prediction", "trailing", 5, 7.5), ("epsilon", "leading", 5, 1.0)]
ALL = [
    (kind, *grid, w)
    for kind in ("epsilon", "v_prediction")
    for grid in (("leading", 5), ("leading", 20), ("trailing", 5))
    for w in (1.0, 7.5)
]


@pytest.mark.parametrize(
    ("kind", "spacing", "steps", "w"),
    [pytest.param(*case, marks=() if case in FEW else pytest.mark.nightly) for case in ALL],
)
def test_images_are_those_of_diffusers(folders, cache, kind, spacing, steps, w):
    """DDIM on the same latents and prompts. Ours starts from sigma_t eps, diffusers from the latents passed to it."""
    teacher = loaded(folders[kind], cache, w=w)
    eps = torch.randn(3, *teacher.shape, generator=torch.Generator().manual_seed(1))
    c = teacher.conditioning.of_images(range(3), "cpu")
    solver = Solver("ddim", spacing)
    top = solver.times(teacher.schedule, steps)[-1].view(1, 1, 1, 1)
    with torch.no_grad():
        ours = solver.solve(partial(teacher.denoise, c=c), teacher.schedule, eps, steps)
    start = teacher.schedule.sigma(top) * eps
    parts = folders[kind], start, w, steps
    theirs = diffusers_answers(*parts, "latent", timestep_spacing=spacing)
    assert (ours - theirs).abs().max() < 1e-4  # measured: 6.5e-5, of latents up to 55
    images = torch.from_numpy(diffusers_answers(*parts, "np", timestep_spacing=spacing)).permute(0, 3, 1, 2)
    assert ((teacher.decode(ours) / 2 + 0.5).clamp(0, 1) - images).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_steps_offset_is_a_separate_grid(folders, cache, kind):
    """diffusers' leading spacing with steps_offset=1, as Stable Diffusion has it: indices 1, q + 1, 2q + 1, ..."""
    teacher, steps = loaded(folders[kind], cache, w=3.0), 10
    eps = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(2))
    c = teacher.conditioning.of_images(range(2), "cpu")
    index = torch.arange(steps, dtype=torch.float64) * (1000 // steps) + 1
    times = torch.cat([torch.tensor([0.001]).double(), (index + 1) / 1000])
    with torch.no_grad():
        ours = ddim(partial(teacher.denoise, c=c), teacher.schedule, eps, times)
    theirs = diffusers_answers(folders[kind], eps, 3.0, steps, "latent", timestep_spacing="leading", steps_offset=1)
    assert (ours - theirs).abs().max() < 1e-4


def test_latents_are_the_means_of_the_encoder(folders, cache):
    teacher = loaded(folders["epsilon"], cache)
    pipeline = StableDiffusionPipeline.from_pretrained(folders["epsilon"], safety_checker=None, local_files_only=True)
    x = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(x).latent_dist.mean * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(teacher.to_latents(x), expected, rtol=1e-5, atol=1e-6)
    assert teacher.to_posterior is None
    drawn = loaded(folders["epsilon"], cache, latents="drawn")
    with torch.no_grad():
        posterior, scale = pipeline.vae.encode(x).latent_dist, pipeline.vae.config.scaling_factor
    both = torch.cat([posterior.mean * scale, posterior.std * scale], dim=1)
    torch.testing.assert_close(drawn.posterior(x), both, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(drawn.to_latents(x), expected, rtol=1e-5, atol=1e-6)
    assert drawn.sha256 == teacher.sha256


# --- texts -----------------------------------------------------------------------------------------------------------


def test_texts_are_those_of_diffusers(folders, cache):
    """Row i of the table is prompt i, the last row the empty text."""
    teacher = loaded(folders["epsilon"], cache)
    pipeline = StableDiffusionPipeline.from_pretrained(folders["epsilon"], safety_checker=None, local_files_only=True)
    texts, none = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    table = teacher.conditioning.texts(torch.arange(len(PROMPTS) + 1))
    assert table.shape == (len(PROMPTS) + 1, TOKENS, WIDTH)
    torch.testing.assert_close(table[:-1], texts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table[-1], none[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.encode([PROMPTS[3], ""]), table[[3, -1]], rtol=1e-5, atol=1e-5)
    assert (table[0] - table[1]).abs().max() > 0.1  # texts matter


@pytest.fixture
def reads(monkeypatch):
    """What is read from disk, by component."""
    seen = []
    read = stable_diffusion.load_component

    def noted(index, component, variant=""):
        seen.append(component)
        return read(index, component, variant)

    monkeypatch.setattr(stable_diffusion, "load_component", noted)
    return seen


def test_the_text_encoder_is_read_only_for_new_texts(folders, tmp_path, reads):
    loaded(folders["epsilon"], tmp_path)
    assert sorted(reads) == ["text_encoder", "unet", "vae"]
    reads.clear()
    teacher = loaded(folders["epsilon"], tmp_path)
    assert sorted(reads) == ["unet", "vae"]
    teacher.encode(["something new"])
    teacher.encode(["something else"])
    assert sorted(reads) == ["text_encoder", "unet", "vae"]


def test_another_encoder_and_other_weights_are_another_teacher(folders, tmp_path):
    other = text_pipelines.stable_diffusion(tmp_path / "other", seed=1)
    a, b = loaded(folders["epsilon"], tmp_path), loaded(other, tmp_path)
    assert a.sha256 != b.sha256 != loaded(folders["v_prediction"], tmp_path).sha256
    assert len(list((tmp_path / "prompts").glob("*.npy"))) == 2  # two of the three have the same text encoder
    assert a.sha256 == loaded(folders["epsilon"], tmp_path).sha256
    for name in ("unet", "text_encoder"):
        for file in (folders["epsilon"] / name).iterdir():
            (other / name / file.name).write_bytes(file.read_bytes())
    assert loaded(other, tmp_path).sha256 != a.sha256  # the autoencoder is another


def test_nothing_is_read_for_a_dry_run(folders, tmp_path, reads):
    made = source(folders["epsilon"], tmp_path, w=3.0)
    made.plan()
    teacher = made.untrained().conditioned(made.conditioning)
    assert not reads and not list(tmp_path.iterdir())
    c = teacher.conditioning.of_images(range(2), "cpu")
    x = torch.zeros(2, *teacher.shape)
    assert teacher.denoise(x, torch.full((2, 1, 1, 1), 0.5).double(), c).shape == x.shape
    assert teacher.decode(x).shape == (2, *teacher.image_shape) == (2, 3, 16, 16)


def test_the_provenance_records_another_resolution_than_the_networks(folders, cache):
    teacher = loaded(folders["epsilon"], cache, size=24)
    assert teacher.shape == (4, 12, 12) and teacher.image_shape == (3, 24, 24)
    assert teacher.provenance["sample_size"] == 8 and teacher.provenance["latents"] == [4, 12, 12]
    json.dumps(teacher.provenance)


# --- what does not fit -----------------------------------------------------------------------------------------------


def edited(folder, target, **changes):
    """A copy of the configs of a pipeline, with `changes` to those of its components."""
    for file in folder.rglob("*"):
        if file.is_file():
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    for component, settings in changes.items():
        file = target / component / "config.json" if component != "model_index" else target / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return target


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"size": 17}, "dataset.resolution must be a multiple of 2 for the autoencoder of 'p'"),
        ({"unet": {"time_cond_proj_dim": 8}}, {}, "it is a distilled student, not a teacher"),
        ({"unet": {"in_channels": 9}}, {}, "has 9 input and 4 output channels, its latents have 4"),
        ({"unet": {"cross_attention_dim": 32}}, {}, "takes text embeddings of width 32, its text encoder has width 16"),
        ({"model_index": {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}}, {}, "a text_encoder_2"),
        ({"model_index": {"unet": ["diffusers", "UNet3DConditionModel"]}}, {}, "no class 'UNet3DConditionModel'"),
        ({"model_index": {"tokenizer": ["evil", "System"]}}, {}, "no class 'System' as tokenizer"),
        ({"model_index": {"vae": ["diffusers", "AutoencoderTiny"]}}, {}, "no class 'AutoencoderTiny' as vae"),
        ({}, {"variant": "fp16"}, "no weights diffusion_pytorch_model.fp16.safetensors"),
        ({}, {"variant": "../x"}, "variant must be letters"),
        ({}, {"decode_batch": 0}, "decode_batch must be positive, got 0"),
        ({}, {"latents": "mode"}, "latents must be one of mean, drawn, got 'mode'"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(folders, tmp_path, reads, changes, settings, message):
    folder = edited(folders["epsilon"], tmp_path / "p", **changes)
    with pytest.raises(UserError) as error:
        source(folder, tmp_path, **settings).plan()
    assert message in str(error.value) and not reads


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"teacher=stable_diffusion needs teacher\.path=FOLDER"):
        source("", tmp_path).plan()
    with pytest.raises(UserError, match="no folder"):
        source(tmp_path / "nowhere", tmp_path).plan()


def test_without_transformers_the_message_names_the_extra(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(UserError, match=r"pip install 'distillbench\[text\]'"):
        source(folders["epsilon"], tmp_path).plan()


def test_a_dataset_without_texts_is_refused(folders, tmp_path):
    made = source(folders["epsilon"], tmp_path)
    made.dataset.prompts = None
    with pytest.raises(UserError, match="makes images from texts, but dataset=captions has none"):
        made.plan()


# --- whole runs ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Ran:
    """A run in process: its table, and what was asked of the text encoder and the autoencoder, and when."""

    table: object
    encoded: list
    used: list  # (call of the autoencoder, in training or not, images)
    held: list  # of each training: users of what is parked, and whether a text encoder is in memory


def go(results, monkeypatch, *words):
    """A run with the tiny pipeline; `used` and `held` are noted on the way."""
    ran, training = Ran(None, [], [], []), []

    def noted(cls, name, note):
        call = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, x: (note(x), call(self, x))[1])

    noted(stable_diffusion.TextEncoder, "__call__", ran.encoded.extend)
    for name in ("encode", "decode"):
        noted(Autoencoder, name, lambda x, name=name: ran.used.append((name, bool(training), len(x))))
    train = cell_training.train

    def watched(method, config, workspace, *more):
        vae, text = method.teacher.offloaded
        ran.held.append((vae._users, text._users, text._loaded is not None))
        training.append(1)
        try:
            return train(method, config, workspace, *more)
        finally:
            training.pop()

    monkeypatch.setattr(cell_training, "train", watched)
    ran.table = run_here(results, StableDiffusion, *words)
    return ran


@pytest.mark.parametrize(
    ("words", "data"),
    [
        pytest.param(["methods=[boot]", "guidance=3", "dataset.images=0"], False, marks=pytest.mark.nightly),
        pytest.param(
            ["methods=[boot]", "guidance=3", "guidance_range=[1,5]", "dataset.images=0"],
            False,
            marks=pytest.mark.nightly,
        ),
        (["methods=[boot,lcm]", "guidance=3"], True),
    ],
)
def test_a_run_ends_with_a_table(folders, tmp_path, monkeypatch, words, data):
    """BOOT from prompts only, at one w or a range; and LCM in latents from images with captions."""
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path / "no weights"))
    ran = go(tmp_path, monkeypatch, *words, f"teacher.path={folders['v_prediction']}")
    table = ran.table
    assert (table["status"] == "ok").all()
    students = table[table["training_seed"].notna()]
    assert set(students["method"]) == ({"boot", "lcm"} if data else {"boot"})
    assert (students["teacher_rmse"] > 0).all()
    assert (
        table["clip_score_vit_l14"].isna().all()
        and table["reason"].str.contains("clip_score_vit_l14 empty: the weights").all()
    )

    assert sorted(ran.encoded) == sorted(["", *PROMPTS])  # each once
    assert ran.held == [(0, 0, False)] * len(students)
    assert not [call for call in ran.used if call[1]]  # nothing is encoded or decoded while a student trains
    made = sum(images for call, _, images in ran.used if call == "encode")
    assert made == (6 if data else 0)
    assert sum(images for call, _, images in ran.used if call == "decode") == 7 * (len(table) + 1)  # and the reference
    assert max(images for *_, images in ran.used) <= 4


@pytest.mark.nightly
@pytest.mark.slow
def test_decoder_and_text_encoder_are_timed_separately(folders, tmp_path):
    words = ["methods=[boot]", "guidance=3", "dataset.images=0", "evaluation.metrics=[teacher_rmse]"]
    timing = ["evaluation.timing=inline", "evaluation.timing_seconds=0.001", "evaluation.largest_timed_batch=1"]
    table = run_here(tmp_path, StableDiffusion, *words, *timing, f"teacher.path={folders['epsilon']}")
    times = ["sample_latency_p50_ms", "sample_decoder_latency_ms", "sample_text_encoder_latency_ms"]
    assert (table[times] > 0).all(axis=None)
