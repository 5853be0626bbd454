"""A slot for further scalars in networks of diffusers whose forward has no argument for them: its transformers.

All of them embed their time alike: sinusoids, then a perceptron. A UNet's forward hands `timestep_cond` to that perceptron,
which adds a linear map of it to the sinusoids; here hooks of the network do. Type, config and the names of all other
weights stay what they are, and without the slot the network is the stock one again.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.analytic_networks import zero_linear

SLOT = "timestep_slot"
"""Name of the slot among a network's children."""
_PERCEPTRONS = ("time_embedding", "timestep_embedder", "t_embedder.mlp")  # UNets; transformers; Z-Image


class TimestepSlot(nn.Module):
    """Adds `cond_proj(timestep_cond)` to the sinusoids, for the one call of the network that is given it.

    Args:
        features: length of `timestep_cond`.
        layer: the first layer that the sinusoids go through.
    """

    def __init__(self, features: int, layer: nn.Linear) -> None:
        super().__init__()
        self.cond_proj = zero_linear(features, layer.in_features, layer.weight)
        self._told: Tensor | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, network: nn.Module) -> None:
        """Makes the network take `timestep_cond` `(B, features)`. Bound methods as hooks go along with its copies."""
        network.add_module(SLOT, self)
        self._handles = [
            network.register_forward_pre_hook(self._take, with_kwargs=True),
            network.get_submodule(time_perceptron(network)).register_forward_pre_hook(self._add),
            # Also when the call is left early, or its graph would stay and copies of the network fail.
            network.register_forward_hook(self._forget, always_call=True),
        ]

    def detach(self, network: nn.Module) -> None:
        """Makes it the stock network again."""
        for handle in self._handles:
            handle.remove()
        delattr(network, SLOT)

    def _take(self, _network: nn.Module, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._told = inputs.pop("timestep_cond", None)
        return args, inputs

    def _add(self, _perceptron: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if self._told is None:
            return None
        (sinusoids,) = args
        return (sinusoids + self.cond_proj(self._told.to(sinusoids.dtype)),)

    def _forget(self, _network: nn.Module, _args: tuple, _output: Any) -> None:
        self._told = None


def with_slot(network: nn.Module, features: int) -> nn.Module:
    """A copy of a transformer that takes `timestep_cond` `(B, features)`, which changes nothing until it is trained.

    Raises:
        ValueError: if the network has not one timestep embedding.
    """
    layer = network.get_submodule(first_layer(network))
    wide = copy.deepcopy(network)
    TimestepSlot(features, layer).attach(wide)
    return wide


def without_slot(network: nn.Module) -> nn.Module:
    """The stock network of one with a slot; frozen, it shares weights and buffers with it."""
    memo = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in network.parameters()}
    plain = copy.deepcopy(network, memo | {id(buffer): buffer for buffer in network.buffers()})
    plain.get_submodule(SLOT).detach(plain)
    return plain


def time_perceptron(network: nn.Module) -> str:
    """Name of the module that a diffusers network feeds the sinusoids of its time.

    Raises:
        ValueError: if it has none, or several.
    """
    found = [name for name, _ in network.named_modules() if name.endswith(_PERCEPTRONS)]
    if len(found) != 1:
        raise ValueError(
            f"expected a diffusers network with one timestep embedding, got {type(network).__name__} with "
            f"{', '.join(found) or 'none'}"
        )
    return found[0]


def first_layer(network: nn.Module) -> str:
    """Name of the linear layer that the sinusoids go through first."""
    perceptron = time_perceptron(network)
    return f"{perceptron}.{next(name for name, _ in network.get_submodule(perceptron).named_children())}"


class _Seen(Exception):
    """Leaves a forward whose output nobody needs."""


@torch.no_grad()
def time_sinusoids(network: nn.Module, call: Callable[[], object]) -> Tensor:
    """The sinusoids `(B, n)` of the times that `call` runs a network at, as its forward makes them; it stops there.

    A family, a type and a network each do something to their times first, which need not be said again here.
    """
    found: list[Tensor] = []

    def see(_perceptron: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Seen

    # Before the slot's own hook.
    handle = network.get_submodule(time_perceptron(network)).register_forward_pre_hook(see, prepend=True)
    try:
        with contextlib.suppress(_Seen):
            call()
    finally:
        handle.remove()
    return found[0]
