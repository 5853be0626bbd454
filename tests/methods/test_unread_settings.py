"""Settings that another setting leaves without effect are refused by name, in methods of scores and adversaries."""

from __future__ import annotations

import pytest

from fastdiff.methods import (
    DMD2Config,
    SiDAConfig,
    SiDConfig,
    SIMConfig,
    UniInstructConfig,
)
from fastdiff.methods.decoupled_dmd import DecoupledDMDConfig
from fastdiff.methods.diff_instruct import DiffInstructConfig
from fastdiff.methods.disback import DisBackConfig
from fastdiff.methods.flash_dmd import FlashDMDConfig
from fastdiff.methods.ladd import LADDConfig
from fastdiff.methods.phased_dmd import PhasedDMDConfig
from fastdiff.methods.score_distillation import ScoreDistillationConfig

MATCHED = {"gan_weight": 0.0, "high_noise_steps": 4}
ALONE = {"matching_weight": 0.0, "student_update_every": 1}


@pytest.mark.parametrize(
    ("config", "values", "unread"),
    [
        (DMD2Config, {}, {"gan_discriminator_weight": 1.0, "gan_loss": "hinge", "gan_features": "teacher"}),
        (DMD2Config, {}, {"gan_blocks": "all", "gan_r1_weight": 1.0}),
        (DMD2Config, {"timesteps": (399,)}, {"multi_step_input": "noised_data"}),
        (FlashDMDConfig, MATCHED, {"gan_loss": "hinge", "gan_r1_weight": 1.0, "discriminator_learning_rate": 1e-5}),
        (FlashDMDConfig, {"high_noise_steps": 1}, {"multi_step_input": "noised_data"}),
        (PhasedDMDConfig, {"gan_weight": 0.1}, {"ratio_min": 0.5, "ratio_max": 2.0, "time_bins": 4}),
        (PhasedDMDConfig, {"gan_weight": 0.1, "divergence": "js"}, {"power": 0.3, "time_bins_decay": 0.9}),
        (UniInstructConfig, {}, {"power": 0.3}),
        (
            UniInstructConfig,
            {"divergence": "rkl", "gan_weight": 0.0},
            {"gan_discriminator_weight": 0.5, "gan_head": "channel_mean"},
        ),
        (SiDConfig, {"guidance_scale": 2.0}, {"gan_discriminator_weight": 0.5, "gan_head": "trained"}),
        (SiDConfig, {"guidance_scale": 1.0}, {"guided": "teacher"}),
        (SiDConfig, {"guidance_scale": 1.0}, {"prompt_dropout": 0.2}),
        (SiDConfig, {"guidance_scale": 2.0, "guided": "teacher"}, {"prompt_dropout": 0.2}),
        (SiDAConfig, {}, {"huber_c": 0.1}),
        (SIMConfig, {"distance": "l1"}, {"huber_c": 0.1}),
        (DiffInstructConfig, {}, {"noise_mean": 0.0, "noise_std": 1.0}),
        (DiffInstructConfig, {"noise_law": "log_normal"}, {"min_timestep": 100, "max_timestep": 900}),
        (LADDConfig, {"noise_law": "uniform"}, {"noise_mean": 0.0, "noise_std": 2.0}),
        (DecoupledDMDConfig, {"guidance_scale": 1.0}, {"augmentation_times": "all"}),
        (DecoupledDMDConfig, {"moments_weight": 0.0}, {"moments_mean": 0.0, "moments_variance": 1.0}),
        (DecoupledDMDConfig, ALONE, {"matching_times": "below_input"}),
        (DecoupledDMDConfig, ALONE, {"fake_score_learning_rate": 1e-5}),
        (ScoreDistillationConfig, {"score_loss": "sds"}, {"fake_score_learning_rate": 1e-5, "bsd_ratio": 2.0}),
        (
            ScoreDistillationConfig,
            {"score_loss": "csd"},
            {"guidance_scale": 3.0, "fake_score_learning_rate": 1e-5, "bsd_ratio": 2.0},
        ),
        (ScoreDistillationConfig, {"score_loss": "vsd"}, {"bsd_ratio": 2.0}),
        (
            ScoreDistillationConfig,
            {"score_loss": "bsd"},
            {"guidance_scale": 3.0, "fake_score_learning_rate": 1e-5},
        ),
        (DisBackConfig, {"path_nodes": 1}, {"backtracking_interval": 10}),
        (DisBackConfig, {"path_nodes": 0}, {"degradation_steps": 10, "backtracking_interval": 10}),
    ],
)
def test_settings_without_effect_are_refused(config, values, unread):
    config(**values)
    for name, value in unread.items():
        with pytest.raises(ValueError, match=f"^{name} has no effect"):
            config(**values, **{name: value})


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (DMD2Config, {"gan_weight": 0.1, "gan_loss": "hinge", "gan_features": "teacher", "gan_r1_weight": 1.0}),
        (FlashDMDConfig, {"high_noise_steps": 2, "multi_step_input": "noised_data"}),
        (SiDConfig, {"guidance_scale": 2.0, "prompt_dropout": 0.2}),
        (SIMConfig, {"huber_c": 0.1}),
        (UniInstructConfig, {"gan_weight": 0.0, "gan_head": "channel_mean", "gan_discriminator_weight": 0.5}),
        (DisBackConfig, {"path_nodes": 1, "degradation_steps": 10}),
        # Its last step has no cleaner times, which no term asks for.
        (DecoupledDMDConfig, {"guidance_scale": 1.0, "timesteps": (999, 20)}),
        (DecoupledDMDConfig, {"augmentation_times": "all", "timesteps": (999, 20)}),
    ],
)
def test_settings_with_an_effect_are_taken(config, values):
    config(**values)


def test_no_index_lies_beyond_the_schedules():
    DMD2Config(max_timestep=999)
    with pytest.raises(ValueError, match="nor above 999"):
        DMD2Config(max_timestep=1000)
