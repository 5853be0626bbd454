"""Qwen-Image: a vision-language model reads the prompt; packed latents of a video autoencoder; flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.codec import Codec, FrameCodec
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families.transformer import TransformerFamily, pack, unpack

TOKENS = 512
"""Longer prompts are cut here (the pipeline's limit is 1024): rows of one length are what batches and caches hold."""


class QwenImage(TransformerFamily):
    """`QwenImagePipeline` (Wu et al. 2025, arXiv 2508.02324); unconditional means the prompt ` `, as published.

    512 tokens with a mask. Guidance is the plain formula; the stock pipeline's `true_cfg_scale` also scales each guided
    token back to the norm of the conditional one, which is a choice of its sampler and no part of the teacher.
    """

    name = "qwen-image"
    pipeline_classes = ("QwenImagePipeline",)
    attention_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    lora_targets = (
        *attention_targets,
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    gives_levels = True

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], resolution: int) -> Conditioning:
        embeds, mask = pipeline.encode_prompt(list(prompts), pipeline.text_encoder.device, max_sequence_length=TOKENS)
        mask = embeds.new_ones(embeds.shape[:2]).long() if mask is None else mask
        missing = TOKENS - embeds.shape[1]
        padded = {"prompt_embeds": F.pad(embeds, (0, 0, 0, missing)), "prompt_embeds_mask": F.pad(mask, (0, missing))}
        return Conditioning(padded)

    def null(self, pipeline: Any, resolution: int) -> Conditioning:
        return self.encode_prompts(pipeline, [" "], resolution)

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, **inputs: Any) -> Tensor:
        height, width = (side // 2 for side in x_t.shape[-2:])
        tokens = network(
            hidden_states=pack(x_t),
            timestep=time.to(x_t.dtype) / 1000,
            encoder_hidden_states=cond.tensors["prompt_embeds"],
            encoder_hidden_states_mask=cond.tensors["prompt_embeds_mask"],
            img_shapes=[[(1, height, width)]] * len(x_t),
            return_dict=False,
            **inputs,
        )[0]
        return unpack(tokens, x_t)

    def codec(self, autoencoder: nn.Module) -> Codec:
        return FrameCodec(autoencoder)

    def sample_size(self, network: nn.Module) -> int:
        return 128

    def conditioning_shapes(
        self, network: nn.Module, text_encoders: Sequence[Mapping[str, Any]]
    ) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, network.config.joint_attention_dim), "prompt_embeds_mask": (TOKENS,)}

    def sampling_arguments(self, cond: Conditioning, noise: Tensor, pixels: int) -> dict[str, Any]:
        return super().sampling_arguments(cond, pack(noise), pixels)

    def step_noise(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        return unpack(torch.randn(pack(noise).shape, generator=generator), noise)

    def sampled(self, latents: Tensor, noise: Tensor) -> Tensor:
        return unpack(latents, noise)
