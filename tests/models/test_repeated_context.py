"""Equal rows of context computed once: the stock network's outputs, gradients and pictures."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_transformers import build

from fastdiff.models.repeated_context import merge_repeated_context
from fastdiff.models.teacher import Teacher

COPIES = 256


@pytest.fixture
def pipeline():
    found = build("stable_diffusion_3")
    found.register_modules(text_encoder_3=None, tokenizer_3=None)
    return found


@torch.no_grad()
def inputs(pipeline, rows: int = 2) -> dict:
    generator = torch.Generator().manual_seed(0)
    context, _, pooled, _ = pipeline.encode_prompt(["a red apple", "b"], None, None, do_classifier_free_guidance=False)
    return {
        "hidden_states": torch.randn(rows, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([100.0, 900.0]),
        "encoder_hidden_states": context,
        "pooled_projections": pooled,
        "return_dict": False,
    }


def test_outputs_and_gradients_are_the_stock_networks(pipeline):
    stock, given = pipeline.transformer.requires_grad_(True), inputs(pipeline)
    merged = copy.deepcopy(stock)
    merge_repeated_context(merged, pipeline.tokenizer_max_length, COPIES)
    for network in (stock, merged):
        network(**given)[0].square().mean().backward()
    torch.testing.assert_close(merged(**given)[0], stock(**given)[0], rtol=1e-5, atol=1e-5)
    wanted = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in merged.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys() and len(wanted) > 50
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_blocks_see_one_of_the_copies(pipeline):
    seen = []
    block = pipeline.transformer.transformer_blocks[0]
    block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    teacher = Teacher(pipeline)
    teacher.new_network()(**inputs(pipeline))
    teacher.network(**inputs(pipeline))
    assert seen[-1] == pipeline.tokenizer_max_length + 1


def test_a_pipeline_with_t5_stays_as_it_is():
    pipeline = build("stable_diffusion_3")
    before = [type(processor) for processor in pipeline.transformer.attn_processors.values()]
    Teacher(pipeline)
    assert [type(processor) for processor in pipeline.transformer.attn_processors.values()] == before


def test_other_numbers_of_rows_are_refused(pipeline):
    teacher, given = Teacher(pipeline), inputs(pipeline)
    given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :-1]
    with pytest.raises(ValueError, match="equal ones"):
        teacher.network(**given)


def test_a_pipeline_may_be_prepared_again(pipeline):
    first = Teacher(pipeline).network(**inputs(pipeline))[0]
    again = Teacher(pipeline).network(**inputs(pipeline))[0]
    assert torch.equal(first, again)
