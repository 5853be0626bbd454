"""The embedded flow teacher: it loads through the usual door, is the one that was measured, and knows its captions."""

from __future__ import annotations

import pytest
import torch

from fastdiff.diffusion.schedules import FlowSchedule
from fastdiff.models.teacher import Teacher

FINGERPRINT = "4457366e34f17495"
"""Changes with the weights, and with them every number in eval/results/embedded_flow_baselines.json."""


@pytest.fixture(scope="module")
def teacher():
    return Teacher.from_pretrained("embedded-flow")


def test_it_is_a_flow_on_the_other_teachers_parts(teacher):
    assert type(teacher.pipeline).__name__ == "StableDiffusion3Pipeline"
    assert teacher.prediction_type == "flow" and isinstance(teacher.schedule, FlowSchedule)
    assert teacher.latent_shape(32) == (8, 8, 8) and teacher.default_resolution == 32
    other = Teacher.from_pretrained("embedded").pipeline
    ids = torch.arange(24)[None]
    states = teacher.pipeline.text_encoder(ids)
    assert torch.equal(states.last_hidden_state, other.text_encoder(ids).last_hidden_state)
    assert torch.equal(states.text_embeds, other.text_encoder(ids).pooler_output)


def test_its_weights_are_the_measured_ones(teacher):
    assert teacher.identity() == {"source": "embedded-flow", "revision": None, "fingerprint": FINGERPRINT}


def test_its_pictures_have_the_captions_colours(teacher):
    prompts = ["red heart", "blue circle"] * 4
    made = teacher.pipeline(
        prompts,
        num_inference_steps=8,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    warmth = (made.images[:, 0] - made.images[:, 2]).mean(dim=(1, 2))
    assert made.images.shape == (8, 3, 32, 32) and warmth[0::2].min() > warmth[1::2].max()
