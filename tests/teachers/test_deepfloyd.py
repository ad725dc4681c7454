"""The cascade of DeepFloyd IF as teachers: the same images as diffusers' pipelines, and the cost of the base."""

import copy
import io
import json
from functools import partial

import pytest

pytest.importorskip("transformers")

import pandas as pd
import torch
from diffusers import DDIMScheduler, IFPipeline, IFSuperResolutionPipeline
from rich.console import Console
from safetensors.torch import save_file

import text_pipelines
from distillbench import UserError
from distillbench.builtin.deepfloyd import DeepFloyd
from distillbench.diffusion.conditioning import Conditioning
from distillbench.diffusion.samplers import Solver, time_like
from distillbench.execution.run import run
from distillbench.export.write import export
from distillbench.registry import load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.system.progress import Progress
from distillbench.teachers.teacher import Clip
from text_pipelines import PROMPTS, WIDTH, Captions, run_here

SILENT = Progress(Console(file=io.StringIO()))
COSINE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "set_alpha_to_one": True}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}


def ddim(**settings):
    """diffusers' DDIM as IF's pipelines take it: they look for the kind of variance that DDPM's config has."""
    return DDIMScheduler.from_config(COSINE | {"variance_type": "fixed_small"} | settings)


def source(path, cache, size=8, w=1.0, **settings):
    config = DeepFloyd.Config(kind="deepfloyd", path=str(path), **settings)
    asked = Conditioning(len(PROMPTS), w)
    return DeepFloyd(config, Captions(Captions.Config(size=size, images=0)), cache / "teachers", "cpu", asked)


def loaded(path, cache, **settings):
    made = source(path, cache, **settings)
    return made.load(SILENT).conditioned(made.conditioning)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Both stages, as they come and without thresholding."""
    folder = tmp_path_factory.mktemp("stages")
    plain = {"thresholding": False}
    return {
        "I": text_pipelines.deepfloyd_1(folder / "I"),
        "I plain": text_pipelines.deepfloyd_1(folder / "I-plain", **plain),
        "II": text_pipelines.deepfloyd_2(folder / "II"),
        "II plain": text_pipelines.deepfloyd_2(folder / "II-plain", **plain),
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def pipeline_of(cls, folder):
    pipeline = cls.from_pretrained(folder, safety_checker=None, watermarker=None, local_files_only=True)
    pipeline.scheduler = ddim()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def given(monkeypatch, pipeline, start):
    """The pipeline starts from `start`; it takes no latents of its caller."""
    monkeypatch.setattr(pipeline, "prepare_intermediate_images", lambda *arguments: start)


# --- stage 1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [1.0, 7.0])
@pytest.mark.parametrize("steps", [5, pytest.param(20, marks=pytest.mark.nightly)])
def test_stage_1_makes_the_images_of_diffusers(stages, cache, monkeypatch, w, steps):
    teacher = loaded(stages["I plain"], cache, w=w)
    eps = torch.randn(3, *teacher.shape, generator=torch.Generator().manual_seed(1))
    c = teacher.conditioning.of_images(range(3), "cpu")
    solver = Solver("ddim", "leading")
    with torch.no_grad():
        ours = solver.solve(partial(teacher.denoise, c=c), teacher.schedule, eps, steps)
    pipeline = pipeline_of(IFPipeline, stages["I plain"])
    top = solver.times(teacher.schedule, steps)[-1]
    given(monkeypatch, pipeline, teacher.schedule.sigma(time_like(eps, top)) * eps)
    theirs = pipeline(PROMPTS[:3], guidance_scale=w, num_inference_steps=steps, output_type="pt").images
    assert (ours - theirs).abs().max() < 1e-4


def test_texts_are_those_of_diffusers(stages, cache):
    texts = ["A Cat ", *PROMPTS[:2]]
    teacher = loaded(stages["I"], cache)
    expected, none = pipeline_of(IFPipeline, stages["I"]).encode_prompt(texts, True, device="cpu")
    assert expected.shape == (3, 77, WIDTH)
    torch.testing.assert_close(teacher.encode(texts), expected, rtol=1e-5, atol=1e-5)
    table = teacher.conditioning.texts(torch.tensor([0, 1, len(PROMPTS)]))
    torch.testing.assert_close(table, torch.cat([expected[1:], none[:1]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("quantile", "largest"), [(0.95, 1.5), (0.995, 1.0), (0.9, 100.0)])
def test_the_threshold_is_that_of_diffusers(quantile, largest):
    f = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.2, 0.5, 0.7, 1, 5]).view(
        5, 1, 1, 1
    )
    scheduler = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=largest)
    assert torch.equal(Clip("dynamic", quantile, largest)(f), scheduler._threshold_sample(f))


def test_predictions_are_thresholded_as_in_the_scheduler(stages, cache):
    """Against diffusers' own step, with eps recomputed from the thresholded answer as ours is."""
    teacher = loaded(stages["I"], cache, w=7.0)
    assert teacher.clip == Clip("dynamic", 0.95, 1.5)
    scheduler = ddim(**THRESHOLD)
    scheduler.set_timesteps(5)
    eps = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    c = teacher.conditioning.of_images(range(2), "cpu")
    solver, unet, none = Solver("ddim", "leading"), teacher.denoiser.network.unet, teacher.conditioning.none(c)
    x = teacher.schedule.sigma(time_like(eps, solver.times(teacher.schedule, 5)[-1])) * eps
    with torch.no_grad():
        for i in scheduler.timesteps:
            both = [unet(x, i, encoder_hidden_states=asked.text).sample[:, :3] for asked in (c, none)]
            x = scheduler.step(both[1] + 7 * (both[0] - both[1]), i, x, use_clipped_model_output=True).prev_sample
        ours = solver.solve(partial(teacher.denoise, c=c), teacher.schedule, eps, 5)
    assert x.abs().max() <= 1 and (ours - x).abs().max() < 1e-4


def test_times_end_at_t_max(stages, cache):
    teacher = loaded(stages["I"], cache, t_max=0.981)
    assert teacher.schedule.t_max == pytest.approx(0.981) and teacher.provenance["t_max"] == 0.981
    assert 1 / teacher.schedule.alpha(torch.tensor(0.981)) == pytest.approx(33.8, abs=0.1)
    assert teacher.student().schedule.t_max == teacher.schedule.t_max


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def cascade(stages, cache, **settings):
    settings = {"stage": 2, "base": str(stages["I"]), "base_steps": 3, "size": 16} | settings
    return loaded(settings.pop("path", stages["II plain"]), cache, **settings)


@pytest.mark.parametrize("w", [pytest.param(1.0, marks=pytest.mark.nightly), 4.0])
def test_stage_2_makes_the_images_of_diffusers_from_the_images_of_the_base(stages, cache, monkeypatch, w):
    """The whole cascade: the base's images, upsampled and noised by the pipeline itself, and its own DDIM."""
    teacher, steps = cascade(stages, cache, w=w, noise_level=100), 5
    c = teacher.conditioning.of_images(range(2), "cpu")
    eps = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
    solver = Solver("ddim", "leading")
    with torch.no_grad():
        ours = solver.solve(partial(teacher.denoise, c=c), teacher.schedule, eps, steps)

    drawn = teacher.conditioning._small_noise(*small_stream(), range(2))
    base = pipeline_of(IFPipeline, stages["I"])
    base.scheduler = ddim(**THRESHOLD)
    step = base.scheduler.step
    base.scheduler.step = partial(step, use_clipped_model_output=True)
    given(monkeypatch, base, drawn[:, :3])
    small = base(PROMPTS[:2], guidance_scale=7.0, num_inference_steps=3, output_type="pt").images

    pipeline = pipeline_of(IFSuperResolutionPipeline, stages["II plain"])
    top = solver.times(teacher.schedule, steps)[-1]
    given(monkeypatch, pipeline, teacher.schedule.sigma(time_like(eps, top)) * eps)
    monkeypatch.setattr(
        "diffusers.pipelines.deepfloyd_if.pipeline_if_superresolution.randn_tensor",
        lambda shape, **more: drawn[:, 3:].reshape(shape),
    )
    theirs = pipeline(
        PROMPTS[:2], image=small, guidance_scale=w, num_inference_steps=steps, noise_level=100, output_type="pt"
    ).images
    assert (ours - theirs).abs().max() < 1e-4
    other = cascade(stages, cache, w=w, noise_level=101).conditioning.of_images(range(2), "cpu")
    assert (other.image - c.image).abs().max() > 1e-4


def small_stream():
    from distillbench.diffusion.noise import stream_key

    return (stream_key("small images", 0),)


def student_of(folder, target, prediction):
    """What an exported one-step student looks like: a scheduler for a single step. The weights are stage 1's own."""
    for file in folder.rglob("*"):
        if file.is_file():
            copied = target / file.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(file.read_bytes())
    settings = {"num_train_timesteps": 2, "trained_betas": [0.3, 0.9], "steps_offset": 1, "timestep_spacing": "leading"}
    ddim(prediction_type=prediction, **settings).save_pretrained(target / "scheduler")
    index = json.loads((target / "model_index.json").read_text()) | {"scheduler": ["diffusers", "DDIMScheduler"]}
    (target / "model_index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_base_may_be_a_student_of_one_step(stages, cache, tmp_path, monkeypatch, prediction):
    """Its answer is that of its own pipeline, asked for one step without guidance."""
    student = student_of(stages["I"], tmp_path / "student", prediction)
    teacher = cascade(stages, cache, base=str(student), noise_level=0)
    drawn = torch.randn(2, *teacher.conditioning.small.shape, generator=torch.Generator().manual_seed(0))
    c = teacher.conditioning._condition(torch.tensor([0, 1]), None, drawn, "cpu")
    pipeline = IFPipeline.from_pretrained(student, safety_checker=None, watermarker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    given(monkeypatch, pipeline, drawn[:, :3])
    small = pipeline(PROMPTS[:2], guidance_scale=1.0, num_inference_steps=1, output_type="pt").images.clamp(-1, 1)
    large = torch.nn.functional.interpolate(small, (16, 16), mode="bilinear", align_corners=True)
    scheduler = pipeline_of(IFSuperResolutionPipeline, stages["II plain"]).image_noising_scheduler
    expected = scheduler.add_noise(large, drawn[:, 3:].reshape(large.shape), torch.tensor([0, 0]))
    torch.testing.assert_close(c.image, expected, rtol=1e-5, atol=1e-5)
    assert teacher.provenance["base_steps"] == 1 and teacher.provenance["base_guidance"] == 1


@pytest.mark.parametrize(("base_guidance", "evaluations"), [(1.0, 3), (7.0, 6)])
def test_the_base_is_counted_as_the_teachers(stages, cache, base_guidance, evaluations):
    teacher = cascade(stages, cache, base_guidance=base_guidance, w=4.0)
    before = teacher.teacher_rows.rows
    c = teacher.conditioning.of_images(range(5), "cpu")
    assert teacher.teacher_rows.rows - before == 5 * evaluations
    x = torch.zeros(5, *teacher.shape)
    with torch.no_grad():
        teacher.denoise(x, time_like(x, 0.5), c)
    assert teacher.teacher_rows.rows - before == 5 * (evaluations + 2)
    assert not c.image.requires_grad


def test_the_upscalers_input_belongs_to_the_sample_and_is_not_trained(stages, cache):
    teacher = cascade(stages, cache)
    c = teacher.conditioning.of_images(range(4), "cpu")
    torch.testing.assert_close(teacher.conditioning.of_images([3, 1], "cpu").image, c.image[[3, 1]])
    student = teacher.student()
    known = {weight.data_ptr() for weight in teacher.conditioning.small.base.denoiser.parameters()}
    assert known.isdisjoint(weight.data_ptr() for weight in student.parameters())
    assert not any(weight.requires_grad for weight in teacher.conditioning.small.base.denoiser.parameters())
    assert copy.deepcopy(teacher.conditioning.small) is teacher.conditioning.small  # one copy of the base


def test_the_hash_depends_on_everything_that_changes_predictions(stages, cache, tmp_path):
    settings = [
        {},
        {"base_steps": 4},
        {"base_guidance": 2.0},
        {"noise_level": 7},
        {"path": stages["II"]},
        {"t_max": 0.9},
        {"base": str(student_of(stages["I"], tmp_path / "student", "epsilon"))},
    ]
    teachers = [cascade(stages, cache, **changed) for changed in settings]
    assert len({teacher.sha256 for teacher in teachers}) == len(settings)
    assert cascade(stages, cache).sha256 == teachers[0].sha256
    json.dumps([teacher.provenance for teacher in teachers])


def test_a_dry_run_reads_no_weights_and_counts_the_base(stages, tmp_path, monkeypatch):
    monkeypatch.setattr("distillbench.builtin.deepfloyd.load_component", None)
    monkeypatch.setattr("distillbench.builtin.stable_diffusion.load_component", None)
    made = source(stages["II"], tmp_path, size=16, w=4.0, stage=2, base=str(stages["I"]), base_steps=2)
    made.plan()
    teacher = made.untrained().conditioned(made.conditioning)
    teacher.conditioning.draw(3, torch.Generator().manual_seed(0), "cpu", None)
    assert teacher.teacher_rows.rows == 3 * 2 * 2 and not list(tmp_path.iterdir())


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("II", {}, "one that makes images from texts (stage 1) has 3"),
        ("I", {"stage": 2, "base": "I", "size": 16}, "one that upscales images (stage 2) has 6"),
        ("II", {"stage": 2, "base": "II", "size": 16}, "teacher.base: the network in 'II' has 6 input"),
        ("II", {"stage": 2, "size": 16}, "stage=2 needs base=FOLDER"),
        ("I", {"base": "I"}, "base is a setting of stage=2, got stage=1"),
        ("I", {"stage": 3}, "stage must be one of 1, 2, got 3"),
        ("II", {"stage": 2, "base": "I", "size": 20}, "multiple of the base's: 'I' makes 8x8"),
        ("II", {"stage": 2, "base": "I", "size": 16, "noise_level": 1000}, "must lie between 0 and 999, got 1000"),
        ("II", {"stage": 2, "base": "I", "size": 16, "base_steps": 0}, "base_steps must lie between 1 and 1000"),
        ("", {}, "teacher=deepfloyd needs teacher.path=FOLDER"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(stages, tmp_path, path, settings, message):
    if "base" in settings:
        settings = settings | {"base": str(stages[settings["base"]])}
    with pytest.raises(UserError) as error:
        source(stages.get(path, path), tmp_path, **settings).plan()
    assert message in str(error.value)


def test_the_text_encoder_may_be_that_of_another_folder(stages, cache, tmp_path):
    """IF's second stage is often kept without one: then it is the base's, or that of teacher.text."""
    folder = student_of(stages["II plain"], tmp_path / "II", "epsilon")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert cascade(stages, cache, path=folder).encode(["a"]).shape == (1, 77, WIDTH)
    with pytest.raises(UserError, match=r"no text encoder in 'II': give a pipeline that has one as teacher\.text"):
        source(folder, tmp_path, size=16, stage=2, base=str(stages["I"]), text=str(folder)).plan()


def test_damaged_weights_are_refused(stages, cache, tmp_path):
    folder = student_of(stages["I"], tmp_path / "damaged", "epsilon")
    save_file({"nothing": torch.zeros(1)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="unet of 'damaged' cannot be used"):
        loaded(folder, cache)


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_boot_distils_the_upscaler_and_the_base_is_charged(stages, tmp_path):
    """3 steps of 8 images: Heun's 2 evaluations, the boundary's on 2 images, and 2 steps of the base, all guided."""
    words = ["methods=[boot]", "guidance=4", "dataset.images=0", f"teacher.path={stages['II']}"]
    words += ["teacher.stage=2", f"teacher.base={stages['I']}", "teacher.base_steps=2", "evaluation.images=4"]
    table = run_here(tmp_path, DeepFloyd, *words, "evaluation.metrics=[teacher_rmse]")
    (student,) = table[table["training_seed"].notna()].to_dict("records")
    assert (table["status"] == "ok").all() and student["teacher_rmse"] > 0
    assert student["train_teacher_nfe"] == 3 * 2 * (8 * 2 + 2 + 8 * 2)
    assert student["nfe"] == 1


@pytest.mark.nightly
def test_a_student_of_stage_1_is_exported_as_a_pipeline_and_used_as_base(stages, tmp_path):
    """The whole cascade: stage 1 is distilled, its student exported, read by diffusers, and used as base."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\ntwo birds\n")
    common = ["methods=[boot]", "conditional=true", "dataset=prompts", f'dataset.path="{tmp_path}/prompts.txt"']
    common += ["experiment=smoke", "budget.images=8", "batch_size=4", "evaluation.images=8", "device=cpu"]
    common += ["evaluation.metrics=[teacher_rmse]", "evaluation.timing=off"]
    common += [f'results_dir="{tmp_path}/results"', "teacher=deepfloyd"]
    registry = load_registry()

    def trained(name, *words):
        configs = compose_runs([*common, f"run_name={name}", *words], registry)
        return run(plan(configs, registry), configs, Progress(None), lambda rows: None)

    first = trained("I", f'teacher.path="{stages["I"]}"', "dataset.resolution=8", "guidance=2")
    assert (first.table["status"] == "ok").all()
    export(first.folder, "boot", None, tmp_path / "student", registry, Progress(None))  # compares the images itself
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["_class_name"] == "IFPipeline"
    words = [f'teacher.path="{stages["II"]}"', "teacher.stage=2", f'teacher.base="{tmp_path}/student"']
    second = trained("II", *words, "dataset.resolution=16", "guidance=1", "teacher.noise_level=5")
    student = second.table[second.table["method"] == "boot"].iloc[0]
    assert student["status"] == "ok" and pd.isna(student["train_tflops"]) and "base model" in student["reason"]
    assert second.table[second.table["method"] == "teacher:ddim"]["status"].eq("ok").all()
    with pytest.raises(UserError, match="cm needs real images"):
        trained("III", *words, "methods=[cm]", "dataset.resolution=16")
