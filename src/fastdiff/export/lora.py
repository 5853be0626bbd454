"""LoRA files that every reader understands alike.

Two files: diffusers' native form, and kohya's form for ComfyUI and A1111, whose loaders do not map peft's names. alpha
is folded into B so that alpha == r: a reader that ignores alpha, metadata or both still applies the trained strength.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.export.weights import LowRank, low_rank_updates

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
_METADATA_KEY = "lora_adapter_metadata"


@dataclass(frozen=True)
class LoraFiles:
    """What `save_lora` wrote. `kohya` is None for transformers, which ComfyUI reads in diffusers' form."""

    diffusers: Path
    kohya: Path | None
    modules: int

    def paths(self) -> tuple[Path, ...]:
        return (self.diffusers,) if self.kohya is None else (self.diffusers, self.kohya)


def save_lora(
    folder: str | Path,
    network: nn.Module,
    adapters: Mapping[str, float],
    component: str = "unet",
    dtype: torch.dtype = torch.float32,
    kohya: bool = True,
) -> LoraFiles:
    """Writes a role {adapter: scale} of `network` as LoRA files; each file appears whole or not at all.

    Args:
        folder: created if missing; existing LoRA files in it are replaced.
        network: a diffusers network with peft adapters (from `add_adapter` or `inject_adapter_in_model`).
        adapters: {adapter name: scale}; the scales are folded into the weights.
        component: the pipeline's name of the network, "unet" or "transformer".
        dtype: float32, bfloat16 or float16.
        kohya: write kohya's form as well (`Family.kohya_file`).

    Raises:
        ValueError: for an unknown component or dtype, weights that float16 cannot hold, and as `low_rank_updates`.
    """
    if component not in ("unet", "transformer"):
        raise ValueError(f"component {component!r} has no LoRA form here; it must be 'unet' or 'transformer'.")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"a LoRA file is stored in float32, bfloat16 or float16, not {dtype}.")
    updates = low_rank_updates(network, adapters)
    rank = max(update.rank for update in updates.values())
    state = _state_dict(updates, component, dtype, rank)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {f"{component}.{key}": value for key, value in _config(updates, rank).items()}
    native = folder / DIFFUSERS_FILE
    _write(state, native, {_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)})
    second = None
    if kohya:
        second = folder / KOHYA_FILE
        described = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(rank),
        }
        _write(_kohya(state), second, described)
    return LoraFiles(native, second, len(updates))


def count_modules(path: str | Path) -> int:
    """Number of modules a LoRA file of either form holds."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    return len({key.rsplit(".lora_", 1)[0] for key in keys if ".lora_" in key})


def _state_dict(updates: Mapping[str, LowRank], component: str, dtype: torch.dtype, rank: int) -> dict[str, Tensor]:
    """The file's tensors, all of one rank.

    Smaller ranks are padded with zeros, which changes no output: readers look alphas of mixed ranks up by the ends of
    module names, and diffusers 0.42 then gives some modules the alpha of another.
    """
    state = {}
    for name, update in updates.items():
        update = update.padded(rank)
        for kind, tensor in (("lora_A", update.down), ("lora_B", update.up)):
            stored = tensor.to("cpu", dtype).contiguous()
            if not torch.isfinite(stored).all():
                raise ValueError(f"{name}.{kind} overflows {dtype}; save this LoRA in bfloat16 or float32.")
            state[f"{component}.{name}.{kind}.weight"] = stored
    return state


def _config(updates: Mapping[str, LowRank], rank: int) -> dict[str, object]:
    """Settings of the LoraConfig that reads the file: alpha equals the rank everywhere."""
    return {"r": rank, "lora_alpha": rank, "target_modules": sorted(updates), "bias": "none"}


def _kohya(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    return convert_state_dict_to_kohya(dict(state))


def _write(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    aside = path.with_name(f".{path.name}.partial")
    try:
        save_file(state, aside, metadata={"format": "pt"} | metadata)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
