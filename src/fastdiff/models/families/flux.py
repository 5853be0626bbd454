"""FLUX.1: CLIP's pooled embedding and T5, packed latents, flow matching with a shift that depends on the resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families.transformer import TransformerFamily, pack, unpack

TOKENS = 512
"""The pipeline's own limit."""


class Flux(TransformerFamily):
    """`FluxPipeline`: FLUX.1-dev, whose network embeds guidance, and FLUX.1-schnell, whose network does not.

    512 tokens of T5, without a mask. With an embedding there is no unconditional branch: a method's guidance is told to
    the network, and students and critics are told 3.5, the pipeline's default, which their users pass as well. Without
    one, unconditional means the empty prompt (the pipeline's `true_cfg_scale`).
    """

    name = "flux"
    pipeline_classes = ("FluxPipeline",)
    blocks = ("transformer_blocks", "single_transformer_blocks")
    attention_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    lora_targets = (
        *attention_targets,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    gives_levels = True
    own_guidance = 3.5

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], resolution: int) -> Conditioning:
        embeds, pooled, _ = pipeline.encode_prompt(list(prompts), device=pipeline.text_encoder.device)
        return Conditioning({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def null(self, pipeline: Any, resolution: int) -> Conditioning:
        return self.encode_prompts(pipeline, [""], resolution)

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, **inputs: Any) -> Tensor:
        embeds = cond.tensors["prompt_embeds"]
        tokens = network(
            hidden_states=pack(x_t),
            timestep=time.to(x_t.dtype) / 1000,
            pooled_projections=cond.tensors["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device),
            img_ids=_image_ids(x_t),
            return_dict=False,
            **inputs,
        )[0]
        return unpack(tokens, x_t)

    def sample_size(self, network: nn.Module) -> int:
        return 128

    def patch(self, network: nn.Module) -> int:
        return 2

    def embeds_guidance(self, network: nn.Module) -> bool:
        return network.config.guidance_embeds

    def conditioning_shapes(
        self, network: nn.Module, text_encoders: Sequence[Mapping[str, Any]]
    ) -> dict[str, tuple[int, ...]]:
        config = network.config
        return {
            "prompt_embeds": (TOKENS, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }

    def sampling_arguments(self, cond: Conditioning, noise: Tensor, pixels: int) -> dict[str, Any]:
        return super().sampling_arguments(cond, pack(noise), pixels)

    def step_noise(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        return unpack(torch.randn(pack(noise).shape, generator=generator), noise)

    def sampled(self, latents: Tensor, noise: Tensor) -> Tensor:
        return unpack(latents, noise)


def _image_ids(x_t: Tensor) -> Tensor:
    """(0, row, column) of each token, `(N, 3)`."""
    first, rows, columns = (torch.arange(n, device=x_t.device) for n in (1, x_t.shape[-2] // 2, x_t.shape[-1] // 2))
    return torch.cartesian_prod(first, rows, columns).to(torch.float32)
