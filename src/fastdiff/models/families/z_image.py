"""Z-Image: a language model reads the prompt; one stream of image and text tokens; flow matching, run backwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families.transformer import TransformerFamily

TOKENS = 512
"""The pipeline's own limit."""


class ZImage(TransformerFamily):
    """`ZImagePipeline` (Z-Image team 2025, arXiv 2511.22699); unconditional means the empty prompt.

    512 tokens with a mask. The network's time is 1 for clean images and it predicts data - noise. Its stock forward
    takes sequences of different lengths, which shapes depend on: the host reads them, once a call. Guidance w is the
    pipeline's `guidance_scale` w - 1.
    """

    name = "z-image"
    pipeline_classes = ("ZImagePipeline",)
    blocks = ("layers",)
    attention_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    lora_targets = (*attention_targets, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    gives_levels = True

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], resolution: int) -> Conditioning:
        rows, _ = pipeline.encode_prompt(
            list(prompts), pipeline.text_encoder.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        embeds = torch.stack([F.pad(row, (0, 0, 0, TOKENS - len(row))) for row in rows])
        mask = torch.stack([F.pad(torch.ones_like(row[:, 0]), (0, TOKENS - len(row))) for row in rows])
        return Conditioning({"prompt_embeds": embeds, "prompt_mask": mask.long()})

    def null(self, pipeline: Any, resolution: int) -> Conditioning:
        return self.encode_prompts(pipeline, [""], resolution)

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, **inputs: Any) -> Tensor:
        images = list(x_t.unsqueeze(2).unbind())
        output = network(images, (1000 - time) / 1000, _rows(cond), return_dict=False, **inputs)[0]
        return -torch.stack(output).squeeze(2)

    def sample_size(self, network: nn.Module) -> int:
        return 128

    def patch(self, network: nn.Module) -> int:
        return network.config.all_patch_size[0]

    def width(self, network: nn.Module) -> int:
        return network.config.dim

    def sampling_arguments(self, cond: Conditioning, noise: Tensor, pixels: int) -> dict[str, Any]:
        return {"prompt_embeds": _rows(cond), "latents": noise.float(), "height": pixels, "width": pixels}


def _rows(cond: Conditioning) -> list[Tensor]:
    """The embeddings of each prompt without padding."""
    lengths = cond.tensors["prompt_mask"].sum(1).tolist()
    return [row[:length] for row, length in zip(cond.tensors["prompt_embeds"], lengths)]
