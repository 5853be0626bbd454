"""Pipeline families: prompts, the unconditional, and how the network is called."""

from __future__ import annotations

import pytest
import torch

from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families import StableDiffusion, StableDiffusionXL, family_of
from fastdiff.models.teacher import Teacher

PROMPTS = ["a red apple", "b"]


def test_sd_conditioning_is_the_pipelines(tiny_sd):
    teacher = Teacher(tiny_sd)
    assert isinstance(teacher.family, StableDiffusion)
    cond = teacher.encode(PROMPTS, 32)
    expected, negative = tiny_sd.encode_prompt(PROMPTS, "cpu", 1, True)
    assert torch.equal(cond.tensors["prompt_embeds"], expected)
    assert len(cond) == 2 and not torch.equal(expected[0], expected[1])
    null = teacher.null(32)
    assert len(null) == 1
    torch.testing.assert_close(null.tensors["prompt_embeds"], negative[:1])
    assert null.tensors["prompt_embeds"].abs().max() > 0
    assert not cond.tensors["prompt_embeds"].requires_grad


def test_sdxl_null_is_zeros_where_the_pipeline_says_so(tiny_sdxl):
    teacher = Teacher(tiny_sdxl)
    assert isinstance(teacher.family, StableDiffusionXL)
    cond, null = teacher.encode(PROMPTS, 32), teacher.null(32)
    embeds, _, pooled, _ = tiny_sdxl.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(cond.tensors["prompt_embeds"], embeds)
    assert torch.equal(cond.tensors["pooled_prompt_embeds"], pooled)
    assert null.tensors["prompt_embeds"].abs().max() == 0 and null.tensors["pooled_prompt_embeds"].abs().max() == 0
    assert null.tensors["prompt_embeds"].shape[1:] == embeds.shape[1:]

    tiny_sdxl.register_to_config(force_zeros_for_empty_prompt=False)
    empty = teacher.null(32)
    assert torch.equal(empty.tensors["prompt_embeds"], teacher.encode([""], 32).tensors["prompt_embeds"])
    assert empty.tensors["prompt_embeds"].abs().max() > 0


def test_sdxl_time_ids_are_those_of_an_uncropped_image(tiny_sdxl):
    teacher = Teacher(tiny_sdxl)
    for bundle in (teacher.encode(PROMPTS, 48), teacher.null(48)):
        assert bundle.tensors["time_ids"].tolist() == [[48, 48, 0, 0, 48, 48]] * len(bundle)
    projection = tiny_sdxl.text_encoder_2.config.projection_dim
    stock = tiny_sdxl._get_add_time_ids((48, 48), (0, 0), (48, 48), torch.float32, projection)
    assert teacher.null(48).tensors["time_ids"].tolist() == stock.tolist()


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_a_guided_ddim_step_is_the_stock_pipelines(name, request):
    """One step of the whole stock pipeline, from prompts to latents, equals our encode, call and guide."""
    from fastdiff.diffusion import guide

    pipeline = request.getfixturevalue(name)
    teacher = Teacher(pipeline)
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    stock = pipeline(
        PROMPTS, height=32, width=32, num_inference_steps=1, guidance_scale=4.0, latents=z, output_type="latent"
    ).images
    cond, null = teacher.encode(PROMPTS, 32), teacher.null(32)
    t = torch.full((2,), float(pipeline.scheduler.timesteps[0]))
    with torch.no_grad():
        a, b = (teacher.family.call(teacher.network, z, t, bundle) for bundle in (null.expand(2), cond))
        eps = guide(a, b, 4.0)
        ours = pipeline.scheduler.step(eps, int(t[0]), z).prev_sample
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_unserved_pipelines_are_refused_with_a_list():
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline"):
        family_of("FluxInpaintPipeline")


def test_conditioning_bundles():
    bundle = Conditioning({"a": torch.arange(6.0).view(3, 2), "labels": torch.tensor([1, 2, 3])})
    assert len(bundle) == 3 and bundle[1:].tensors["labels"].tolist() == [2, 3]
    both = Conditioning.cat([bundle, bundle[:1]])
    assert both.tensors["labels"].tolist() == [1, 2, 3, 1]
    cast = bundle.to(dtype=torch.bfloat16)
    assert (cast.tensors["a"].dtype, cast.tensors["labels"].dtype) == (torch.bfloat16, torch.int64)
    assert bundle[:1].expand(4).tensors["a"].shape == (4, 2)
    with pytest.raises(ValueError, match="3 rows"):
        bundle.expand(4)
    with pytest.raises(ValueError, match="batch size"):
        Conditioning({"a": torch.zeros(2), "b": torch.zeros(3)})
