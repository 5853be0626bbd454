"""Reads a student's weights out of a network that may still be training: nothing in the network is changed.

The network may be a full module, or a base with peft LoRA adapters whose forward the trainer has replaced; only
weights, alphas and ranks are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff.models.roles import adapter_layers


@dataclass(frozen=True)
class LowRank:
    """One module's update W += B A, alpha / r and the role's scale already in B. Float32.

    `down` is A: (r, in) or (r, in, k, k); `up` is B: (out, r) or (out, r, 1, 1).
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def padded(self, rank: int) -> LowRank:
        """The same update with zeros up to `rank`."""
        extra = rank - self.rank
        down = torch.cat([self.down, self.down.new_zeros(extra, *self.down.shape[1:])])
        up = torch.cat([self.up, self.up.new_zeros(self.up.shape[0], extra, *self.up.shape[2:])], dim=1)
        return LowRank(down, up)

    def delta(self) -> Tensor:
        """B A, in the shape of the module's weight."""
        if self.down.dim() == 2:
            return self.up @ self.down
        return torch.einsum("or,rikl->oikl", self.up.flatten(1), self.down)


def low_rank_updates(network: nn.Module, adapters: Mapping[str, float]) -> dict[str, LowRank]:
    """Module name -> update of a role {adapter: scale}; several adapters on one module are joined along the rank.

    Raises:
        ValueError: for an adapter the network does not have, one that is not a plain LoRA (rsLoRA, DoRA, trained
            biases and whole modules have no form that every reader understands), or weights that are not finite.
    """
    for adapter in adapters:
        _check_plain(network, adapter)
    updates = {}
    for name, layer in adapter_layers(network):
        parts = [_folded(layer, adapter, scale) for adapter, scale in adapters.items() if adapter in layer.lora_A]
        if not parts:
            continue
        down, up = torch.cat([part.down for part in parts]), torch.cat([part.up for part in parts], dim=1)
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ValueError(f"adapter weights of {name!r} are not finite; go back to an earlier checkpoint.")
        updates[name] = LowRank(down, up)
    if not updates:
        raise ValueError(f"no module of the network carries any of the adapters {list(adapters)}.")
    return updates


def student_state(
    network: nn.Module, adapters: Mapping[str, float], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """State dict of the bare student network: adapters merged, peft's names removed.

    Weights that no adapter touches are the network's own tensors, not copies, unless `dtype` asks for a cast.

    Args:
        network: full module (with `adapters` empty), or the base that carries the adapters.
        adapters: role {adapter: scale}; empty means the network without any adapter.
        dtype: storage of floating point weights; None keeps each weight's own.

    Raises:
        ValueError: as `low_rank_updates`, and for a merged grouped convolution.
    """
    updates = low_rank_updates(network, adapters) if adapters else {}
    state = {}
    for key, tensor in network.state_dict().items():
        if ".lora_" in key:
            continue
        name = key.replace(".base_layer.", ".")
        tensor = tensor.detach()
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in updates:
            tensor = _merged(module, tensor, updates[module])
        state[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return state


def _merged(module: str, weight: Tensor, update: LowRank) -> Tensor:
    delta = update.delta()
    if delta.shape != weight.shape:
        raise ValueError(
            f"the adapter of {module!r} gives {tuple(delta.shape)} for a weight of {tuple(weight.shape)}: grouped "
            "convolutions cannot be merged. Export the LoRA file instead of the full pipeline."
        )
    return (weight.float() + delta.to(weight.device)).to(weight.dtype)


def _folded(layer: nn.Module, adapter: str, scale: float) -> LowRank:
    factor = scale * layer.lora_alpha[adapter] / layer.r[adapter]
    down, up = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    return LowRank(down.float(), up.float() * factor)


def _check_plain(network: nn.Module, adapter: str) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    configs = getattr(network, "peft_config", {})
    if adapter not in configs:
        raise ValueError(f"the network has no adapter {adapter!r}; it has {sorted(configs) or 'none'}.")
    config = configs[adapter]
    if not isinstance(config, LoraConfig):
        raise ValueError(f"adapter {adapter!r} is a {config.peft_type} adapter; only plain LoRA can be exported.")
    for flag, title in (("use_rslora", "rank-stabilised LoRA"), ("use_dora", "DoRA")):
        if getattr(config, flag, False):
            raise ValueError(
                f"adapter {adapter!r} uses {title}, which LoRA readers outside peft apply wrongly. Train with "
                f"{flag}=False, or export the full pipeline from a network with the adapter merged by peft."
            )
    keys = get_peft_model_state_dict(network, adapter_name=adapter)
    other = [key for key in keys if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if other:
        raise ValueError(
            f"adapter {adapter!r} also trains {len(other)} tensors that a LoRA file cannot hold, first {other[0]!r}. "
            "Train without biases and modules_to_save, or export the full pipeline."
        )
