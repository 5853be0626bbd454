"""Sana: Gemma with an instruction before the prompt, a deep-compression autoencoder, linear attention, flow matching."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families.transformer import TransformerFamily

TOKENS = 300
"""The pipeline's own limit."""


class Sana(TransformerFamily):
    """`SanaPipeline` (Xie et al. 2024, arXiv 2410.10629); unconditional means the empty prompt without an instruction.

    300 tokens of Gemma with a mask; prompts follow the pipeline's own `complex_human_instruction`.
    """

    name = "sana"
    pipeline_classes = ("SanaPipeline",)
    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")
    lora_targets = (*attention_targets, "ff.conv_inverted", "ff.conv_point")

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], resolution: int) -> Conditioning:
        call = inspect.signature(type(pipeline).__call__)
        return _encoded(pipeline, prompts, call.parameters["complex_human_instruction"].default)

    def null(self, pipeline: Any, resolution: int) -> Conditioning:
        return _encoded(pipeline, [""], None)

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, **inputs: Any) -> Tensor:
        return network(
            x_t,
            encoder_hidden_states=cond.tensors["prompt_embeds"],
            encoder_attention_mask=cond.tensors["prompt_attention_mask"],
            timestep=time * network.config.timestep_scale,
            return_dict=False,
            **inputs,
        )[0]

    def conditioning_shapes(
        self, network: nn.Module, text_encoders: Sequence[Mapping[str, Any]]
    ) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, network.config.caption_channels), "prompt_attention_mask": (TOKENS,)}

    def sampling_arguments(self, cond: Conditioning, noise: Tensor, pixels: int) -> dict[str, Any]:
        return super().sampling_arguments(cond, noise, pixels) | {"use_resolution_binning": False}


def _encoded(pipeline: Any, prompts: Sequence[str], instruction: Sequence[str] | None) -> Conditioning:
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts), False, device=pipeline.text_encoder.device, complex_human_instruction=instruction
    )
    return Conditioning({"prompt_embeds": embeds, "prompt_attention_mask": mask})
