"""A tiny run: two-time-scale method, image data, a step in tens of milliseconds."""

from __future__ import annotations

import copy

import pytest
from engine_helpers import PROMPTS, Latents

from fastdiff.engine import Settings, Trainer
from fastdiff.methods import DMD2, LCM, DMD2Config, LCMConfig
from fastdiff.models.teacher import Teacher


@pytest.fixture
def make_trainer(_sd_original, tmp_path):
    """Builds a trainer on a fresh copy of the tiny teacher; keyword arguments are settings or `method_config`."""

    def make(method="dmd2", method_config=None, hooks=None, **settings):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_train_steps": 4,
            "train_batch_size": 2,
            "lora_rank": 4,
            "learning_rate": 1e-3,
            "log_every": 1,
            "report_to": "none",
            "checkpointing_steps": 1000,
            "validation_steps": 1000,
        }
        if method == "dmd2":
            config = {"student_update_every": 2, "timesteps": (999, 499), "gan_weight": 1e-3}
            instance = DMD2(DMD2Config(**(config | (method_config or {}))))
        else:
            instance = LCM(LCMConfig(**(method_config or {})))
        teacher = Teacher(copy.deepcopy(_sd_original), "tiny")
        return Trainer(instance, teacher, Latents(PROMPTS), Settings(**(defaults | settings)), **(hooks or {}))

    return make
