"""Which networks a run has, and what it refuses before it makes them."""

from __future__ import annotations

import pytest
from engine_helpers import PROMPTS, Latents

from fastdiff.engine import Settings, Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods import APEX, CTM, APEXConfig, CTMConfig, FreeFlow, FreeFlowConfig, Progressive, ProgressiveConfig
from fastdiff.models.teacher import Teacher


def settings(**changes) -> Settings:
    return Settings(**{"train_batch_size": 2, "report_to": "none", "student": "full"} | changes)


@pytest.mark.parametrize(
    ("method", "still"),
    [
        (CTM(CTMConfig(target_decay=0.9)), "target"),
        (Progressive(ProgressiveConfig(num_inference_steps=4, stage_teacher="previous")), "previous"),
    ],
    ids=["average", "earlier student"],
)
def test_networks_that_no_optimizer_moves_need_no_gradients_of_weights(tiny_sd, method, still):
    roles = build_networks(method, Teacher(tiny_sd), settings()).roles
    assert not any(weight.requires_grad for weight in roles.network(still).parameters())
    assert all(weight.requires_grad for weight in roles.network("student").parameters())


@pytest.mark.parametrize("method", [APEX(APEXConfig()), FreeFlow(FreeFlowConfig())], ids=lambda one: one.info.name)
def test_too_small_a_batch_is_named_before_anything_is_made(tiny_sd, tmp_path, method):
    run = settings(output_dir=str(tmp_path / "run"), train_batch_size=3)
    with pytest.raises(ValueError, match=r"needs micro-batches of 4 samples or more.*train_batch_size 3"):
        Trainer(method, Teacher(tiny_sd), Latents(PROMPTS), run)
    assert not (tmp_path / "run").exists()
