"""Extra network inputs that start without effect."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdiff.models.analytic_networks import WidenableNetwork
from fastdiff.models.timestep_slot import SLOT, first_layer, with_slot, without_slot

TIME_FEATURES = 256
"""Features of one extra number, as in the published models that take a guidance embedding."""
UNET_SLOT, TRANSFORMER_SLOT = "time_embedding.cond_proj.weight", f"{SLOT}.cond_proj.weight"
"""Names of the one weight that a network with a slot for extra inputs has more."""


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
        ValueError: if the network has no timestep embedding (all networks of diffusers' pipelines that are served have
            one, and small networks of closed-form teachers), or its slot is taken.
    """
    return _widened(network, TIME_FEATURES * count, "another time or number as an input")


def with_guidance_input(network: nn.Module, dim: int = TIME_FEATURES) -> nn.Module:
    """A copy of a network that takes `timestep_cond=guidance_embedding(w, dim)`: equal outputs at step 0.

    Raises:
        ValueError: as `with_extra_times`.
    """
    return _widened(network, dim, "a guidance embedding (fix guidance_scale to do without)")


def has_own_slot(network: nn.Module) -> bool:
    """Whether the network's class has a slot, which stock pipelines fill with the embedding of `guidance_scale`: a UNet."""
    from diffusers import UNet2DConditionModel

    return isinstance(network, UNet2DConditionModel)


def _widened(network: nn.Module, dim: int, what: str) -> nn.Module:
    if isinstance(network, WidenableNetwork):
        return network.widened(dim)
    state = network.state_dict()
    taken = state.get(UNET_SLOT, state.get(TRANSFORMER_SLOT))
    if taken is not None:
        raise ValueError(
            f"{what} has no free slot: this network already takes {taken.shape[1]} extra features (a guidance "
            "embedding); start from the teacher without them."
        )
    return _widened_unet(network, dim) if has_own_slot(network) else with_slot(network, dim)


def _widened_unet(network: nn.Module, dim: int) -> nn.Module:
    copy = type(network).from_config(network.config, time_cond_proj_dim=dim)
    missing, unexpected = copy.load_state_dict(network.state_dict(), strict=False)
    if list(missing) != [UNET_SLOT] or unexpected:
        raise ValueError(f"weights do not fit the widened network: missing {missing}, unexpected {unexpected}")
    nn.init.zeros_(copy.time_embedding.cond_proj.weight)
    return copy


def with_fixed_input(network: nn.Module, features: Tensor) -> nn.Module:
    """A stock copy of a widened network that does what it does when it is always told the same `features` `(1, n)`.

    The slot adds `cond_proj(features)` to what enters the time embedding's first layer: a constant becomes part of
    that layer's bias, so that stock pipelines need not know of the input.
    """
    (shift,) = _shifts(network, features)
    return _stock(network, "bias", shift)


def with_input_at_times(network: nn.Module, sinusoids: Tensor, features: Tensor) -> nn.Module:
    """A stock copy of a widened network that does what it does at N times with its `features` `(N, n)` there.

    What the slot adds at N times is N vectors, and the N sinusoids that the layer is fed there are independent: one
    change of its matrix, of rank N, gives all of them exactly. At other times it means nothing. So a student that is told
    where each step ends is run by stock pipelines, on its own steps.

    Args:
        network: made by `with_extra_times` or `with_guidance_input`.
        sinusoids: `time_sinusoids` of these times, `(N, channels)`; the times all different, fewer than the channels.
        features: what it is told there.
    """
    sinusoids = sinusoids.double()
    change = torch.linalg.pinv(sinusoids) @ _shifts(network, features).to(sinusoids.device)
    return _stock(network, "weight", change.T)


@torch.no_grad()
def _shifts(network: nn.Module, features: Tensor) -> Tensor:
    """What the layer behind the slot gives more, `(N, channels)`, when the network is told `features` `(N, n)`."""
    state = network.state_dict()
    slot = state[_slot(network)].double()
    return features.to(slot) @ slot.T @ state[f"{first_layer(network)}.weight"].double().T


def _slot(network: nn.Module) -> str:
    return UNET_SLOT if has_own_slot(network) else TRANSFORMER_SLOT


@torch.no_grad()
def _stock(network: nn.Module, changed: str, change: Tensor) -> nn.Module:
    """The network without its slot, and with a change of one tensor of the layer behind it."""
    state = dict(network.state_dict())
    del state[_slot(network)]
    name = f"{first_layer(network)}.{changed}"
    state[name] = (state[name].double() + change.to(state[name].device)).to(state[name].dtype)
    plain = _narrow_unet(network) if has_own_slot(network) else without_slot(network)
    plain.load_state_dict(state, strict=True, assign=True)
    return plain.requires_grad_(False).eval()


def _narrow_unet(network: nn.Module) -> nn.Module:
    """Without weights."""
    config = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
    with torch.device("meta"):
        return type(network).from_config(config | {"time_cond_proj_dim": None})
