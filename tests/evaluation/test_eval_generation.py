"""Seeds, caching, counting."""

from __future__ import annotations

import copy
from logging import Handler

import pytest
import torch
from diffusers import LCMScheduler

from fastdiff.evaluation.generation import generate, generate_routed, sample_seeds

PROMPTS = ["a red apple", "a cat", "a red apple", "a boat", "a cat"]


def images(pipeline, batch_size, steps=2, prompts=PROMPTS, **more):
    seeds = sample_seeds(3, "samples", len(prompts))
    return generate(pipeline, prompts, seeds, steps, batch_size=batch_size, progress=False, **more)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_batch_size_does_not_change_images(tiny_sd, scale):
    one, all_ = (images(tiny_sd, size, guidance_scale=scale).images.int() for size in (1, 5))
    assert (one - all_).abs().max() <= 1
    assert (one[0] - one[2]).abs().max() > 10  # the same prompt with another seed


def test_batch_size_does_not_change_images_of_a_stochastic_sampler(tiny_sd):
    tiny_sd.scheduler = LCMScheduler.from_config(tiny_sd.scheduler.config)
    two, four = (images(tiny_sd, size, steps=4).images.int() for size in (2, 5))
    assert (two - four).abs().max() <= 1


def test_equals_the_pipeline_called_by_hand(tiny_sd):
    seed = sample_seeds(3, "samples", 5)[1]
    generator = torch.Generator().manual_seed(seed)
    expected = tiny_sd(
        "a cat", num_inference_steps=3, guidance_scale=2.5, generator=generator, output_type="np"
    ).images
    found = images(tiny_sd, 5, steps=3, guidance_scale=2.5).images[1].permute(1, 2, 0)
    assert abs(found.double() / 255 - torch.from_numpy(expected[0])).max() < 1.01 / 255


def test_sdxl_guided_and_not(tiny_sdxl):
    for scale in (0.0, 4.0):
        generators = [torch.Generator().manual_seed(s) for s in sample_seeds(3, "samples", 2)]
        expected = tiny_sdxl(
            PROMPTS[:2], num_inference_steps=2, guidance_scale=scale, generator=generators, output_type="np"
        ).images
        found = images(tiny_sdxl, 2, prompts=PROMPTS[:2], guidance_scale=scale).images.permute(0, 2, 3, 1)
        assert abs(found.double() / 255 - torch.from_numpy(expected)).max() < 1.01 / 255


def test_routed_prompts_get_the_images_of_their_own_pipelines(tiny_sd):
    other = copy.copy(tiny_sd)
    other.unet = copy.deepcopy(tiny_sd.unet)
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(0.5)
    seeds = sample_seeds(3, "samples", len(PROMPTS))
    served_by = [other, tiny_sd, tiny_sd, other, tiny_sd]
    found = generate_routed(served_by, PROMPTS, seeds, 2, batch_size=1, progress=False)
    ours, theirs = (
        generate(pipeline, PROMPTS, seeds, 2, batch_size=1, progress=False).images for pipeline in (tiny_sd, other)
    )
    expected = torch.stack([(theirs if pipeline is other else ours)[n] for n, pipeline in enumerate(served_by)])
    assert found.images.equal(expected) and not ours.equal(theirs)
    assert found.network_calls == 2
    with pytest.raises(ValueError, match="5 prompts but 2 pipelines"):
        generate_routed(served_by[:2], PROMPTS, seeds, 2)


def test_network_calls_count_guidance_twice(tiny_sd):
    assert images(tiny_sd, 2, steps=3).network_calls == 3
    assert images(tiny_sd, 2, steps=3, guidance_scale=2.0).network_calls == 6
    assert not tiny_sd.unet._forward_pre_hooks


def test_each_prompt_is_encoded_once(tiny_sd):
    seen = []
    tiny_sd.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    images(tiny_sd, 2)
    assert sum(seen) == len(set(PROMPTS))


def test_long_captions_do_not_flood_the_terminal(tiny_sd):
    from diffusers.utils import logging

    original = logging.get_verbosity()
    logging.set_verbosity_warning()  # other tests of the same process may have lowered it
    seen, before = [], logging.get_verbosity()
    handler = Handler()
    handler.emit = seen.append
    logging.add_handler(handler)
    long = ["a very long caption of more than sixteen characters"] * 2
    images(tiny_sd, 2, prompts=long, steps=1)
    assert not seen and logging.get_verbosity() == before
    tiny_sd(long[0], num_inference_steps=1)
    logging.remove_handler(handler)
    logging.set_verbosity(original)
    assert "truncated" in seen[0].getMessage()  # diffusers itself does warn


def test_streams_and_seeds_do_not_meet():
    drawn = [
        s for seed in (0, 1) for stream in ("samples", "teacher reference") for s in sample_seeds(seed, stream, 500)
    ]
    assert len(set(drawn)) == len(drawn)
    assert sample_seeds(0, "samples", 3) == sample_seeds(0, "samples", 500)[:3]


def test_leaves_the_progress_bar_setting_alone(tiny_sd):
    tiny_sd.set_progress_bar_config(disable=False, leave=True)
    images(tiny_sd, 5, steps=1)
    assert tiny_sd._progress_bar_config == {"disable": False, "leave": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 1), "no prompts"),
        ((["a"], [1, 2], 1), "1 prompts but 2 seeds"),
        ((["a"], [1], 0), "num_inference_steps is 0"),
    ],
)
def test_bad_arguments(tiny_sd, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_sd, *arguments)


def test_non_finite_pixels_stop(tiny_sd):
    torch.nn.init.constant_(tiny_sd.vae.decoder.conv_out.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="prompts 0 to 1"):
        images(tiny_sd, 2, steps=1)
