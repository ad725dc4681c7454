"""Scheduler configs: alpha, sigma and the network's time equal those that diffusers computes."""

from __future__ import annotations

import json

import pytest
import torch

from distillbench.diffusion.samplers import TIME_GRIDS
from distillbench.diffusion.schedules import VE, DiscreteBetas, FlowMatching
from distillbench.errors import UserError
from distillbench.networks.diffusers_calls import Call, ConsistencyCall, ScoreCall
from distillbench.teachers.diffusers_schedulers import DISCRETE, read_config

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' use of numpy


def config_of(scheduler, tmp_path) -> dict:
    """The config as diffusers' own file has it."""
    scheduler.save_config(tmp_path)
    return json.loads((tmp_path / "scheduler_config.json").read_text())


def indices(schedule: DiscreteBetas) -> torch.Tensor:
    """t of every index, (T,)."""
    return (torch.arange(schedule.steps, dtype=torch.float64) + 1) / schedule.steps


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize(
    "settings",
    [{}, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 400}],
)
def test_every_discrete_scheduler(name, settings, tmp_path):
    scheduler = getattr(diffusers, name)(**settings)
    reading = read_config(config_of(scheduler, tmp_path))
    alphas = scheduler.alphas_cumprod.double()
    assert reading.schedule.steps == len(alphas) and reading.prediction == "eps"
    t = indices(reading.schedule)
    torch.testing.assert_close(reading.schedule.alpha(t).double() ** 2, alphas, rtol=2e-5, atol=0)
    torch.testing.assert_close(reading.schedule.sigma(t).double() ** 2, 1 - alphas, rtol=2e-4, atol=0)
    torch.testing.assert_close(reading.call.argument(t), torch.arange(len(alphas)).double())
    assert reading.clip.kind == ("static" if scheduler.config.get("clip_sample") else "")


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_beta_schedules(betas, tmp_path):
    scheduler = diffusers.DDPMScheduler(beta_schedule=betas, beta_start=0.0003, beta_end=0.017)
    schedule = read_config(config_of(scheduler, tmp_path)).schedule
    got = schedule.alpha(indices(schedule)).double() ** 2
    torch.testing.assert_close(got, scheduler.alphas_cumprod.double(), rtol=2e-5, atol=0)


def test_zero_terminal_snr_is_finite_and_elsewhere_exact(tmp_path):
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    schedule = read_config(config_of(scheduler, tmp_path)).schedule
    t = indices(schedule)
    torch.testing.assert_close(
        schedule.alpha(t).double()[:-1] ** 2, scheduler.alphas_cumprod.double()[:-1], rtol=1e-3, atol=1e-9
    )
    assert scheduler.alphas_cumprod[-1] == 0 and schedule.lam(t[-1]).isfinite() and schedule.alpha(t[-1]) < 1e-6
    torch.testing.assert_close(schedule.t_of_lam(schedule.lam(t)), t)
    with pytest.raises(UserError, match=r"rescale_betas_zero_snr with prediction_type 'epsilon'"):
        read_config(dict(scheduler.config) | {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"})


def test_betas_themselves():
    betas = torch.linspace(0.001, 0.2, 7)
    schedule = DiscreteBetas(betas)
    assert schedule.steps == 7 and schedule.t_min == 1 / 7
    expected = (1 - betas.double()).cumprod(0).sqrt()
    torch.testing.assert_close(schedule.alpha(indices(schedule)).double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(DiscreteBetas("linear").decay, DiscreteBetas(torch.linspace(1e-4, 0.02, 1000)).decay)
    for wrong in (torch.zeros(3), torch.tensor([0.1, 1.0]), torch.tensor([]), torch.tensor([float("nan")])):
        with pytest.raises(UserError, match="above 0 and below 1"):
            DiscreteBetas(wrong)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [5, 7, 50])
def test_grids_are_the_indices_of_diffusers(spacing, steps, tmp_path):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    reading = read_config(config_of(scheduler, tmp_path))
    scheduler.set_timesteps(steps)
    times = TIME_GRIDS[spacing](reading.schedule, steps)[1:]
    torch.testing.assert_close(reading.call.argument(times), scheduler.timesteps.flip(0).double(), atol=1e-9, rtol=0)


def test_prediction_types():
    read = lambda name, **config: read_config({"_class_name": name, **config})
    for name, prediction in (("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v")):
        assert read("DDPMScheduler", prediction_type=name).prediction == prediction
    for old, new in ((True, "eps"), (False, "x0"), (None, "eps")):  # of diffusers before 0.8
        assert read("DDPMScheduler", predict_epsilon=old).prediction == new
    assert read("DDPMScheduler", predict_epsilon=False, prediction_type="sample").prediction == "x0"
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        reading = read(name, prediction_type="flow_prediction", use_flow_sigmas=True)
        assert reading.family == "flow" and isinstance(reading.schedule, FlowMatching)


def test_a_flow_network_gets_steps_times_t():
    reading = read_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    t = scheduler.sigmas[:-1].double()
    torch.testing.assert_close(reading.call.argument(t), scheduler.timesteps.double(), rtol=1e-6, atol=0)


def test_score_networks_get_the_noise_level_of_images_in_0_1():
    reading = read_config({"_class_name": "ScoreSdeVeScheduler", "sigma_max": 348.0})
    assert isinstance(reading.schedule, VE) and isinstance(reading.call, ScoreCall)
    assert (reading.schedule.t_min, reading.schedule.t_max) == (0.02, 696.0)
    assert reading.call.argument(torch.tensor([696.0])) == 348


def test_edm_and_consistency_networks_get_the_logarithm_of_the_noise_level():
    edm, scheduler = read_config({"_class_name": "EDMEulerScheduler"}), diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(5)
    levels = scheduler.sigmas[:-1].double()
    torch.testing.assert_close(edm.call.argument(levels.log() / 4), scheduler.timesteps.double(), rtol=1e-5, atol=1e-6)
    cm, scheduler = (
        read_config({"_class_name": "CMStochasticIterativeScheduler"}),
        diffusers.CMStochasticIterativeScheduler(),
    )
    scheduler.set_timesteps(5)
    levels = scheduler.sigmas[:-1].double()
    argument = cm.call.argument(levels.log() / 4)
    torch.testing.assert_close(argument, scheduler.timesteps.double(), rtol=1e-5, atol=1e-4)
    assert isinstance(cm.call, ConsistencyCall) and cm.clip.kind == "static"


@pytest.mark.parametrize("level", [0.002, 0.05, 1.0, 80.0])
def test_a_consistency_function_as_an_edm_network(level):
    """k_skip x^ + k_out F' = c_skip x^ + c_out F, with diffusers' own c_skip and c_out, in float64."""
    scheduler = diffusers.CMStochasticIterativeScheduler()
    sigma, x_hat, F = torch.tensor([[[[level]]]]).double(), torch.tensor([[[[0.7 + level]]]]).double(), 0.3
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma)
    k_skip, k_out = scheduler.get_scalings(sigma)
    n = (sigma**2 + 0.25).sqrt()
    call = ConsistencyCall(1000.0, e=0.002)
    F_prime = call.output(torch.full_like(x_hat, F), x_hat / n, sigma.flatten().log() / 4)
    torch.testing.assert_close(k_skip * x_hat + k_out * F_prime, c_skip * x_hat + c_out * F, rtol=1e-12, atol=1e-12)


def test_clipping():
    read = lambda **config: read_config({"_class_name": "DDPMScheduler", **config}).clip.kind
    assert read() == "static" and read(clip_sample=False) == ""
    assert read(thresholding=True) == "static"  # with diffusers' default largest value, 1
    assert read(thresholding=True, sample_max_value=1.5) == "dynamic"
    with pytest.raises(UserError, match=r"clips data predictions to 3.0"):
        read(clip_sample_range=3.0)


def test_only_settings_that_are_used_are_recorded():
    """Settings of diffusers' sampler are no part of the teacher's identity; those of the process are."""
    read = lambda **config: read_config({"_class_name": "DDIMScheduler", **config}).plain
    assert read() == read(timestep_spacing="trailing", steps_offset=1, set_alpha_to_one=False)
    for change in (
        {"beta_end": 0.03},
        {"prediction_type": "sample"},
        {"num_train_timesteps": 500},
        {"clip_sample": False},
    ):
        assert read(**change) != read()
    json.dumps(read(trained_betas=[0.1, 0.2]), allow_nan=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "LCMSchedular"}, r"no scheduler 'LCMSchedular'.*Possible: CMStochastic"),
        ({"_class_name": "LCMScheduler"}, r"^no scheduler 'LCMScheduler' is read\. Possible: CMStochastic"),  # no guess
        (
            {"_class_name": "DDPMScheduler", "predict_epsilon": False, "prediction_type": "v_prediction"},
            r"predict_epsilon='false' and prediction_type='\"v_prediction\"'",
        ),
        ({"_class_name": "DDPMScheduler", "predict_epsilon": "no"}, r"predict_epsilon='\"no\"'"),
        ({}, r"no scheduler 'None'"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "cosine"}, r"no beta_schedule 'cosine'.*Possible: linear"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "eps"}, r"no prediction_type 'eps'.*Possible: epsilon"),
        ({"_class_name": "DDIMScheduler", "beta_start": "small"}, r"the config of DDIMScheduler cannot be read"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}, r"sigma_data=1.0. Possible: 0.5"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, r"no timestep_type 'continuous'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, r"invert_sigmas=true"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1, 2.0]}, r"above 0 and below 1"),
    ],
)
def test_unsupported_configs_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        read_config(config)


def test_a_plain_call_changes_neither_x_nor_output():
    x = torch.randn(2, 3, 4, 4)
    call = Call(1000.0, -1.0)
    assert call.input(x) is x and call.output(x, x, torch.zeros(2)) is x
