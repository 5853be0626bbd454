"""Diffusion mathematics on plain tensors: no networks, no files, no devices."""

from .gaussian import Gaussian
from .grids import lcm_grid, trailing_grid
from .kernel import NULL_LABEL, KernelTeacher
from .losses import (
    discriminator_hinge,
    discriminator_softplus,
    dmd_normaliser,
    generator_hinge,
    generator_margin,
    generator_softplus,
    mse,
    pseudo_huber,
    surrogate,
)
from .mixture import GaussianMixture
from .prediction import Prediction, PredictionKind, guide, prediction_target
from .randomness import InjectedRandomness, Randomness
from .schedules import (
    CLEAN_INDEX,
    EDMSchedule,
    FlowSchedule,
    NoiseSchedule,
    Terminal,
    TrigSchedule,
    VPSchedule,
    rewrap,
    schedule_from_config,
)
from .solvers import Solver, invert, solve, teacher_times
from .steps import ddim_eta, er_sde, euler, heun, heun_flow, jump, pf_velocity, renoise
from .tensors import as_times, broadcast_to, compute_dtype
from .timesteps import (
    Grid,
    Karras,
    LogitNormal,
    Pairs,
    Segments,
    Shifted,
    TimeSampler,
    Uniform,
    UniformIndex,
    UShaped,
)

__all__ = [
    "CLEAN_INDEX",
    "NULL_LABEL",
    "EDMSchedule",
    "FlowSchedule",
    "Gaussian",
    "GaussianMixture",
    "Grid",
    "InjectedRandomness",
    "Karras",
    "KernelTeacher",
    "LogitNormal",
    "NoiseSchedule",
    "Pairs",
    "Prediction",
    "PredictionKind",
    "Randomness",
    "Segments",
    "Shifted",
    "Solver",
    "Terminal",
    "TimeSampler",
    "TrigSchedule",
    "UShaped",
    "Uniform",
    "UniformIndex",
    "VPSchedule",
    "as_times",
    "broadcast_to",
    "compute_dtype",
    "ddim_eta",
    "discriminator_hinge",
    "discriminator_softplus",
    "dmd_normaliser",
    "er_sde",
    "euler",
    "generator_hinge",
    "generator_margin",
    "generator_softplus",
    "guide",
    "heun",
    "heun_flow",
    "invert",
    "jump",
    "lcm_grid",
    "mse",
    "pf_velocity",
    "prediction_target",
    "pseudo_huber",
    "renoise",
    "rewrap",
    "schedule_from_config",
    "solve",
    "surrogate",
    "teacher_times",
    "trailing_grid",
]
