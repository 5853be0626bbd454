"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, a joint transformer, flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families.transformer import TransformerFamily
from fastdiff.models.repeated_context import merge_repeated_context

T5_TOKENS = 256
"""The pipeline's own limit."""


class StableDiffusion3(TransformerFamily):
    """`StableDiffusion3Pipeline` (Esser et al. 2024, arXiv 2403.03206); unconditional means the empty prompt.

    77 tokens of CLIP and 256 of T5, without a mask; a pipeline without T5 has zeros in their place, computed once.
    """

    name = "stable-diffusion-3"
    pipeline_classes = ("StableDiffusion3Pipeline",)
    attention_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    lora_targets = (
        *attention_targets,
        *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def prepare(self, pipeline: Any) -> None:
        if pipeline.text_encoder_3 is None:
            merge_repeated_context(pipeline.transformer, pipeline.tokenizer_max_length, T5_TOKENS)

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], resolution: int) -> Conditioning:
        device, prompts = pipeline.text_encoder.device, list(prompts)
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, device, do_classifier_free_guidance=False)
        return Conditioning({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def null(self, pipeline: Any, resolution: int) -> Conditioning:
        return self.encode_prompts(pipeline, [""], resolution)

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, **inputs: Any) -> Tensor:
        return network(
            hidden_states=x_t,
            timestep=time,
            encoder_hidden_states=cond.tensors["prompt_embeds"],
            pooled_projections=cond.tensors["pooled_prompt_embeds"],
            return_dict=False,
            **inputs,
        )[0]

    def conditioning_shapes(
        self, network: nn.Module, text_encoders: Sequence[Mapping[str, Any]]
    ) -> dict[str, tuple[int, ...]]:
        config, tokens = network.config, text_encoders[0]["max_position_embeddings"] + T5_TOKENS
        return {
            "prompt_embeds": (tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }
