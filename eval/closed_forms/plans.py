"""How each method trains in a world: its own config unguided, in stages where it has them, with a few family defaults.

Tuned lightly, on seed 0. What a method needs and a world lacks is said instead of a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One run: a method, what its config and the run's settings have that is not the default."""

    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """Batch, steps and learning rates of a world."""

    batch: int
    score_steps: int
    path_steps: int
    score_rate: float
    path_rate: float


EFFORTS = {
    "gaussian": Effort(256, 120, 200, 1e-3, 2e-3),
    "mixture": Effort(256, 200, 300, 1e-3, 2e-3),
    "kernel": Effort(128, 80, 120, 3e-4, 1e-3),
}

START = 749  # of one-step students of scores: as undistilled as possible and still told everything by its noise
FOUR = (999, 749, 499, 249)
PHASED = {"guidance_scale": 1.0, "student_update_every": 2}
ONE = {"guidance_scale": 1.0, "timesteps": (START,)}
SCORES = {  # methods whose student is trained by scores of its own samples
    "dmd2": ONE | {"student_update_every": 2},
    "decoupled_dmd": ONE | {"student_update_every": 2},
    "f_distill": ONE | {"student_update_every": 2, "update_rule": "every", "time_bins": 0},
    "dmd": ONE | {"regression_loss": "latent_l2"},
    "diff_instruct": ONE,
    "swiftbrush": ONE,
    "pg_sb": {"guidance_range": (0.5, 2.0), "timesteps": (START,)},
    "score_distillation": ONE | {"score_loss": "vsd"},
    "sid": ONE | {"alpha": 1.0, "loss_scale": 1.0},
    "sida": ONE,
    "sid_lsg": ONE,
    "sim": ONE,
    "uni_instruct": ONE,
    "ladd": {"timesteps": (START,), "update_rule": "every", "student_update_every": 2, "noise_mean": 0.0},
    "flash_dmd": {
        "guidance_scale": 1.0,
        "timesteps": FOUR,
        "gan_weight": 0.0,
        "high_noise_steps": 4,
        "student_update_every": 2,
    },  # its GAN judges pictures
}
# Few and long solver steps and no average of the target: runs are too short for the papers' to reach the noisy end.
SHORT = {"guidance_scale": 1.0, "num_ddim_timesteps": 20, "target_decay": 0.0}
# Continuous times wide enough that the noisy end, where sampling starts, is trained at all.
WIDE = {"guidance_scale": 1.0, "time_mean": 0.0, "time_std": 1.6}
PATHS = {  # methods that follow the teacher's trajectory
    "lcm": SHORT | {"num_inference_steps": 1},
    "ctm": SHORT | {"num_inference_steps": 1},
    "tcd": SHORT | {"num_inference_steps": 4},
    "pcm": SHORT,
    "scott": SHORT | {"num_inference_steps": 1},
    "kd": {"start_timestep": START},
    "rfpp": {"start_timestep": START, "perceptual_weight": 0.0},
    # Velocities jump at a window's edge, where sampling reads them; the networks' few time features smooth that jump.
    "perflow": {"guidance_scale": 1.0, "windows": 2, "solver_steps": 16, "prompt_dropout": 0.0},
    "meanflow": WIDE | {"timesteps": (START,), "instant_share": 0.25, "clean_share": 0.25, "norm_constant": 1e-2},
    "boot": {"guidance_scale": 1.0, "num_ddim_timesteps": 25},
    "freeflow": {"guidance_scale": 1.0, "norm_constant": 1e-2},
    "guidance_distillation": {"guidance_scale": 1.0, "num_inference_steps": 25},
    "score_matching": {},
}

GENTLE = {  # factors of the world's learning rate and steps, for methods that its own throw off course
    "flash_dmd": (0.2, 3.0),
    "ladd": (0.2, 3.0),
    "lcm": (0.2, 4.0),
    "tcd": (0.2, 4.0),
    "scott": (0.2, 3.0),
    "pcm": (0.2, 3.0),
    "ctm": (0.3, 2.0),
    "meanflow": (0.2, 2.0),
    "freeflow": (0.1, 2.0),
}


def plan(method: str, world: str, longer: int = 1) -> list[Stage] | str:
    """The stages of a method in a world, or why it has none; `longer` multiplies their steps."""
    effort = EFFORTS[world]
    effort = replace(effort, score_steps=longer * effort.score_steps, path_steps=longer * effort.path_steps)
    if method in _STAGED:
        return _STAGED[method](effort, world)
    rate, share = GENTLE.get(method, (1.0, 1.0))
    if method in SCORES:
        return [score_stage(method, SCORES[method], effort, share, learning_rate=rate * effort.score_rate)]
    return [path_stage(method, PATHS[method], effort, share, learning_rate=rate * effort.path_rate)]


def score_stage(method: str, config: Mapping[str, Any], effort: Effort, share: float = 1.0, **settings: Any) -> Stage:
    """A stage trained by scores, for a share of the world's steps."""
    own = {
        "max_train_steps": round(share * effort.score_steps),
        "train_batch_size": effort.batch,
        "learning_rate": effort.score_rate,
        "adam_beta1": 0.0,
        "ema_decay": 0.98,
    }
    return Stage(method, config, own | settings)


def path_stage(method: str, config: Mapping[str, Any], effort: Effort, share: float = 1.0, **settings: Any) -> Stage:
    """A stage on trajectories or pairs, for a share of the world's steps."""
    own = {
        "max_train_steps": round(share * effort.path_steps),
        "train_batch_size": effort.batch,
        "learning_rate": effort.path_rate,
        "ema_decay": 0.98,
    }
    return Stage(method, config, own | settings)


def _progressive(effort: Effort, world: str) -> list[Stage]:
    first = {"num_inference_steps": 8, "teacher_steps": 4}
    later = [{"num_inference_steps": count, "stage_teacher": "previous"} for count in (4, 2, 1)]
    return [path_stage("progressive", config, effort, 0.4) for config in (first, *later)]


def _tscd(effort: Effort, world: str) -> list[Stage]:
    unguided = SHORT | {"num_ddim_timesteps": 40, "discriminator_learning_rate": 1e-4}
    segments = [
        unguided | {"num_segments": count, "num_inference_steps": count, "adversarial_weight": 0.1}
        for count in (8, 4, 2, 1)
    ]
    last = unguided | {"num_segments": 1, "num_inference_steps": 1, "adversarial_weight": 0.0}
    last |= {"score_weight": 1.0, "score_guidance_scale": 1.0}
    return [
        *(path_stage("tscd", config, effort, 0.4) for config in segments),
        score_stage("tscd", last, effort),
    ]


def _lightning(effort: Effort, world: str) -> list[Stage]:
    common = {"num_inference_steps": 4, "teacher_steps": 2}
    squares = {"objective": "mse", "num_inference_steps": 8, "teacher_steps": 4}
    first, then = ({"learning_rate": effort.path_rate * factor} for factor in (0.3, 0.03))
    return [
        path_stage("lightning", squares, effort, **first),
        path_stage(
            "lightning", common | {"objective": "conditional", "stage_teacher": "previous"}, effort, 0.4, **then
        ),
        path_stage("lightning", common | {"objective": "unconditional", "stage_teacher": "kept"}, effort, 0.2, **then),
    ]


def _apex(effort: Effort, world: str) -> list[Stage]:
    # Its own samples are its adversary, and momentum makes that play swing.
    gentle = {"learning_rate": effort.path_rate / 5, "adam_beta1": 0.0}
    return [path_stage("apex", {"guidance_strength": 0.0}, effort, 2.0, **gentle)]


def _instaflow(effort: Effort, world: str) -> list[Stage]:
    start = {"start_timestep": START}
    return [
        path_stage("rectified_flow", start, effort, 0.6),
        path_stage("rectified_flow", start | {"objective": "distill"}, effort, 0.6),
    ]


def _slimflow(effort: Effort, world: str) -> list[Stage]:
    common = {"start_timestep": START, "flip_pairs": False}
    reflow = common | {"anneal_steps": round(0.3 * effort.path_steps)}
    return [
        path_stage("slimflow", reflow, effort, 0.6),
        path_stage("slimflow", common | {"objective": "distill"}, effort, 0.4),
    ]


def _scm(effort: Effort, world: str) -> list[Stage]:
    config = WIDE | {"timesteps": (START,), "tangent_warmup": round(0.4 * effort.path_steps)}
    return [path_stage("scm", config, effort, 3.0, learning_rate=effort.path_rate / 30, adam_beta2=0.99)]


def _rcm(effort: Effort, world: str) -> list[Stage]:
    updates = {"timesteps": FOUR, "update_rule": "every", "student_update_every": 2}
    config = WIDE | updates | {"tangent_warmup": round(0.5 * effort.score_steps)}
    return [score_stage("rcm", config, effort, 2.0, learning_rate=0.3 * effort.score_rate)]


def _tcm(effort: Effort, world: str) -> list[Stage]:
    return [
        path_stage("lcm", PATHS["lcm"], effort, 3.0, learning_rate=effort.path_rate / 5),
        path_stage("tcm", {"step_stage": 2}, effort, 3.0, learning_rate=effort.path_rate / 15),
    ]


def _disback(effort: Effort, world: str) -> list[Stage]:
    degradation, nodes = round(effort.score_steps / 6), 4
    interval = round(effort.score_steps / 8)
    path = {"degradation_steps": degradation, "path_nodes": nodes, "backtracking_interval": interval}
    return [score_stage("disback", SCORES["dmd2"] | path, effort, 7 / 6)]


def _phased(effort: Effort, world: str) -> list[Stage]:
    return [score_stage("phased_dmd", PHASED | {"phase": phase}, effort, 0.5) for phase in (1, 2)]


def _msd(effort: Effort, world: str) -> list[Stage] | str:
    if world == "gaussian":
        return "one caption cannot be split between students"
    return [score_stage("msd", SCORES["dmd2"] | {"students": 2, "student_number": k}, effort, 0.5) for k in (0, 1)]


_STAGED = {
    "progressive": _progressive,
    "tscd": _tscd,
    "lightning": _lightning,
    "rectified_flow": _instaflow,
    "slimflow": _slimflow,
    "scm": _scm,
    "rcm": _rcm,
    "apex": _apex,
    "tcm": _tcm,
    "disback": _disback,
    "phased_dmd": _phased,
    "msd": _msd,
}
