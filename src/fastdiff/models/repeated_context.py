"""SD3 without T5: the pipeline puts 256 rows of zeros in T5's place, which stay equal, so that one of them is enough.

Nothing tells the rows apart: SD3's transformer gives context tokens no position, and what it does to them it does to each
alone or, in attention, by their values. As keys, n equal tokens weigh what one does whose logit is larger by log n.
Outputs and gradients are the stock network's; a step has 77 + 1 context tokens instead of 333.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def merge_repeated_context(transformer: nn.Module, tokens: int, copies: int) -> None:
    """Makes an `SD3Transformer2DModel` compute the last `copies` of its context rows once.

    Args:
        transformer: changed in place; its weights are not. One that is changed already stays as it is.
        tokens: rows before them.
        copies: rows that the caller knows to be equal, as in a pipeline whose `text_encoder_3` is None.
    """

    if all(isinstance(block.attn.processor, AttentionToCopies) for block in transformer.transformer_blocks):
        return

    def merge(_module: nn.Module, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        context = inputs["encoder_hidden_states"]
        if context.shape[1] != tokens + copies:
            raise ValueError(f"{context.shape[1]} rows of context where {tokens} and {copies} equal ones were said")
        return args, inputs | {"encoder_hidden_states": context[:, : tokens + 1]}

    count_last_token(transformer, copies)
    transformer.register_forward_pre_hook(merge, with_kwargs=True)


def count_last_token(transformer: nn.Module, copies: int) -> None:
    """Makes an `SD3Transformer2DModel` take its last row of context for `copies` equal ones."""
    for block in transformer.transformer_blocks:
        block.attn.set_processor(AttentionToCopies(copies))


class AttentionToCopies:
    """diffusers' attention of image and context tokens; the last context token stands for `copies` equal ones."""

    def __init__(self, copies: int) -> None:
        self.extra = math.log(copies)

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        image = _heads(attn, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), hidden_states)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        context = _heads(attn, added, (attn.norm_added_q, attn.norm_added_k), encoder_hidden_states)
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(image, context))
        logits = query.new_zeros(query.shape[2], key.shape[2])
        logits[:, -1] = self.extra
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=logits)
        mixed = mixed.transpose(1, 2).flatten(2)
        image, context = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        image = attn.to_out[1](attn.to_out[0](image))
        return image, context if attn.context_pre_only else attn.to_add_out(context)


def _heads(attn: nn.Module, projections: tuple, norms: tuple, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `(B, heads, N, width)` of tokens `(B, N, C)`."""
    query, key, value = (project(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2) for project in projections)
    return _normed(norms[0], query), _normed(norms[1], key), value


def _normed(norm: nn.Module | None, values: Tensor) -> Tensor:
    return values if norm is None else norm(values)
