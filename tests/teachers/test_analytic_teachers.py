"""Closed-form teachers and the dataset with the same distribution, alone and in runs."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from analytic import close
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.noise import Noise, stream_key
from distillbench.diffusion.samplers import Solver, time_like
from distillbench.diffusion.schedules import SCHEDULES
from distillbench.errors import UserError
from distillbench.execution.run import run
from distillbench.registry import load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.runs.shared_context import make_source
from distillbench.system.progress import Progress
from distillbench.teachers.teacher import Teacher

IMAGES = "dataset.means=[[-0.5,0.1,0.3,0.2],[0.4,-0.3,0,0.6]]", "dataset.stds=[[0.1],[0.13]]", "dataset.weights=[.4,.6]"
ONE = "dataset.means=[[-0.5],[0.13],[0.4]]", "dataset.shape=[1,1,1]"
SILENT = Progress(None)


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def source(registry, tmp_path, *words):
    (config,) = compose_runs(["methods=[direct]", f"results_dir={tmp_path}", *words], registry)
    return make_source(config, registry, "cpu")


def teacher_of(registry, tmp_path, *words) -> Teacher:
    _, family, conditioning = source(registry, tmp_path, *words)
    family.plan()
    return dataclasses.replace(family.load(SILENT), conditioning=conditioning)


# --- the teachers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_teacher_samples_have_the_distribution_of_the_dataset(registry, tmp_path, name):
    """One pixel, 64 steps of DPM-Solver++(2M): Kolmogorov-Smirnov against real images, at a level of about 1 %."""
    words = ["dataset=gmm", "teacher=gmm", *ONE, f"teacher.schedule={name}", "dataset.count=5000"]
    teacher = teacher_of(registry, tmp_path, *words)
    dataset, *_ = source(registry, tmp_path, *words)
    eps = Noise(stream_key("test", 0), range(5000), teacher.shape)(0)
    with torch.no_grad():
        x_0 = Solver.parse("dpmpp_2m").solve(teacher.denoise, teacher.schedule, eps, 64)
    real = dataset.read(torch.arange(5000))
    assert ks_2samp(x_0.flatten().numpy(), real.flatten().numpy()).statistic < 1.63 * (2 / 5000) ** 0.5


def test_the_gaussian_teacher_is_the_best_linear_denoiser_of_any_images(registry, tmp_path):
    """Normal equations on digits with noise, an independent answer: least squares of x_0 on x_t, sampled."""
    teacher = teacher_of(registry, tmp_path, "dataset=digits", "teacher=gaussian")
    images = source(registry, tmp_path, "dataset=digits")[0].images.double().flatten(1) / 127.5 - 1
    t = torch.tensor([[[[0.5]]]], dtype=torch.float64)
    alpha, sigma = teacher.schedule.alpha(t).item(), teacher.schedule.sigma(t).item()
    mean, centred = images.mean(0), images - images.mean(0)
    covariance = centred.T @ centred / len(images)
    gain = np.linalg.solve((alpha**2 * covariance + sigma**2 * torch.eye(64)).numpy(), alpha * covariance.numpy()).T
    x_t = alpha * images[:5] + sigma * torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).double()
    expected = mean + (x_t - alpha * mean) @ torch.from_numpy(gain).T
    f = teacher.denoise(x_t.float().view(5, 1, 8, 8), time_like(x_t, 0.5)).double().flatten(1)
    close(f, expected, atol=2e-5)


def test_many_steps_converge_to_the_exact_map_of_a_gaussian(registry, tmp_path):
    words = "dataset.means=[[0.2,-0.1]]", "dataset.stds=[[0.26,0.1]]", "dataset.weights=[1]"
    teacher = teacher_of(registry, tmp_path, "dataset=gmm", "teacher=gaussian", *words)
    distribution = teacher.denoiser.network.distribution
    eps = Noise(stream_key("test", 0), range(200), teacher.shape)(0)
    solver = Solver.parse("heun")
    t = time_like(eps, solver.times(teacher.schedule, 200)[-1])  # noise level 80
    exact = distribution.transport(teacher.schedule, teacher.schedule.sigma(t) * eps, t, time_like(eps, 0.0))
    with torch.no_grad():
        x_0 = solver.solve(teacher.denoise, teacher.schedule, eps, 200)
    close(x_0, exact, atol=2e-3)


def test_classes_are_components_and_no_class_is_the_mixture(registry, tmp_path):
    """Guidance at w = 1 draws each component; w = 0 draws the mixture whatever is asked."""
    for w, means in ((1.0, (-0.5, 0.13, 0.4)), (0.0, (0.0, 0.0, 0.0))):
        words = "dataset=gmm", "teacher=gmm", *ONE, "conditional=true", f"guidance={w}"
        teacher = teacher_of(registry, tmp_path, *words)
        c = teacher.conditioning.of_images(range(3000), "cpu")
        eps = Noise(stream_key("test", 0), range(3000), teacher.shape)(0)
        with torch.no_grad():
            x_0 = Solver.parse("ddim").solve(partial(teacher.denoise, c=c), teacher.schedule, eps, 32).flatten()
        for label, mean in enumerate(means):
            mixture_mean = 0.3 * -0.5 + 0.5 * 0.13 + 0.2 * 0.4
            assert abs(x_0[c.labels == label].mean() - (mean if w else mixture_mean)) < 0.04
        assert teacher.teacher_rows.rows == 3000 * 32 * (2 if w == 0 else 1)


def test_students_start_random_or_fitted_and_the_fit_is_cached(registry, tmp_path):
    """A fitted denoiser is far closer to the exact one than a fresh one, and is read from the cache bit for bit."""
    words = "dataset=gmm", "teacher=gmm", *IMAGES, "dataset.shape=[1,2,2]", "teacher.width=32", "teacher.depth=1"
    fresh = teacher_of(registry, tmp_path, *words)
    fitted = teacher_of(registry, tmp_path, *words, "teacher.fit_images=50000")
    again = teacher_of(registry, tmp_path, *words, "teacher.fit_images=50000")
    assert fitted.sha256 == again.sha256 != fresh.sha256
    x_0 = fresh.denoiser.network.distribution.draw(500, torch.Generator().manual_seed(1))[0].float()
    t = time_like(x_0, 0.5)
    x_t = fresh.schedule.alpha(t) * x_0 + fresh.schedule.sigma(t) * torch.randn(x_0.shape)
    with torch.no_grad():
        error = [(teacher.student()(x_t, t) - fresh.denoise(x_t, t)).square().mean() for teacher in (fresh, fitted)]
    assert error[1] < 0.1 * error[0]
    one, other = fitted.student(), again.student()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(next(fresh.student(fresh=True).parameters()), next(fresh.student().parameters()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=digits", "teacher=gmm"], "teacher=gmm needs a dataset with a known distribution"),
        (["dataset=gmm", "dataset.count=0"], "teacher=trained must be trained first, but dataset=gmm has no images"),
        (["dataset=gmm", "methods.direct.schedule=vee"], "schedule must be one of vp_cosine, .* Did you mean 've'"),
        (["dataset=gmm", "teacher=gaussian", "conditional=true"], "does not support conditional=true"),
        (["dataset=gmm", "teacher=gmm", "dataset.stds=[[0.1],[0.1]]"], "dataset.stds"),
        (["dataset=gmm", "teacher=gmm", "dataset.weights=[1,1,1]"], "dataset.weights"),
        (["dataset=gmm", "teacher=gmm", "dataset.shape=[1,2,2]"], "dataset.shape"),
        (["dataset=gmm", "teacher=gmm", "teacher.network=unet"], "multiples of 4"),
        (["dataset=gmm", "dataset.means=[[-1.5,0.3],[0.4,-0.8],[1,1]]"], r"images lie in .* reaches 1.7"),
    ],
)
def test_what_does_not_fit_is_refused(registry, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        source(registry, tmp_path, *words)[1].plan()


# --- runs ------------------------------------------------------------------------------------------------------------

SMALL = ["experiment=smoke", "evaluation.images=32", "evaluation.batch_size=32", "budget.images=512"]
NARROW = ["teacher.width=16", "teacher.depth=1"]
METHODS = ("boot", "cm", "ct", "direct", "pd", "sid", "tract")


def table_of(registry, tmp_path, *words):
    configs = compose_runs([*words, *SMALL, f"results_dir={tmp_path}"], registry)
    outcome = run(plan(configs, registry), configs, SILENT, lambda rows: None)
    bad = outcome.table[outcome.table["status"] != "ok"]
    assert not len(bad), bad[["method", "nfe", "reason"]].to_string()
    return outcome.table


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("methods", [("ct", "pd", "sid"), METHODS], ids=len)
def test_every_method_runs_on_a_closed_form(methods, registry, tmp_path):
    """On small images, so that every score has a value; a Gaussian mixture's samples are no digits, but they count."""
    words = "dataset=gmm", "teacher=gmm", *IMAGES, "dataset.shape=[1,2,2]", "dataset.count=256", *NARROW
    table = table_of(registry, tmp_path, f"methods=[{','.join(methods)}]", *words)
    students = table[table["training_seed"].notna()]
    assert set(students["method"]) == set(methods)
    assert students["fd_efficientnet_lite0"].notna().all()
    assert (students.loc[students["method"] == "ct", "train_teacher_nfe"] == 0).all()
    assert students.loc[students["method"] == "sid", "teacher_rmse"].isna().all()
    assert table["guidance"].isna().all()


def test_data_free_methods_need_no_images_and_the_others_are_refused(registry, tmp_path):
    words = ["dataset=gmm", "teacher=gmm", "dataset.count=0", *NARROW]
    table = table_of(registry, tmp_path, "methods=[boot,sid]", *words)
    assert table["fd_efficientnet_lite0"].isna().all() and table["reason"].str.contains("1 or 3 channels").all()
    with pytest.raises(UserError, match="cm needs real images, and dataset=gmm has none"):
        plan(compose_runs(["methods=[boot,cm]", *words, f"results_dir={tmp_path}"], registry), registry)


@pytest.mark.parametrize(
    "guidance",
    [["guidance=2"], ["guidance=2", "guidance_range=[1,3]"]],
)
@pytest.mark.nightly
def test_every_method_that_has_a_teacher_distils_a_guided_one(registry, tmp_path, guidance):
    """Two counted evaluations wherever the guided teacher answers; a later phase's teacher is a student, at one."""
    words = ["dataset=gmm", "teacher=gmm", *IMAGES, "dataset.shape=[1,2,2]", "dataset.count=256", *NARROW]
    words += ["conditional=true", "evaluation.metrics=[teacher_rmse]", "methods.direct.pairs=64"]
    methods = ",".join(name for name in METHODS if name != "ct")
    table = table_of(registry, tmp_path, f"methods=[{methods}]", *words, *guidance)
    assert table["guidance"].eq(2).all()
    teacher = table[table["training_seed"].isna()]
    assert teacher["nfe"].tolist() == [2, 8]  # 1 and 4 steps
    nfe = table.drop_duplicates("method").set_index("method")["train_teacher_nfe"] / 512
    assert nfe["cm"] == 4 and nfe["sid"] == 2  # Heun: two answers; one answer
    assert nfe["direct"] == 64 * 8 * 2 / 512
    assert nfe["boot"] == 2 * 2.25  # two answers for Heun, and a quarter for the boundary
    assert nfe["pd"] < 2 * 2 and nfe["tract"] == 1.5  # guided in their first phases only
    with pytest.raises(UserError, match="ct learns from data and cannot be guided"):
        plan(compose_runs(["methods=[ct]", *words[:-1], *guidance, f"results_dir={tmp_path}"], registry), registry)


def test_one_training_with_drawn_w_serves_all_sampled_weights(registry, tmp_path):
    words = ["dataset=gmm", "teacher=gmm", *NARROW, "conditional=true", "guidance_range=[1,3]", "guidance=1,3"]
    table = table_of(registry, tmp_path, "methods=[cm]", *words)
    students = table[(table["method"] == "cm") & (table["nfe"] == 1)]
    assert students["guidance"].tolist() == [1.0, 3.0]
    assert len(list((tmp_path / "cells").glob("*/student.safetensors"))) == 1
    assert students["teacher_rmse"].nunique() == 2
    assert (students["settings"] == "guidance_range=[1.0, 3.0]").all()
    teacher = table[table["method"] == "teacher:ddim"].groupby("guidance")["nfe"].apply(list)
    assert teacher[1.0] == [1, 4] and teacher[3.0] == [2, 8]  # at w = 1 the class alone is asked for


def test_boot_passes_to_the_teacher_if_asked_for(registry, tmp_path):
    words = ["dataset=gmm", "teacher=gmm", *NARROW, "methods.boot.handover=0.5", "evaluation.nfe=[1,3]"]
    table = table_of(registry, tmp_path, "methods=[boot]", *words)
    students = table[table["method"] == "boot"]
    assert students["nfe"].tolist() == [1, 3] and students["settings"].str.contains("handover=0.5").all()


@pytest.mark.nightly
def test_the_teacher_has_rows_of_every_sampler(registry, tmp_path):
    words = ["dataset=gmm", "teacher=gmm", *NARROW, "evaluation.teacher_samplers=[ddim,heun,dpmpp_2m/uniform,ddpm]"]
    table = table_of(registry, tmp_path, "methods=[direct]", *words)
    teacher = table[table["training_seed"].isna()].groupby("method")["nfe"].apply(list)
    assert teacher["teacher:heun"] == [1, 7] and teacher["teacher:ddim"] == [1, 4]
    assert set(teacher.index) == {"teacher:ddim", "teacher:heun", "teacher:dpmpp_2m/uniform", "teacher:ddpm"}
    rmse = table.set_index(["method", "nfe"])["teacher_rmse"]
    assert rmse["teacher:ddim", 4] == 0 and rmse["teacher:heun", 7] > 0
    assert rmse.isna().tolist() == [name == ("teacher:ddpm", 4) for name in rmse.index]  # it adds fresh noise


@pytest.mark.nightly
def test_a_method_works_on_another_schedule_at_equal_snr(registry, tmp_path):
    words = ["dataset=gmm", "teacher=gmm", *NARROW, "methods.cm.schedule=ve", "methods.pd.schedule=flow_matching"]
    table = table_of(registry, tmp_path, "methods=[cm,pd]", *words)
    assert table["settings"].str.contains("schedule=ve").any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods=[boot]", "methods.boot.times=leading"], "times=leading does not lead from t_max to t_min"),
        (["methods=[boot]", "methods.boot.times=linspace"], "times=linspace does not lead from t_max to t_min"),
        (["methods=[tract]", "methods.tract.teacher_step=heun"], "second slope has weight 1085"),
        (["methods=[cm]", "methods.cm.times=uniform"], "heun needs noise levels close together"),
        (["methods=[direct]", "methods.direct.solver=heun/uniform"], "heun needs noise levels close together"),
        (["methods=[direct]", "methods.direct.solver=ddim/leading", "methods.direct.steps=1001"], "1000"),
        (["methods=[direct]", "methods.direct.solver=ddpm"], "adds noise of its own"),
        (["methods=[sid]", "methods.sid.sigma_init=1e9"], "sigma_init must be a noise level of the schedule"),
        (["methods=[pd]", "evaluation.teacher_samplers=[ddim/trailing]", "evaluation.teacher_steps=[1,2000]"], "1000"),
        (["methods=[pd]", "evaluation.nfe=[3]"], "pd cannot sample with evaluation.nfe=.3.. Possible: 1, 2, 4, 8"),
        (["methods=[pd]", "teacher.prediction=eps"], "cannot predict eps"),
    ],
)
def test_what_a_method_cannot_do_is_refused_before_anything_runs(registry, tmp_path, words, message):
    words = [*words, "dataset=gmm", "teacher=gmm", *NARROW, f"results_dir={tmp_path}"]
    with pytest.raises(UserError, match=message):
        plan(compose_runs(words, registry), registry)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["pd", "tract"])
@pytest.mark.parametrize("times", ["leading", "karras"])
def test_phases_start_from_the_top_of_their_own_grid(registry, tmp_path, name, times):
    """Untrained students are the teacher's start: what they are first asked is sigma_t eps at the grid's highest t."""
    teacher = teacher_of(registry, tmp_path, "dataset=gmm", "teacher=gmm", *NARROW, "teacher.schedule=ve")
    cls = registry.get("methods", name).cls
    method = cls(cls.Config(times=times), teacher)
    asked = []
    for student in method.students.values():
        student.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[:2]))
    eps = Noise(stream_key("test", 0), range(4), teacher.shape)
    for nfe in (1, 2):
        asked.clear()
        method.sample(eps, nfe, UNCONDITIONAL)
        x, t = asked[0]
        close(x, t.float() * eps(0), rtol=1e-6)


@pytest.mark.nightly
def test_pairs_with_drawn_guidance_weights_are_cached(registry, tmp_path):
    words = ["methods=[direct]", "dataset=gmm", "teacher=gmm", *NARROW, *SMALL, "conditional=true", "guidance=2"]
    for lr in (1e-3, 2e-3):
        more = [f"methods.direct.lr={lr}", "methods.direct.pairs=64", "guidance_range=[1,3]"]
        configs = compose_runs([*words, *more, f"results_dir={tmp_path}"], registry)
        run(plan(configs, registry), configs, SILENT, lambda rows: None)
    (manifest,) = (tmp_path / "cache" / "pairs").glob("*/manifest.json")
    before = manifest.stat().st_mtime_ns
    configs = compose_runs([*words, *more, "methods.direct.beta1=0.8", f"results_dir={tmp_path}"], registry)
    run(plan(configs, registry), configs, SILENT, lambda rows: None)
    assert manifest.stat().st_mtime_ns == before
