"""A teacher as the options want it, whether it was loaded here or given."""

from __future__ import annotations

import pytest
import torch

from fastdiff.models.teacher import Teacher
from fastdiff.recipes import RecipeError
from fastdiff.recipes.opening import prepare
from fastdiff.recipes.options import TeacherOptions


def test_a_given_teacher_is_cast_moved_and_offloaded_like_a_loaded_one(tiny_sd, monkeypatch):
    moved = []
    monkeypatch.setattr(Teacher, "to", lambda self, device: moved.append((device, self.network.dtype)) or self)
    options = TeacherOptions(cast_teacher_unet=True, offload_encoders=True)
    teacher = prepare(Teacher(tiny_sd), options, "cuda", "bf16")
    assert moved == [("cuda", torch.bfloat16)]  # cast before it is moved
    assert teacher._home == torch.device("cpu")


def test_a_network_in_float16_is_refused(tiny_sd):
    tiny_sd.unet.half()
    with pytest.raises(RecipeError, match=r"float16.*mixed_precision bf16"):
        prepare(Teacher(tiny_sd), TeacherOptions(), "cpu")


def test_encoders_that_rest_stay_where_they_are(tiny_sd):
    teacher = Teacher(tiny_sd)
    teacher.offload_encoders()
    parts = {"unet": [], "vae": [], "text_encoder": []}
    for name, seen in parts.items():
        getattr(tiny_sd, name).to = seen.append
    teacher.to("meta")
    assert [len(seen) for seen in parts.values()] == [1, 0, 0]


def test_a_scheduler_that_does_not_count_a_thousand_times_is_refused(tiny_sd):
    from diffusers import DDIMScheduler

    tiny_sd.scheduler = DDIMScheduler.from_config(tiny_sd.scheduler.config, num_train_timesteps=400)
    with pytest.raises(RecipeError, match=r"400 training timesteps.*1000"):
        prepare(Teacher(tiny_sd), TeacherOptions(), "cpu")
