"""The mathematics of diffusion models: noise schedules, denoisers, samplers, conditioning, losses, closed forms.

It may import `records`, `metering` and below.

The names in ``__all__`` are public: the plugin contract covers them. They load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distillbench._lazy import load

if TYPE_CHECKING:
    from distillbench.diffusion.conditioning import UNCONDITIONAL as UNCONDITIONAL
    from distillbench.diffusion.conditioning import WITHOUT_CLASSES as WITHOUT_CLASSES
    from distillbench.diffusion.consistency import STEP_WEIGHTS as STEP_WEIGHTS
    from distillbench.diffusion.consistency import ConsistencyFunction as ConsistencyFunction
    from distillbench.diffusion.consistency import multistep as multistep
    from distillbench.diffusion.consistency import segment_edges as segment_edges
    from distillbench.diffusion.consistency import segment_start as segment_start
    from distillbench.diffusion.consistency import segmentwise as segmentwise
    from distillbench.diffusion.consistency_times import CURRICULA as CURRICULA
    from distillbench.diffusion.consistency_times import GRID_LEVELS as GRID_LEVELS
    from distillbench.diffusion.consistency_times import continuous_pair as continuous_pair
    from distillbench.diffusion.consistency_times import inverse_length as inverse_length
    from distillbench.diffusion.denoiser import INPUTS as INPUTS
    from distillbench.diffusion.denoiser import PREDICTIONS as PREDICTIONS
    from distillbench.diffusion.denoiser import SIGMA_DATA as SIGMA_DATA
    from distillbench.diffusion.denoiser import TARGETS as TARGETS
    from distillbench.diffusion.denoiser import guided as guided
    from distillbench.diffusion.denoiser import implied_eps as implied_eps
    from distillbench.diffusion.derivatives import derivative as derivative
    from distillbench.diffusion.derivatives import tangent as tangent
    from distillbench.diffusion.distances import DISTANCE_NAMES as DISTANCE_NAMES
    from distillbench.diffusion.distances import DISTANCES as DISTANCES
    from distillbench.diffusion.distances import pseudo_huber as pseudo_huber
    from distillbench.diffusion.distributions import Distribution as Distribution
    from distillbench.diffusion.distributions import Gaussian as Gaussian
    from distillbench.diffusion.distributions import GaussianMixture as GaussianMixture
    from distillbench.diffusion.distributions import mixture as mixture
    from distillbench.diffusion.dropout import one_mask as one_mask
    from distillbench.diffusion.exact_denoiser import ExactDenoiser as ExactDenoiser
    from distillbench.diffusion.loss_balance import gradient_ratio as gradient_ratio
    from distillbench.diffusion.loss_balance import with_gradient_of as with_gradient_of
    from distillbench.diffusion.losses import SNR_WEIGHTS as SNR_WEIGHTS
    from distillbench.diffusion.losses import denoising_loss as denoising_loss
    from distillbench.diffusion.losses import denoising_weight as denoising_weight
    from distillbench.diffusion.losses import mean_square as mean_square
    from distillbench.diffusion.rollouts import chain_times as chain_times
    from distillbench.diffusion.rollouts import rollout as rollout
    from distillbench.diffusion.samplers import ONE_STEP as ONE_STEP
    from distillbench.diffusion.samplers import SAMPLERS as SAMPLERS
    from distillbench.diffusion.samplers import TIME_GRIDS as TIME_GRIDS
    from distillbench.diffusion.samplers import Sampler as Sampler
    from distillbench.diffusion.samplers import Solver as Solver
    from distillbench.diffusion.samplers import ancestral as ancestral
    from distillbench.diffusion.samplers import ancestral_step as ancestral_step
    from distillbench.diffusion.samplers import check_heun as check_heun
    from distillbench.diffusion.samplers import ddim as ddim
    from distillbench.diffusion.samplers import ddim_ode_step as ddim_ode_step
    from distillbench.diffusion.samplers import ddim_step as ddim_step
    from distillbench.diffusion.samplers import dpmpp_2m as dpmpp_2m
    from distillbench.diffusion.samplers import heun as heun
    from distillbench.diffusion.samplers import heun_step as heun_step
    from distillbench.diffusion.samplers import karras_times as karras_times
    from distillbench.diffusion.samplers import renoise as renoise
    from distillbench.diffusion.samplers import time_like as time_like
    from distillbench.diffusion.samplers import uniform_lambda_times as uniform_lambda_times
    from distillbench.diffusion.samplers import uniform_times as uniform_times
    from distillbench.diffusion.samplers import whole_grid as whole_grid
    from distillbench.diffusion.samplers import x_at_t_max as x_at_t_max
    from distillbench.diffusion.samplers import x_at_top as x_at_top
    from distillbench.diffusion.schedules import SCHEDULES as SCHEDULES
    from distillbench.diffusion.schedules import VE as VE
    from distillbench.diffusion.schedules import DiscreteBetas as DiscreteBetas
    from distillbench.diffusion.schedules import FlowMatching as FlowMatching
    from distillbench.diffusion.schedules import NoiseSchedule as NoiseSchedule
    from distillbench.diffusion.schedules import VPCosine as VPCosine
    from distillbench.diffusion.schedules import VPLinear as VPLinear
    from distillbench.diffusion.training_times import karras_time as karras_time
    from distillbench.diffusion.training_times import lognormal_time as lognormal_time
    from distillbench.diffusion.two_times import gamma_sampling as gamma_sampling

__all__ = [
    "CURRICULA",
    "DISTANCES",
    "DISTANCE_NAMES",
    "GRID_LEVELS",
    "INPUTS",
    "ONE_STEP",
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SIGMA_DATA",
    "SNR_WEIGHTS",
    "STEP_WEIGHTS",
    "TARGETS",
    "TIME_GRIDS",
    "UNCONDITIONAL",
    "VE",
    "WITHOUT_CLASSES",
    "ConsistencyFunction",
    "DiscreteBetas",
    "Distribution",
    "ExactDenoiser",
    "FlowMatching",
    "Gaussian",
    "GaussianMixture",
    "NoiseSchedule",
    "Sampler",
    "Solver",
    "VPCosine",
    "VPLinear",
    "ancestral",
    "ancestral_step",
    "chain_times",
    "check_heun",
    "continuous_pair",
    "ddim",
    "ddim_ode_step",
    "ddim_step",
    "denoising_loss",
    "denoising_weight",
    "derivative",
    "dpmpp_2m",
    "gamma_sampling",
    "gradient_ratio",
    "guided",
    "heun",
    "heun_step",
    "implied_eps",
    "inverse_length",
    "karras_time",
    "karras_times",
    "lognormal_time",
    "mean_square",
    "mixture",
    "multistep",
    "one_mask",
    "pseudo_huber",
    "renoise",
    "rollout",
    "segment_edges",
    "segment_start",
    "segmentwise",
    "tangent",
    "time_like",
    "uniform_lambda_times",
    "uniform_times",
    "whole_grid",
    "with_gradient_of",
    "x_at_t_max",
    "x_at_top",
]

_HOMES = {
    "CURRICULA": "distillbench.diffusion.consistency_times",
    "DISTANCES": "distillbench.diffusion.distances",
    "DISTANCE_NAMES": "distillbench.diffusion.distances",
    "GRID_LEVELS": "distillbench.diffusion.consistency_times",
    "INPUTS": "distillbench.diffusion.denoiser",
    "ONE_STEP": "distillbench.diffusion.samplers",
    "PREDICTIONS": "distillbench.diffusion.denoiser",
    "SAMPLERS": "distillbench.diffusion.samplers",
    "SCHEDULES": "distillbench.diffusion.schedules",
    "SIGMA_DATA": "distillbench.diffusion.denoiser",
    "SNR_WEIGHTS": "distillbench.diffusion.losses",
    "STEP_WEIGHTS": "distillbench.diffusion.consistency",
    "TARGETS": "distillbench.diffusion.denoiser",
    "TIME_GRIDS": "distillbench.diffusion.samplers",
    "UNCONDITIONAL": "distillbench.diffusion.conditioning",
    "VE": "distillbench.diffusion.schedules",
    "WITHOUT_CLASSES": "distillbench.diffusion.conditioning",
    "ConsistencyFunction": "distillbench.diffusion.consistency",
    "DiscreteBetas": "distillbench.diffusion.schedules",
    "ExactDenoiser": "distillbench.diffusion.exact_denoiser",
    "FlowMatching": "distillbench.diffusion.schedules",
    "Gaussian": "distillbench.diffusion.distributions",
    "GaussianMixture": "distillbench.diffusion.distributions",
    "Distribution": "distillbench.diffusion.distributions",
    "NoiseSchedule": "distillbench.diffusion.schedules",
    "Sampler": "distillbench.diffusion.samplers",
    "Solver": "distillbench.diffusion.samplers",
    "VPCosine": "distillbench.diffusion.schedules",
    "VPLinear": "distillbench.diffusion.schedules",
    "ancestral": "distillbench.diffusion.samplers",
    "ancestral_step": "distillbench.diffusion.samplers",
    "chain_times": "distillbench.diffusion.rollouts",
    "check_heun": "distillbench.diffusion.samplers",
    "continuous_pair": "distillbench.diffusion.consistency_times",
    "ddim": "distillbench.diffusion.samplers",
    "ddim_ode_step": "distillbench.diffusion.samplers",
    "ddim_step": "distillbench.diffusion.samplers",
    "denoising_loss": "distillbench.diffusion.losses",
    "denoising_weight": "distillbench.diffusion.losses",
    "derivative": "distillbench.diffusion.derivatives",
    "dpmpp_2m": "distillbench.diffusion.samplers",
    "gamma_sampling": "distillbench.diffusion.two_times",
    "gradient_ratio": "distillbench.diffusion.loss_balance",
    "guided": "distillbench.diffusion.denoiser",
    "heun": "distillbench.diffusion.samplers",
    "heun_step": "distillbench.diffusion.samplers",
    "implied_eps": "distillbench.diffusion.denoiser",
    "inverse_length": "distillbench.diffusion.consistency_times",
    "karras_time": "distillbench.diffusion.training_times",
    "karras_times": "distillbench.diffusion.samplers",
    "lognormal_time": "distillbench.diffusion.training_times",
    "mean_square": "distillbench.diffusion.losses",
    "mixture": "distillbench.diffusion.distributions",
    "multistep": "distillbench.diffusion.consistency",
    "one_mask": "distillbench.diffusion.dropout",
    "pseudo_huber": "distillbench.diffusion.distances",
    "renoise": "distillbench.diffusion.samplers",
    "rollout": "distillbench.diffusion.rollouts",
    "segment_edges": "distillbench.diffusion.consistency",
    "segment_start": "distillbench.diffusion.consistency",
    "segmentwise": "distillbench.diffusion.consistency",
    "tangent": "distillbench.diffusion.derivatives",
    "time_like": "distillbench.diffusion.samplers",
    "uniform_lambda_times": "distillbench.diffusion.samplers",
    "uniform_times": "distillbench.diffusion.samplers",
    "whole_grid": "distillbench.diffusion.samplers",
    "with_gradient_of": "distillbench.diffusion.loss_balance",
    "x_at_t_max": "distillbench.diffusion.samplers",
    "x_at_top": "distillbench.diffusion.samplers",
}


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES, name)
