"""PixArt-Sigma: T5, a transformer with cross attention, and the epsilon of a table of betas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families.transformer import TransformerFamily

TOKENS = 300
"""The pipeline's own limit."""

MICRO_CONDITIONS = {"resolution": None, "aspect_ratio": None}
"""Inputs that the pipeline's networks do not have, unlike those of PixArt-Alpha."""


class PixArtSigma(TransformerFamily):
    """`PixArtSigmaPipeline` (Chen et al. 2024, arXiv 2403.04692); unconditional means the empty prompt.

    300 tokens of T5 with a mask. The network predicts a variance as well, which samplers and losses do not use. Stock
    pipelines of this family load no LoRA files, so that LoRA students are exported merged.
    """

    name = "pixart-sigma"
    pipeline_classes = ("PixArtSigmaPipeline",)
    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")
    lora_targets = (*attention_targets, "ff.net.0.proj", "ff.net.2")
    loads_lora = False

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], resolution: int) -> Conditioning:
        embeds, mask, _, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=pipeline.text_encoder.device
        )
        return Conditioning({"prompt_embeds": embeds, "prompt_attention_mask": mask})

    def null(self, pipeline: Any, resolution: int) -> Conditioning:
        return self.encode_prompts(pipeline, [""], resolution)

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, **inputs: Any) -> Tensor:
        output = network(
            x_t,
            encoder_hidden_states=cond.tensors["prompt_embeds"],
            encoder_attention_mask=cond.tensors["prompt_attention_mask"],
            timestep=time,
            added_cond_kwargs=MICRO_CONDITIONS,
            return_dict=False,
            **inputs,
        )[0]
        return output[:, : x_t.shape[1]]

    def conditioning_shapes(
        self, network: nn.Module, text_encoders: Sequence[Mapping[str, Any]]
    ) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, network.config.caption_channels), "prompt_attention_mask": (TOKENS,)}

    def sampling_arguments(self, cond: Conditioning, noise: Tensor, pixels: int) -> dict[str, Any]:
        return super().sampling_arguments(cond, noise, pixels) | {"use_resolution_binning": False}
