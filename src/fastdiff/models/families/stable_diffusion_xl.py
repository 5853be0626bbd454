"""Stable Diffusion XL: two text encoders, pooled embeddings and size conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families.base import Family
from fastdiff.models.families.stable_diffusion import UNET_LORA_TARGETS, unet_feature_taps, unet_middle_taps


class StableDiffusionXL(Family):
    """`StableDiffusionXLPipeline`; unconditional means zeros when the pipeline says so, else the empty prompt.

    Size conditioning (Podell et al. 2023, arXiv 2307.01952) is that of an uncropped square image.
    """

    name = "stable-diffusion-xl"
    pipeline_classes = ("StableDiffusionXLPipeline",)
    network_name = "unet"
    lora_targets = UNET_LORA_TARGETS
    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")
    kohya_file = True

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], resolution: int) -> Conditioning:
        device = pipeline.text_encoder_2.device
        embeds, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return _bundle(embeds, pooled, resolution)

    def null(self, pipeline: Any, resolution: int) -> Conditioning:
        empty = self.encode_prompts(pipeline, [""], resolution)
        if not pipeline.config.force_zeros_for_empty_prompt:
            return empty
        zeros = {name: torch.zeros_like(empty.tensors[name]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
        return _bundle(zeros["prompt_embeds"], zeros["pooled_prompt_embeds"], resolution)

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, **inputs: Any) -> Tensor:
        added = {"text_embeds": cond.tensors["pooled_prompt_embeds"], "time_ids": cond.tensors["time_ids"]}
        embeds = cond.tensors["prompt_embeds"]
        return network(x_t, time, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False, **inputs)[
            0
        ]

    def conditioning_shapes(
        self, network: nn.Module, text_encoders: Sequence[Mapping[str, Any]]
    ) -> dict[str, tuple[int, ...]]:
        width = sum(encoder["hidden_size"] for encoder in text_encoders)
        embeds, pooled = (text_encoders[0]["max_position_embeddings"], width), (text_encoders[1]["projection_dim"],)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "time_ids": (6,)}

    def feature_taps(self, network: nn.Module) -> dict[str, int]:
        return unet_feature_taps(network)

    def middle_taps(self, network: nn.Module) -> dict[str, int]:
        return unet_middle_taps(network)

    def sampling_arguments(self, cond: Conditioning, noise: Tensor, pixels: int) -> dict[str, Any]:
        arguments = super().sampling_arguments(cond, noise, pixels)
        height, width, top, left, *target = (int(size) for size in arguments.pop("time_ids")[0].tolist())
        sizes = {"original_size": (height, width), "crops_coords_top_left": (top, left), "target_size": tuple(target)}
        return arguments | sizes


def _bundle(embeds: Tensor, pooled: Tensor, resolution: int) -> Conditioning:
    sizes = [resolution, resolution, 0, 0, resolution, resolution]
    time_ids = torch.tensor([sizes], dtype=embeds.dtype, device=embeds.device).expand(len(embeds), -1)
    return Conditioning({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "time_ids": time_ids})
