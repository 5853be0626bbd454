"""Tables of cumulative alphas from a diffusers scheduler config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["alphas_cumprod_from_config"]


def alphas_cumprod_from_config(config: Mapping[str, Any]) -> Tensor:
    """(T,) float64 table for a config with ``trained_betas`` or one of the three common ``beta_schedule`` names.

    Raises:
        ValueError: naming the key that is missing or not understood.
    """
    betas = _betas(config)
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError(
            f"scheduler betas run from {betas.min().item():.6g} to {betas.max().item():.6g}: each must lie in (0, 1]; "
            "check beta_start, beta_end or trained_betas in the scheduler config"
        )
    table = torch.cumprod(1 - betas, dim=0)
    return _zero_terminal_snr(table) if config.get("rescale_betas_zero_snr") else table


def _betas(config: Mapping[str, Any]) -> Tensor:
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.as_tensor(trained, dtype=torch.float64)
    name, count = _need(config, "beta_schedule"), _need(config, "num_train_timesteps")
    if not isinstance(count, int) or count < 2:
        raise ValueError(f"num_train_timesteps is {count!r} in the scheduler config: give an integer of at least 2")
    if name == "linear":
        return torch.linspace(*_ends(config), count, dtype=torch.float64)
    if name == "scaled_linear":
        start, end = _ends(config)
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if name == "squaredcos_cap_v2":
        return _squared_cosine(count)
    raise ValueError(
        f"beta_schedule {name!r} in the scheduler config is not known: use 'linear', 'scaled_linear' or "
        "'squaredcos_cap_v2', or write the betas themselves into trained_betas"
    )


def _squared_cosine(count: int) -> Tensor:
    """Betas of a squared-cosine abar, each capped at 0.999 (Nichol & Dhariwal, arXiv 2102.09672)."""
    edges = torch.arange(count + 1, dtype=torch.float64) / count
    level = ((edges + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - level[1:] / level[:-1]).clamp_max(0.999)


def _zero_terminal_snr(table: Tensor) -> Tensor:
    """Shift sqrt(abar) so that it ends at 0, scale it so that it starts where it did (arXiv 2305.08891)."""
    root = table.sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return root**2


def _ends(config: Mapping[str, Any]) -> tuple[float, float]:
    return float(_need(config, "beta_start")), float(_need(config, "beta_end"))


def _need(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise ValueError(
            f"the scheduler config has no {key!r} (its keys: {', '.join(sorted(map(str, config))) or 'none'}): give "
            "trained_betas, or beta_schedule with beta_start, beta_end and num_train_timesteps"
        )
    return value
