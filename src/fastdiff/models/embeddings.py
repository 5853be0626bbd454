"""Extra network inputs that start without effect."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdiff.models.analytic_networks import WidenableNetwork

TIME_FEATURES = 256
"""Features of one extra number, as in the published models that take a guidance embedding."""
_SLOT, _LAYER = "time_embedding.cond_proj.weight", "time_embedding.linear_1"


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Sinusoidal features `(B, dim)` of guidance `w` (LCM's w, which is guidance_scale - 1), as stock pipelines embed it.

    Source: Meng et al. 2023, arXiv 2210.03142; `get_guidance_scale_embedding` of diffusers' pipelines.
    """
    return time_features([1000.0 * w], dim)


def time_features(values: Sequence[Tensor], dim: int = TIME_FEATURES) -> Tensor:
    """Sinusoidal features `(B, dim * len(values))` of further scalar inputs, one block a value, in the values' dtype.

    Args:
        values: each `(B,)`, in the units of a network's time (0 .. 1000; of a flow 1000 t): the end of a jump, a step
            length, or 1000 times a guidance.
        dim: features of one value, even.
    """
    half = dim // 2
    blocks = []
    for value in values:
        steps = torch.arange(half, device=value.device, dtype=value.dtype)
        angles = value[:, None] * torch.exp(steps * (-math.log(10000.0) / (half - 1)))[None]
        blocks += [angles.sin(), angles.cos()]
    return torch.cat(blocks, dim=1)


def with_extra_times(network: nn.Module, count: int = 1) -> nn.Module:
    """A copy of a network that takes `count` further scalars as `timestep_cond=time_features([...])`.

    They enter the time embedding through one zero-initialised layer, so that outputs are the network's own at step 0.

    Raises:
        ValueError: if the network is neither a UNet2DConditionModel nor a small network of a closed-form teacher.
    """
    return _widened(network, TIME_FEATURES * count, "another time or number as an input")


def with_guidance_input(network: nn.Module, dim: int = TIME_FEATURES) -> nn.Module:
    """A copy of a network that takes `timestep_cond=guidance_embedding(w, dim)`: equal outputs at step 0.

    Raises:
        ValueError: as `with_extra_times`.
    """
    return _widened(network, dim, "a guidance embedding (fix guidance_scale to do without)")


def _widened(network: nn.Module, dim: int, what: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    if isinstance(network, WidenableNetwork):
        return network.widened(dim)
    if not isinstance(network, UNet2DConditionModel):
        raise ValueError(
            f"{what} needs a UNet2DConditionModel, whose time embedding has a slot for it, got "
            f"{type(network).__name__}."
        )
    if network.config.time_cond_proj_dim is not None:
        raise ValueError(
            f"{what} has no free slot: this network already takes {network.config.time_cond_proj_dim} extra features "
            "(a guidance embedding); start from the teacher without them."
        )
    copy = UNet2DConditionModel.from_config(network.config, time_cond_proj_dim=dim)
    missing, unexpected = copy.load_state_dict(network.state_dict(), strict=False)
    if list(missing) != [_SLOT] or unexpected:
        raise ValueError(f"weights do not fit the widened network: missing {missing}, unexpected {unexpected}")
    nn.init.zeros_(copy.time_embedding.cond_proj.weight)
    return copy


def with_fixed_input(network: nn.Module, features: Tensor) -> nn.Module:
    """A plain copy of a widened UNet that does what the network does when it is always told the same `features` `(1, n)`.

    The slot adds `cond_proj(features)` to what enters the time embedding's first layer: a constant becomes part of
    that layer's bias, so that stock pipelines need not know of the input.
    """
    (shift,) = _shifts(network, features)
    return _plain(network, "bias", shift)


def with_input_at_times(network: nn.Module, times: Tensor, features: Tensor) -> nn.Module:
    """A plain copy of a widened UNet that does what the network does at each of `times` `(N,)` with its `features` `(N, n)`.

    What the slot adds at N times is N vectors, and the N sinusoids that the layer is fed there are independent: one
    change of its matrix, of rank N, gives all of them exactly. At other times it means nothing. So a student that is told
    where each step ends is run by stock pipelines, on its own steps.

    Args:
        network: made by `with_extra_times` or `with_guidance_input`.
        times: what the network is fed as its time; all different, fewer than its sinusoids.
        features: what it is told there.
    """
    sinusoids = network.time_proj(times.float()).double()  # as the forward pass makes them
    change = torch.linalg.pinv(sinusoids) @ _shifts(network, features).to(sinusoids.device)
    return _plain(network, "weight", change.T)


@torch.no_grad()
def _shifts(network: nn.Module, features: Tensor) -> Tensor:
    """What the layer behind the slot gives more, `(N, channels)`, when the network is told `features` `(N, n)`."""
    state = network.state_dict()
    slot = state[_SLOT].double()
    return features.to(slot) @ slot.T @ state[f"{_LAYER}.weight"].double().T


@torch.no_grad()
def _plain(network: nn.Module, changed: str, change: Tensor) -> nn.Module:
    """The network without its slot, and with a change of one tensor of the layer behind it."""
    config = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
    state = dict(network.state_dict())
    del state[_SLOT]
    old = state[f"{_LAYER}.{changed}"]
    state[f"{_LAYER}.{changed}"] = (old.double() + change.to(old.device)).to(old.dtype)
    with torch.device("meta"):
        plain = type(network).from_config(config | {"time_cond_proj_dim": None})
    plain.load_state_dict(state, strict=True, assign=True)
    return plain.requires_grad_(False).eval()
