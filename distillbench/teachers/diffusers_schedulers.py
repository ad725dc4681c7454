"""Converts the scheduler config of a diffusers checkpoint to our schedule, parameterisation and time.

A scheduler of diffusers describes a training process and a sampler. Here only the process is used: betas, noise levels,
the network's prediction and its time input. Settings of the sampler (spacing, order, Karras's levels, the shift of a
flow's grid) are ignored, because distillbench has its own samplers. Clipping of data predictions is used too, because
it changes the teacher's predictions.

| family      | schedule, and our t                               | network's time           | prediction      |
|-------------|---------------------------------------------------|--------------------------|-----------------|
| discrete    | DiscreteBetas, t = (i + 1) / T for index i        | i = T t - 1, or between  | eps, x0, v      |
| flow        | FlowMatching, x_t = (1 - t) x_0 + t eps           | T t                      | flow (eps - x0) |
| score       | VE, t = 2 s, s the noise level of images in [0,1] | s = t / 2                | eps (from score)|
| edm         | VE, t the noise level                             | log(t) / 4               | edm             |
| consistency | VE, t the noise level                             | 250 log(t)               | edm             |

T is `num_train_timesteps`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillbench.diffusion.denoiser import SIGMA_DATA
from distillbench.diffusion.schedules import BETAS, VE, DiscreteBetas, FlowMatching, NoiseSchedule
from distillbench.errors import UserError, quoted, unsupported
from distillbench.networks.diffusers_calls import Call, ConsistencyCall, ScoreCall
from distillbench.storage.files import key_of
from distillbench.teachers.teacher import Clip

MOST_STEPS = 100_000  # of a training process
FINAL_SIGNAL = 2.0**-40  # replaces abar_T = 0: alpha = 1e-6, log(sigma/alpha) = 13.9 instead of infinity


@dataclass(frozen=True)
class SchedulerReading:
    """How to use a checkpoint. `plain` has the same in plain values, for the teacher's hash and provenance."""

    family: str  # discrete, flow, score, edm or consistency
    schedule: NoiseSchedule
    prediction: str
    call: Call
    clip: Clip
    plain: dict[str, Any]


# --- discrete betas --------------------------------------------------------------------------------------------------


def _sigmoid(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start


# (beta_start, beta_end, T) -> beta_0, ..., beta_{T-1}, (T,) float64, under diffusers' names.
BETA_SCHEDULES: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": lambda start, end, steps: torch.linspace(start, end, steps, dtype=torch.float64),
    "scaled_linear": lambda start, end, steps: torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2,
    "squaredcos_cap_v2": lambda start, end, steps: BETAS["squaredcos_cap_v2"](steps),
    "sigmoid": _sigmoid,
}

OLD_PREDICTION = "predict_epsilon"  # of diffusers before 0.8
OLD_KEYS = (OLD_PREDICTION, "tensor_format", "timestep_values")  # removed from all classes of diffusers
PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def betas(config: Mapping[str, Any]) -> Tensor:
    """beta_0, ..., beta_{T-1} of a scheduler's full config, (T,) float64.

    With `rescale_betas_zero_snr` the last abar is 2^-40 instead of 0, because log(sigma/alpha) must be finite; x_T
    differs from pure noise by at most 1e-6.
    """
    if config.get("trained_betas") is not None:
        table = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    else:
        name = config["beta_schedule"]
        if name not in BETA_SCHEDULES:
            raise unsupported("beta_schedule", str(name), BETA_SCHEDULES, " in the scheduler's config")
        steps = config["num_train_timesteps"]
        if type(steps) is not int or not 2 <= steps <= MOST_STEPS:
            raise ValueError(f"num_train_timesteps is {quoted(str(steps))}, possible: 2 to {MOST_STEPS:,}")
        table = BETA_SCHEDULES[name](config["beta_start"], config["beta_end"], config["num_train_timesteps"])
    return _zero_terminal_snr(table) if config.get("rescale_betas_zero_snr") else table


def _zero_terminal_snr(table: Tensor) -> Tensor:
    """Lin et al. 2023, arXiv:2305.08891, algorithm 1: sqrt(abar) shifted to end at 0 and scaled to keep its start."""
    root = (1 - table).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = torch.cat([torch.ones(1).double(), root[:-1] ** 2, torch.tensor([FINAL_SIGNAL]).double()])
    return 1 - abar[1:] / abar[:-1]


# --- families of schedulers ------------------------------------------------------------------------------------------


def _discrete(config: Mapping[str, Any]) -> SchedulerReading:
    if config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return _flow(config)
    if config.get("timestep_type", "discrete") != "discrete":
        raise unsupported("timestep_type", str(config["timestep_type"]), ["discrete"], " in the scheduler's config")
    prediction = _prediction(config, PREDICTION_TYPES)
    if prediction == "eps" and config.get("rescale_betas_zero_snr"):
        raise UserError(
            "the scheduler's config has rescale_betas_zero_snr with prediction_type 'epsilon': at zero SNR the data "
            "cannot be computed from the noise. Possible: v_prediction, sample"
        )
    schedule = DiscreteBetas(betas(config))
    plain = {name: config[name] for name in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")}
    if config.get("trained_betas") is not None:
        plain = {"trained_betas": key_of([float(beta) for beta in config["trained_betas"]])}
    plain["rescale_betas_zero_snr"] = bool(config.get("rescale_betas_zero_snr"))
    return _reading("discrete", schedule, prediction, Call(schedule.steps, -1.0), config, plain)


def _flow(config: Mapping[str, Any]) -> SchedulerReading:
    if config.get("prediction_type", "flow_prediction") != "flow_prediction":
        _prediction(config, {"flow_prediction": "flow"})
    if config.get("invert_sigmas"):
        raise UserError("the scheduler's config has invert_sigmas=true, time from noise to data. Possible: false")
    steps = config["num_train_timesteps"]
    return _reading("flow", FlowMatching(), "flow", Call(float(steps)), config, {"num_train_timesteps": steps})


def _score(config: Mapping[str, Any]) -> SchedulerReading:
    low, high = config["sigma_min"], config["sigma_max"]
    plain = {"sigma_min": low, "sigma_max": high}
    return _reading("score", VE(2 * low, 2 * high), "eps", ScoreCall(0.5), config, plain)


def _edm(config: Mapping[str, Any]) -> SchedulerReading:
    sign = _prediction(config, {"epsilon": "1", "v_prediction": "-1"})  # the sign of c_out in diffusers
    return _reading("edm", _levels(config), "edm", Call(1.0, sign=float(sign)), config, _levels_plain(config))


def _consistency(config: Mapping[str, Any]) -> SchedulerReading:
    call = ConsistencyCall(1000.0, e=config["sigma_min"])
    return _reading("consistency", _levels(config), "edm", call, config, _levels_plain(config))


def _levels(config: Mapping[str, Any]) -> VE:
    if config["sigma_data"] != SIGMA_DATA:
        raise UserError(f"the scheduler's config has sigma_data={config['sigma_data']}. Possible: {SIGMA_DATA}")
    return VE(config["sigma_min"], config["sigma_max"])


def _levels_plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("sigma_min", "sigma_max", "sigma_data")}


def _prediction(config: Mapping[str, Any], possible: Mapping[str, str]) -> str:
    got = config.get("prediction_type", "epsilon")
    if got not in possible:
        raise unsupported("prediction_type", str(got), possible, " in the scheduler's config")
    return possible[got]


def _reading(
    family: str, schedule: NoiseSchedule, prediction: str, call: Call, config: Mapping[str, Any], plain: dict[str, Any]
) -> SchedulerReading:
    clip = _clip(config)
    plain = {"schedule": family, **plain, "prediction": prediction, "sign": call.sign, "clip": clip.plain()}
    return SchedulerReading(family, schedule, prediction, call, clip, plain)


def _clip(config: Mapping[str, Any]) -> Clip:
    """The clipping of data predictions. diffusers' thresholding with a largest value of 1 is clipping."""
    if config.get("thresholding"):
        largest = config["sample_max_value"]
        return Clip("static") if largest <= 1 else Clip("dynamic", config["dynamic_thresholding_ratio"], largest)
    if not (config.get("clip_sample") or config.get("clip_denoised")):
        return Clip()
    if config.get("clip_sample_range", 1.0) != 1:
        raise UserError(
            f"the scheduler's config clips data predictions to {config['clip_sample_range']}. Possible: 1, or "
            "clip_sample=false"
        )
    return Clip("static")


DISCRETE = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)

# The function that converts the full config of each scheduler class of diffusers.
SCHEDULERS: dict[str, Callable[[Mapping[str, Any]], SchedulerReading]] = {
    **dict.fromkeys(DISCRETE, _discrete),
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow,
    "ScoreSdeVeScheduler": _score,
    "EDMEulerScheduler": _edm,
    "EDMDPMSolverMultistepScheduler": _edm,
    "CMStochasticIterativeScheduler": _consistency,
}


def read_config(config: Mapping[str, Any]) -> SchedulerReading:
    """Convert a scheduler's config from its file; missing settings have diffusers' defaults.

    Raises UserError, which lists what is supported, for an unsupported scheduler, schedule or prediction.
    """
    name = str(config.get("_class_name"))
    if name not in SCHEDULERS:
        raise unsupported("scheduler", name, SCHEDULERS, " is read")
    config = _with_prediction_type(config)
    try:
        return SCHEDULERS[name](with_defaults(name, config))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the config of {name} cannot be read: {why}") from error


def _with_prediction_type(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`config` with `prediction_type` instead of the `predict_epsilon` of old versions."""
    old = config.get(OLD_PREDICTION)
    if old is None:
        return config
    meant = {True: "epsilon", False: "sample"}.get(old) if isinstance(old, bool) else None
    if meant is None or config.get("prediction_type", meant) != meant:
        given = json.dumps(config.get("prediction_type"), default=str)
        raise UserError(
            f"the scheduler's config has {OLD_PREDICTION}={quoted(json.dumps(old, default=str))} and "
            f"prediction_type={quoted(given)}. Possible: {OLD_PREDICTION}=true (epsilon) or false (sample), alone or "
            "with the same prediction_type"
        )
    return {**config, "prediction_type": meant}


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    import diffusers

    return dict(inspect.signature(getattr(diffusers, name)).parameters)


def with_defaults(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the defaults of diffusers' class `name` for missing settings."""
    parameters = _parameters(name).items()
    defaults = {key: parameter.default for key, parameter in parameters if parameter.default is not parameter.empty}
    return {**defaults, **config}


def unknown_keys(config: Mapping[str, Any], name: str) -> list[str]:
    """The keys of a config that diffusers' class `name` has no parameter for; they are ignored.

    diffusers passes configs from one scheduler class to another, so parameters of any scheduler are known.
    """
    known = {key for cls in (SCHEDULERS if name in SCHEDULERS else [name]) for key in _parameters(cls)}
    return sorted(key for key in config if key[:1] != "_" and key not in known and key not in OLD_KEYS)
