"""Pipelines that diffusers itself wrote to disk: our teacher gives the images that diffusers' own pipeline gives.

Tiny networks with random weights; the same noise, the same steps; 1e-4 in float32 is what is allowed.
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_files import PIXELS, diffusers, diffusers_source, unet
from distillbench import UserError
from distillbench.builtin.diffusers_pipelines import (
    Consistency,
    blank_component,
    load_component,
    read_index,
    weights_files,
)
from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Condition, Conditioning
from distillbench.diffusion.samplers import TIME_GRIDS, Solver, ancestral, ddim, renoise, time_like
from distillbench.diffusion.schedules import FlowMatching
from distillbench.system.progress import Progress
from distillbench.teachers.teacher import Teacher

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' use of numpy

ALLOWED = 1e-4
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def noise(shape: tuple[int, int, int], images: int = 2) -> Tensor:
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(3))


def teacher_of(folder: Path, shape: tuple[int, int, int] = PIXELS, **settings) -> Teacher:
    return diffusers_source(folder, shape, **settings).load(Progress(None))


def ours(teacher: Teacher, eps: Tensor, grid: str, steps: int, c: Condition | None = None) -> Tensor:
    """DDIM from x_T = eps, which is where diffusers starts, on its grid of the same name."""
    f = teacher.denoise if c is None else partial(teacher.denoise, c=c)
    with torch.no_grad():
        return ddim(f, teacher.schedule, eps, TIME_GRIDS[grid](teacher.schedule, steps))


def starting_from(monkeypatch, pipeline, eps: Tensor) -> None:
    """Make the pipeline's next draw of noise `eps`."""
    module = pipeline.__class__.__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda shape, **_: eps.clone().reshape(shape))


def close(got: Tensor, wanted: Tensor, record, name: str = "") -> None:
    difference = (got - wanted).abs().max().item()
    record(f"max_difference{name and ' '}{name}", f"{difference:.2e}")
    assert torch.isfinite(wanted).all() and wanted.abs().max() > 0.05  # there is something to compare
    assert difference <= ALLOWED


def watch(monkeypatch, scheduler) -> list[Tensor]:
    """What the scheduler's steps return from now on: the last is the images before they are mapped to [0, 1]."""
    seen: list[Tensor] = []
    step = scheduler.step

    def watched(*args, **settings):
        out = step(*args, **settings)
        seen.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    monkeypatch.setattr(scheduler, "step", watched)
    return seen


def saved(pipeline, folder: Path):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["leading", "trailing"])
@pytest.mark.parametrize("betas", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pixel_pipeline_is_diffusers_ddim(tmp_path, monkeypatch, record_property, prediction, betas, grid):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=betas, prediction_type=prediction, timestep_spacing=grid, clip_sample=False
    )
    pipeline = saved(diffusers.DDIMPipeline(unet(), scheduler), tmp_path)
    eps = noise(PIXELS)
    starting_from(monkeypatch, pipeline, eps)
    seen = watch(monkeypatch, pipeline.scheduler)
    images = pipeline(batch_size=2, num_inference_steps=5, eta=0.0, output_type="pt").images
    x_0 = ours(teacher_of(tmp_path), eps, grid, 5)
    scale = seen[-1].abs().max().clamp(min=1)  # with random weights and eps, data predictions reach thousands
    close((x_0 / 2 + 0.5).clamp(0, 1), images, record_property)
    close(x_0 / scale, seen[-1] / scale, record_property, "unclipped")


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_start": 0.0002, "beta_end": 0.03},
        {"trained_betas": torch.linspace(1e-4, 0.03, 1000).tolist()},
        {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ],
    ids=["other ends", "trained", "zero snr"],
)
def test_other_betas(tmp_path, monkeypatch, record_property, settings):
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, **settings
    )
    pipeline = saved(diffusers.DDIMPipeline(unet(), scheduler), tmp_path)
    eps = noise(PIXELS)
    starting_from(monkeypatch, pipeline, eps)
    seen = watch(monkeypatch, pipeline.scheduler)
    pipeline(batch_size=2, num_inference_steps=5, output_type="pt")
    close(ours(teacher_of(tmp_path), eps, "trailing", 5), seen[-1], record_property)


def test_clipped_answers(tmp_path, monkeypatch, record_property):
    """clip_sample of the config; our DDIM takes eps from the clipped answer, as use_clipped_model_output says."""
    pipeline = saved(diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler(timestep_spacing="trailing")), tmp_path)
    eps = noise(PIXELS)
    starting_from(monkeypatch, pipeline, eps)
    seen = watch(monkeypatch, pipeline.scheduler)
    pipeline(batch_size=2, num_inference_steps=5, use_clipped_model_output=True, output_type="pt")
    teacher = teacher_of(tmp_path)
    assert teacher.clip.kind == "static"
    close(ours(teacher, eps, "trailing", 5), seen[-1], record_property)
    unclipped = teacher_of(tmp_path, clip="none")
    assert unclipped.clip.kind == "" and unclipped.sha256 != teacher.sha256


def test_ancestral_sampling(tmp_path, monkeypatch, record_property):
    """DDPMPipeline with the same noise in every step; learned variances are dropped with their half of the channels."""
    scheduler = diffusers.DDPMScheduler(clip_sample=False, prediction_type="v_prediction")
    network = unet(out_channels=6)
    pipeline = saved(diffusers.DDPMPipeline(network, scheduler), tmp_path)
    teacher = teacher_of(tmp_path)
    eps, fresh = noise(PIXELS), lambda k: noise(PIXELS).roll(k, dims=-1)
    draws = iter(range(1, 10))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: fresh(next(draws)).clone()
    )
    pipeline.unet.forward = first_half(network.forward)  # "fixed_small" knows no learned variances
    starting_from(monkeypatch, pipeline, eps)
    seen = watch(monkeypatch, pipeline.scheduler)
    pipeline(batch_size=2, num_inference_steps=5, output_type="pt")
    with torch.no_grad():
        times = TIME_GRIDS["leading"](teacher.schedule, 5)
        x_0 = ancestral(teacher.denoise, teacher.schedule, eps, times, fresh)
    close(x_0, seen[-1], record_property)


def first_half(forward):
    def halved(*args, **settings):
        out = forward(*args, **settings)
        return SimpleNamespace(sample=out.sample.chunk(2, dim=1)[0])

    return halved


def test_schedulers_of_noise_levels(tmp_path, monkeypatch, record_property):
    """EulerDiscreteScheduler works in x^ = x_t / alpha_t: Euler's step there is DDIM's."""
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    pipeline = saved(diffusers.DDPMPipeline(unet(), scheduler), tmp_path)
    eps = noise(PIXELS)
    with torch.no_grad():
        scheduler.set_timesteps(5)
        x = eps * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    teacher = teacher_of(tmp_path)
    times = TIME_GRIDS["trailing"](teacher.schedule, 5)
    with torch.no_grad():
        start = eps * scheduler.init_noise_sigma * teacher.schedule.alpha(times[-1])
        close(ddim(teacher.denoise, teacher.schedule, start, times), x, record_property)


# --- latents ---------------------------------------------------------------------------------------------------------


def autoencoder(seed: int = 5, **settings):
    torch.manual_seed(seed)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **settings,
    ).eval()


def dit_pipeline(folder: Path):
    torch.manual_seed(1)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    ).eval()
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return saved(diffusers.DiTPipeline(transformer, autoencoder(), scheduler), folder)


def test_dit_with_guidance(tmp_path, monkeypatch, record_property):
    pipeline = dit_pipeline(tmp_path)
    asked = Conditioning(1000, 4.0)
    teacher = teacher_of(tmp_path, (3, 16, 16), conditioning=asked).conditioned(asked)
    assert teacher.shape == (4, 8, 8) and teacher.image_shape == (3, 16, 16)
    eps, labels = noise(teacher.shape), [207, 999]
    starting_from(monkeypatch, pipeline, eps)
    seen = watch(monkeypatch, pipeline.scheduler)
    images = pipeline(class_labels=labels, guidance_scale=4.0, num_inference_steps=5, output_type="pt").images
    c = Condition(torch.tensor(labels), torch.full((2, 1, 1, 1), 4.0))
    latents = ours(teacher, eps, "leading", 5, c)
    scale = seen[-1].abs().max().clamp(min=1)
    close(latents / scale, seen[-1].chunk(2)[0] / scale, record_property, "latents")
    close(teacher.decode(latents) / 2 + 0.5, images, record_property, "images")
    assert images.std() > 0.05


def test_dit_asks_for_its_classes(tmp_path):
    dit_pipeline(tmp_path)
    with pytest.raises(UserError, match="knows 1000 classes and cannot serve conditional=false"):
        diffusers_source(tmp_path, (3, 16, 16)).plan()


@pytest.mark.parametrize("shift", [None, 0.3])
def test_latents_and_back(tmp_path, shift):
    """to_latents is scale (mode - shift), decode the way back; both end with the module on the CPU."""
    vae = autoencoder(shift_factor=shift)
    pipeline = diffusers.DDPMPipeline(unet(channels=4), diffusers.DDPMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path)
    vae.save_pretrained(tmp_path / "vae")
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    teacher = teacher_of(tmp_path, (3, 16, 16))
    images = noise((3, 16, 16)).clamp(-1, 1)
    z = vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(teacher.to_latents(images), (z - (shift or 0)) * 0.18215)
    torch.testing.assert_close(teacher.decode(teacher.to_latents(images)), vae.decode(z).sample.clamp(-1, 1))
    (offloaded,) = teacher.offloaded
    assert not any(p.requires_grad for p in offloaded.module.parameters())


def test_unconditional_latents(tmp_path, monkeypatch, record_property):
    """LDMPipeline, whose autoencoder is a VQModel."""
    torch.manual_seed(4)
    vq = diffusers.VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=16,
        sample_size=16,
    ).eval()
    vq.quantize.embedding.weight.data.normal_()
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    pipeline = saved(diffusers.LDMPipeline(vq, unet(), scheduler), tmp_path)
    teacher = teacher_of(tmp_path, (3, 16, 16))
    eps = noise(teacher.shape)
    starting_from(monkeypatch, pipeline, eps)
    images = torch.from_numpy(pipeline(batch_size=2, num_inference_steps=5, output_type="np").images)
    decoded = teacher.decode(ours(teacher, eps, "leading", 5))
    close((decoded / 2 + 0.5).permute(0, 2, 3, 1), images, record_property)
    latents = teacher.to_latents(noise((3, 16, 16)))
    torch.testing.assert_close(latents, vq.encode(noise((3, 16, 16))).latents * vq.config.scaling_factor)


# --- other processes -------------------------------------------------------------------------------------------------


def test_score_network(tmp_path, record_property):
    """NCSN++ of images in [0, 1]: E[y_0 | y] = y + s^2 score(y, s), in our range and at our noise level t = 2 s."""
    network = unet(time_embedding_type="fourier")
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=50.0)
    diffusers.ScoreSdeVePipeline(network, scheduler).save_pretrained(tmp_path)
    teacher = teacher_of(tmp_path)
    assert (teacher.schedule.t_min, teacher.schedule.t_max) == (0.02, 100.0)
    for s in (0.01, 0.5, 3.0, 50.0):
        y = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + s * noise(PIXELS)
        with torch.no_grad():
            y_0 = y + s**2 * network(y, torch.full((2,), s)).sample
            x_0 = teacher.denoise(2 * y - 1, time_like(y, 2 * s))
        scale = y_0.abs().max().clamp(min=1)
        close(x_0 / scale, (2 * y_0 - 1) / scale, record_property, f"at {s}")


def test_the_frequencies_of_a_score_network_are_not_trained(tmp_path):
    diffusers.ScoreSdeVePipeline(unet(time_embedding_type="fourier"), diffusers.ScoreSdeVeScheduler()).save_pretrained(
        tmp_path
    )
    student = teacher_of(tmp_path).student()
    assert "unet.time_proj.weight" in student.network.state_dict()
    assert "unet.time_proj.weight" not in dict(student.network.named_parameters())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(tmp_path, record_property, shift):
    """Euler's step on the velocity is DDIM's; a shift moves the grid and leaves the process."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    network = unet()
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path)
    scheduler.set_timesteps(sigmas=[0.9, 0.7, 0.4, 0.1])
    x = noise(PIXELS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    teacher = teacher_of(tmp_path)
    assert isinstance(teacher.schedule, FlowMatching) and teacher.denoiser.prediction == "flow"
    times = scheduler.sigmas.double().flip(0)  # from 0, where nothing is evaluated
    times[0] = times[1]
    with torch.no_grad():
        close(ddim(teacher.denoise, teacher.schedule, noise(PIXELS), times), x, record_property)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm(tmp_path, record_property, prediction):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction)
    network = unet()
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path)
    scheduler.set_timesteps(5)
    start = noise(PIXELS) * scheduler.init_noise_sigma
    x = start
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    teacher = teacher_of(tmp_path)
    times = scheduler.sigmas.double().flip(0)
    times[0] = times[1]
    with torch.no_grad():
        close(ddim(teacher.denoise, teacher.schedule, start, times), x, record_property)


@pytest.mark.parametrize("classes", [0, 10])
def test_consistency_model(tmp_path, monkeypatch, record_property, classes):
    """One step of our DDIM is the pipeline's one step; noising again and asking again, its two steps."""
    scheduler = diffusers.CMStochasticIterativeScheduler()
    network = unet(num_class_embeds=classes or None, resnet_time_scale_shift="scale_shift")
    pipeline = saved(diffusers.ConsistencyModelPipeline(network, scheduler), tmp_path)
    with pytest.raises(UserError, match=r"consistency family.*Possible: discrete"):
        diffusers_source(tmp_path, conditioning=Conditioning(classes)).plan()
    teacher = teacher_of(tmp_path, family=Consistency, conditioning=Conditioning(classes))
    eps, fresh = noise(PIXELS), noise(PIXELS).flip(0)
    labels = torch.tensor([3, 7]) if classes else None
    c = Condition(labels)
    seen = watch(monkeypatch, pipeline.scheduler)
    pipeline(batch_size=2, latents=eps, num_inference_steps=1, class_labels=labels, output_type="pt")
    with torch.no_grad():
        x_0 = Solver.parse("ddim").solve(partial(teacher.denoise, c=c), teacher.schedule, eps, 1)
    close(x_0, seen[-1], record_property, "one step")
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_consistency_models.randn_tensor", lambda shape, **_: fresh.clone()
    )
    pipeline(batch_size=2, latents=eps, num_inference_steps=2, class_labels=labels, output_type="pt")
    times = torch.tensor([0.002, pipeline.scheduler.sigmas[1], 80.0], dtype=torch.float64)
    with torch.no_grad():
        x_0 = renoise(partial(teacher.denoise, c=c), teacher.schedule, 80 * eps, times, lambda k: fresh)
    close(x_0, seen[-1], record_property, "two steps")


def test_a_consistency_function_is_the_identity_at_the_smallest_level(tmp_path):
    diffusers.ConsistencyModelPipeline(unet(), diffusers.CMStochasticIterativeScheduler()).save_pretrained(tmp_path)
    teacher = teacher_of(tmp_path, family=Consistency, clip="none")
    x = noise(PIXELS)
    with torch.no_grad():
        torch.testing.assert_close(teacher.denoise(x, time_like(x, 0.002)), x, atol=1e-5, rtol=0)


# --- the teacher as the harness uses it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> Path:
    """A class-conditional pipeline with a row for none, in a folder that no test changes."""
    folder = tmp_path_factory.mktemp("pixels")
    diffusers.DDPMPipeline(unet(num_class_embeds=11), diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def test_identity_follows_weights_and_reading(pixels, tmp_path):
    asked = {"conditioning": Conditioning(10)}
    first = teacher_of(pixels, **asked)
    copy = tmp_path / "elsewhere"
    shutil.copytree(pixels, copy)
    again = teacher_of(copy, **asked)
    assert again.sha256 == first.sha256 and again.provenance["path"] == "elsewhere"
    rewrite(copy / "scheduler" / "scheduler_config.json", beta_end=0.03)
    assert teacher_of(copy, **asked).sha256 != first.sha256
    diffusers.DDPMPipeline(unet(1, num_class_embeds=11), diffusers.DDPMScheduler()).save_pretrained(copy)
    assert teacher_of(copy, **asked).sha256 != first.sha256
    json.dumps(first.provenance, allow_nan=False)
    assert str(pixels.parent) not in json.dumps(first.provenance)


def rewrite(file: Path, **changes) -> None:
    """Change keys of a JSON object; None takes a key away."""
    plain = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in plain.items() if value is not None}))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"not weights", "is not a complete safetensors file"),
        (lambda data: data[: len(data) // 2], "is not a complete safetensors file"),
        (lambda data: LFS_POINTER, r"it is a pointer of Git LFS.*`git lfs pull`"),
    ],
    ids=["garbage", "cut off", "pointer"],
)
def test_the_plan_reads_headers_of_weights_and_untrained_reads_none(pixels, tmp_path, damage, message):
    shutil.copytree(pixels, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    asked = diffusers_source(tmp_path, conditioning=Conditioning(10))
    with pytest.raises(UserError, match=rf"unet of .* cannot be used: .*{message}"):
        asked.plan()
    assert diffusers_source(pixels, conditioning=Conditioning(10)).plan().images == 0
    untrained = asked.untrained()
    real = teacher_of(pixels, conditioning=Conditioning(10))
    assert untrained.shape == real.shape and untrained.clip == real.clip
    named = lambda teacher: {key: value.shape for key, value in teacher.denoiser.network.state_dict().items()}
    assert named(untrained) == named(real)
    with pytest.raises(UserError, match=r"unet of .* cannot be used"):
        asked.load(Progress(None))


def test_students_start_from_the_teacher_or_random(pixels):
    teacher = teacher_of(pixels, conditioning=Conditioning(10))
    x, t, c = noise(PIXELS), time_like(noise(PIXELS), 0.5), Condition(torch.tensor([1, 10]))
    student = teacher.student().eval()
    torch.testing.assert_close(student(x, t, c), teacher.denoiser(x, t, c))
    torch.manual_seed(1)
    fresh = teacher.student(fresh=True).eval()
    assert (fresh(x, t, c) - student(x, t, c)).abs().max() > 1e-3
    fresh(x, t, c).mean().backward()
    assert all(weight.grad is not None for weight in fresh.parameters())


def test_a_student_is_exported_as_a_pipeline(pixels, tmp_path):
    student = teacher_of(pixels, conditioning=Conditioning(10)).student()
    student.network.wrapped.save_pretrained(tmp_path / "unet")
    back = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet")
    original = diffusers.UNet2DModel.from_pretrained(pixels / "unet")
    for (name, got), (same, wanted) in zip(back.state_dict().items(), original.state_dict().items(), strict=True):
        assert name == same and torch.equal(got, wanted)


def test_old_pipelines_keep_everything_in_one_folder(tmp_path):
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "new")
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "new", old)
    for file in (old / "unet").iterdir():
        file.rename(old / file.name)
    (old / "scheduler" / "scheduler_config.json").rename(old / "scheduler_config.json")
    (old / "unet").rmdir()
    (old / "scheduler").rmdir()
    assert teacher_of(old).sha256 == teacher_of(tmp_path / "new").sha256


def test_weights_in_parts_and_variants(tmp_path):
    network = unet()
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    x, t = noise(PIXELS), time_like(noise(PIXELS), 0.5)
    whole = teacher_of(tmp_path).denoise(x, t)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    network.save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert torch.equal(teacher_of(tmp_path).denoise(x, t), whole)
    shutil.rmtree(tmp_path / "unet")
    network.half().save_pretrained(tmp_path / "unet", variant="fp16")
    with pytest.raises(UserError, match=r"Found: diffusion_pytorch_model.fp16.safetensors \(teacher.variant"):
        diffusers_source(tmp_path).plan()
    half = teacher_of(tmp_path, variant="fp16")
    assert {weight.dtype for weight in half.denoiser.parameters()} == {torch.float32}
    torch.testing.assert_close(half.denoise(x, t), whole, atol=0.05, rtol=0.05)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused_and_not_opened(tmp_path):
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").is_file()
    for act in (lambda: diffusers_source(tmp_path).plan(), lambda: teacher_of(tmp_path)):
        with pytest.raises(UserError, match="is a pickle, which can run code, and is not read"):
            act()


def test_missing_tensors_are_an_error(tmp_path):
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_out.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    for act in (lambda: teacher_of(tmp_path), lambda: diffusers_source(tmp_path).plan()):  # a dry run makes the plan
        with pytest.raises(UserError, match=r"1 tensors are missing or of another shape, such as conv_out.weight"):
            act()
    save_file(weights | {"conv_out.weight": torch.zeros(2, 8, 3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing or of another shape, such as conv_out.weight"):
        diffusers_source(tmp_path).plan()


def test_old_names_of_attention_tensors_are_accepted(tmp_path):
    """As Stable Diffusion's autoencoder has them: diffusers renames them as it loads."""
    pipeline = diffusers.DDPMPipeline(unet(channels=4), diffusers.DDPMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path)
    vae = autoencoder()
    vae.save_pretrained(tmp_path / "vae")
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights, renamed = load_file(file), {}
    for name, tensor in weights.items():
        for new, old in (
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ):
            name = name.replace(new, old)
        renamed[name] = tensor
    assert weights.keys() != renamed.keys()
    save_file(renamed, file, metadata={"format": "pt"})
    assert diffusers_source(tmp_path, (3, 16, 16)).plan()
    z = noise((4, 8, 8))
    torch.testing.assert_close(teacher_of(tmp_path, (3, 16, 16)).decode(z), vae.decode(z / 0.18215).sample.clamp(-1, 1))


def test_predict_epsilon_equals_the_prediction_type_that_replaced_it(tmp_path):
    """predict_epsilon=false of diffusers before 0.8 is prediction_type=sample."""
    scheduler = diffusers.DDPMScheduler(prediction_type="sample", clip_sample=False)
    diffusers.DDPMPipeline(unet(), scheduler).save_pretrained(tmp_path)
    new = teacher_of(tmp_path)
    rewrite(tmp_path / "scheduler" / "scheduler_config.json", prediction_type=None, predict_epsilon=False)
    old = teacher_of(tmp_path)
    assert (old.denoiser.prediction, old.sha256) == ("x0", new.sha256)
    x, t = noise(PIXELS), time_like(noise(PIXELS), 0.5)
    network = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet")
    torch.testing.assert_close(old.denoise(x, t), network(x, torch.full((2,), 499)).sample)


def test_tensors_that_a_config_does_not_describe_are_noted(tmp_path):
    """Such as those of classes, where the config has lost its num_class_embeds."""
    diffusers.DDPMPipeline(unet(num_class_embeds=4), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    asked = diffusers_source(tmp_path, conditioning=Conditioning(4))
    asked.plan()
    assert list(asked.notes()) == []
    rewrite(tmp_path / "unet" / "config.json", num_class_embeds=None)
    asked = diffusers_source(tmp_path)
    asked.plan()
    assert list(asked.notes()) == [
        f"the weights of unet of '{tmp_path.name}' have 1 tensors that its config does not describe, such as "
        "class_embedding.weight: ignored"
    ]


def test_unknown_keys_of_a_config_are_noted(tmp_path):
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    rewrite(tmp_path / "scheduler" / "scheduler_config.json", tensor_format="pt", skip_prk_steps=True)
    asked = diffusers_source(tmp_path)
    asked.plan()
    assert list(asked.notes()) == []  # those of other schedulers and of old versions are known
    rewrite(tmp_path / "scheduler" / "scheduler_config.json", predicts="images", twist=3)
    rewrite(tmp_path / "unet" / "config.json", residual="twice")
    asked.plan()
    assert list(asked.notes()) == [
        f"scheduler_config.json of '{tmp_path.name}': DDPMScheduler has no parameter predicts, twist: ignored",
        f"config.json of unet of '{tmp_path.name}': UNet2DModel has no parameter residual: ignored",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", r"is a file, but teacher=diffusers reads a pipeline's folder.*from_single_file"),
        ("model.pt", r"is a file, .*A \.pt file is a pickle, which can run code, and is not read"),
        ("unet/config.json", r"is a file, .*: give the folder '.*unet'"),
    ],
)
def test_a_file_instead_of_a_folder_is_refused(tmp_path, name, message):
    (tmp_path / "unet").mkdir()
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        diffusers_source(tmp_path / name).plan()
    (tmp_path / name).unlink()
    if name != "unet/config.json":
        with pytest.raises(UserError, match=f"no file .*{name}"):
            diffusers_source(f"models/{name}").plan()


def test_code_of_a_pipeline_is_not_run(pixels, tmp_path):
    shutil.copytree(pixels, tmp_path, dirs_exist_ok=True)
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    (tmp_path / "unet" / "evil.py").write_text("raise SystemExit('ran')")
    rewrite(tmp_path / "model_index.json", _class_name=["evil", "Pipeline"], unet=["evil", "Network"])
    with pytest.raises(UserError, match=r"no class 'Network' as unet .* Possible: DiTTransformer2DModel, UNet2DModel"):
        diffusers_source(tmp_path, conditioning=Conditioning(10)).plan()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"shape": (3, 16, 16)}, r"its images are \(C,H,W\) = \(3, 8, 8\), the dataset's are \(3, 16, 16\)"),
        ({"conditioning": WITHOUT_CLASSES}, "knows 10 or 11 classes and cannot serve conditional=false"),
        ({"conditioning": Conditioning(7)}, "knows 10 or 11 classes and cannot serve conditional=true with 7 classes"),
        ({"conditioning": Conditioning(11, 2.0)}, "has no embedding for no class: it cannot be guided"),
    ],
)
def test_what_does_not_fit(pixels, asked, message):
    with pytest.raises(UserError, match=message):
        diffusers_source(pixels, **{"conditioning": Conditioning(10)} | asked).plan()


def test_text_pipelines_are_refused_with_advice(pixels, tmp_path):
    shutil.copytree(pixels, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    with pytest.raises(UserError, match=r"takes prompts \(it has text_encoder\)"):
        diffusers_source(tmp_path, conditioning=Conditioning(10)).plan()


@pytest.mark.parametrize("setting", [{"variant": "../fp16"}, {"clip": "hard"}])
def test_settings_are_checked(tmp_path, setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        diffusers_source(tmp_path, **setting)


def test_a_missing_pipeline_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for path, message in (
        ("", "needs teacher.path=FOLDER"),
        (str(tmp_path / "nowhere"), "no folder"),
        (str(tmp_path), "it has no model_index.json"),
        (
            "google/ddpm-cifar10-32",
            "allow its download: teacher=diffusers teacher.path=google/ddpm-cifar10-32 teacher.download=true",
        ),
    ):
        with pytest.raises(UserError, match=message):
            diffusers_source(path).plan()


def test_only_what_is_needed_is_downloaded(pixels, monkeypatch):
    """Configs for the plan, one set of weights for the teacher: repositories hold others too, and whole checkpoints."""
    asked = []

    def snapshot(repository, revision, local_files_only, allow_patterns):
        asked.append((repository, revision, local_files_only, allow_patterns))
        return str(pixels)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    hub = diffusers_source("owner/name", conditioning=Conditioning(10), download=True, revision="v1")
    assert hub.plan().origin == "owner/name"
    assert hub.load(Progress(None)).provenance["revision"] == "v1"
    assert asked[0] == ("owner/name", "v1", False, ["*.json"])
    wanted = lambda file: any(fnmatch(file, pattern) for pattern in asked[-1][3])
    assert wanted("unet/diffusion_pytorch_model.safetensors") and wanted("diffusion_pytorch_model.safetensors")
    assert wanted("unet/diffusion_pytorch_model-00001-of-00002.safetensors") and wanted("vae/config.json")
    for other in ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/evil.py"):
        assert not wanted(other)


# --- what other teachers use -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CLIPTextModel", "T5EncoderModel"])
def test_text_encoders_load_by_the_same_functions(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "CLIPTextModel":
        config = transformers.CLIPTextConfig(
            vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    else:
        config = transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    encoder = getattr(transformers, name)(config).eval()
    encoder.save_pretrained(tmp_path / "text_encoder")
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", name]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    index = read_index(tmp_path)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        wanted = encoder(tokens).last_hidden_state
        torch.testing.assert_close(load_component(index, "text_encoder").eval()(tokens).last_hidden_state, wanted)
        assert blank_component(index, "text_encoder")(tokens).last_hidden_state.shape == wanted.shape
    assert [file.name for file in weights_files(index, "text_encoder")] == ["model.safetensors"]
