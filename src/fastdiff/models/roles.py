"""Roles: named networks that share one frozen base wherever they can.

A role is either a map `{adapter: scale}` over the base (the teacher is the empty map) or a full module of its own.
Low-rank adapters are injected and named by peft; only their forward is ours, because it must serve several roles in
one call, switch in O(1) and survive gradient checkpointing (LoRA: Hu et al. 2021, arXiv 2106.09685).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from fastdiff.models.compiling import Compilation
from fastdiff.models.quantizing import Quantization, quantize_blocks

TEACHER = "teacher"


@dataclass(frozen=True)
class AdapterSpec:
    """A trainable low-rank adapter on the frozen base: rank, alpha (weight alpha / rank) and target module names."""

    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class FullSpec:
    """A network of its own, started from the base unless `module` is given; weights in `dtype`.

    One that no optimizer moves is not `trainable`, so that a gradient may pass through it without its layers keeping
    inputs for gradients of weights.
    """

    module: nn.Module | None = None
    dtype: torch.dtype = torch.float32
    trainable: bool = True


@dataclass(frozen=True)
class Part:
    """An adapter at work on some rows of the batch; `rows=None` means all of them."""

    adapter: str
    scale: float = 1.0
    rows: slice | None = None


class ActiveParts:
    """The one object that all adapter layers of a base look at. Replacing `parts` switches the role."""

    def __init__(self) -> None:
        self.parts: tuple[Part, ...] = ()

    def use(self, parts: tuple[Part, ...]) -> _Using:
        """A context manager under which `parts` are at work; it can be entered again and again."""
        return _Using(self, parts)


class _Using:
    """Reusable, unlike a generator's context: backward may recompute a checkpointed block more than once."""

    def __init__(self, active: ActiveParts, parts: tuple[Part, ...]) -> None:
        self.active, self.parts = active, parts
        self.previous: list[tuple[Part, ...]] = []

    def __enter__(self) -> None:
        self.previous.append(self.active.parts)
        self.active.parts = self.parts

    def __exit__(self, *_: object) -> None:
        self.active.parts = self.previous.pop()


class Roles:
    """All networks of a run, by role name.

    Args:
        base: the frozen teacher network; adapters are injected into it.
        specs: role -> `AdapterSpec` or `FullSpec` for every role but the teacher.
        gradient_checkpointing: recompute activations in backward, each under the role of its own forward.
        activation_offload: what checkpointed blocks keep for that waits in the host's memory.
        quantize_base: storage of the base's largest layers, see `models.quantizing`.
        torch_compile: compile the blocks that networks repeat; they run compiled inside `compilation.at_work()`.

    Raises:
        ValueError: if a role is called `teacher`, an adapter matches no module of the base, or there is nothing to
            compile.
    """

    def __init__(
        self,
        base: nn.Module,
        specs: Mapping[str, AdapterSpec | FullSpec],
        gradient_checkpointing: bool = False,
        activation_offload: bool = False,
        quantize_base: Quantization = "none",
        torch_compile: bool = False,
    ) -> None:
        if TEACHER in specs:
            raise ValueError("the role 'teacher' is the frozen base itself and cannot be trained")
        self.base = base.requires_grad_(False).eval()
        self.active = ActiveParts()
        self.checkpointing, self.offloading = gradient_checkpointing, activation_offload
        self.compilation = Compilation()
        self._adapters: dict[str, Mapping[str, float]] = {TEACHER: {}}
        self._modules: dict[str, nn.Module] = {}
        for role, spec in specs.items():
            if isinstance(spec, FullSpec):
                module = copy.deepcopy(base) if spec.module is None else spec.module
                module = module.to(dtype=spec.dtype, device=anchor(base).device)
                self._modules[role] = module.requires_grad_(spec.trainable).eval()
        for role, spec in specs.items():
            if isinstance(spec, AdapterSpec):
                inject_adapter(base, role, spec)
                self._adapters[role] = {role: 1.0}
        bind_adapter_layers(base, self.active)
        if quantize_base != "none":
            quantize_blocks(base, quantize_base)
        for network in [self.base, *self._modules.values()]:
            if gradient_checkpointing:
                self._checkpoint(network)
            if torch_compile:
                self.compilation.add(network)

    def __contains__(self, role: str) -> bool:
        return role in self._adapters or role in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter([*self._adapters, *self._modules])

    def is_adapter(self, role: str) -> bool:
        """Whether the role lives on the shared base (the teacher does)."""
        return role in self._adapters

    def network(self, role: str) -> nn.Module:
        """The module that serves `role`; for adapter roles this is the shared base."""
        if role in self._modules:
            return self._modules[role]
        if role in self._adapters:
            return self.base
        known = ", ".join([*self._adapters, *self._modules])
        raise KeyError(f"unknown role {role!r}; this run has: {known}")

    @contextlib.contextmanager
    def replaced(self, networks: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
        """Inside, other networks with the same weights serve in place of these, e.g. whole ones for sharded ones."""
        base, modules = self.base, self._modules
        self.base = networks.get(base, base)
        self._modules = {role: networks.get(module, module) for role, module in modules.items()}
        try:
            yield
        finally:
            self.base, self._modules = base, modules

    def stack(self, role: str, adapters: Mapping[str, float]) -> None:
        """Defines `role` as a weighted sum of adapters on the base, e.g. a style adapter below the student."""
        self._adapters[role] = dict(adapters)

    def parts(self, role: str, rows: slice | None = None) -> tuple[Part, ...]:
        """What is at work on `rows` when `role` runs; empty for the teacher and for full modules."""
        return tuple(Part(adapter, scale, rows) for adapter, scale in self._adapters.get(role, {}).items())

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The trainable parameters of a role, in a stable order."""
        return [parameter for _, parameter in self.named_parameters(role)]

    def named_parameters(self, role: str) -> list[tuple[str, nn.Parameter]]:
        """Names are those of the network; adapter names keep the role, as peft writes them."""
        if role in self._modules:
            return list(self._modules[role].named_parameters())
        return [
            (f"{name}.{kind}.{role}.weight", getattr(layer, kind)[role].weight)
            for name, layer in adapter_layers(self.base)
            if role in layer.lora_A
            for kind in ("lora_A", "lora_B")
        ]

    def state_dict(self, role: str) -> dict[str, Tensor]:
        """Trainable weights of a role, detached, for checkpoints; buffers of full modules are not trained."""
        return {name: parameter.detach() for name, parameter in self.named_parameters(role)}

    def check_fit(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Refuses weights that are not this role's.

        Raises:
            ValueError: if names or shapes differ.
        """
        own = self.state_dict(role)
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        if wrong:
            raise ValueError(
                f"weights do not fit role {role!r}: {len(wrong)} tensors differ in name or shape, first {wrong[0]!r}. "
                "Check that rank, targets and teacher are those of the run that wrote them."
            )

    def load_state_dict(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Copies weights in place; refuses what does not fit before anything is copied."""
        self.check_fit(role, state)
        with torch.no_grad():
            for name, tensor in self.state_dict(role).items():
                tensor.copy_(state[name])

    def _checkpoint(self, network: nn.Module) -> None:
        def contexts():
            return contextlib.nullcontext(), self.active.use(self.active.parts)

        def run(module: nn.Module, *args: Any) -> Any:
            with on_host(network) if self.offloading else contextlib.nullcontext():
                return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)

        network.enable_gradient_checkpointing(run)


def anchor(module: nn.Module) -> Tensor:
    """The first parameter, or buffer of a closed form without parameters: it tells device and dtype in O(1)."""
    return next(itertools.chain(module.parameters(), module.buffers()))


def on_host(network: nn.Module) -> contextlib.AbstractContextManager:
    """Inside, what autograd saves is copied to the host, and back when backward wants it; nobody waits for either.

    On a CPU tensors are there already, and stay what they are.
    """
    return save_on_cpu(pin_memory=anchor(network).device.type == "cuda")


def inject_adapter(network: nn.Module, adapter: str, spec: AdapterSpec) -> None:
    """Adds a peft LoRA adapter to a diffusers network: weights in float32, B zero, everything else left frozen.

    Raises:
        ValueError: if the rank is not positive or no module matches the targets.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if spec.rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {spec.rank}")
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets))
    with warnings.catch_warnings():
        # Several adapters on one network are the point here; peft warns about the second one.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, network, adapter)  # not every diffusers network has `add_adapter`
    network.requires_grad_(False)
    for _, layer in adapter_layers(network):
        for name in layer.lora_A:
            layer.lora_A[name].to(torch.float32).requires_grad_(True)
            layer.lora_B[name].to(torch.float32).requires_grad_(True)


def adapter_layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """All peft LoRA layers of a network with their names, in module order."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer)]


def bind_adapter_layers(network: nn.Module, active: ActiveParts) -> None:
    """Makes every adapter layer obey `active` instead of peft's per-layer switches."""
    for _, layer in adapter_layers(network):
        layer.forward = functools.partial(_adapter_forward, layer, active)


def _adapter_forward(layer: nn.Module, active: ActiveParts, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result = layer.base_layer(x, *args, **kwargs)
    for part in active.parts:
        if part.adapter not in layer.lora_A:
            continue
        scale = layer.scaling[part.adapter] * part.scale
        # In place: neither product nor sum gets a copy of its own, and no layer's backward wants its own output.
        if part.rows is None:
            result += low_rank(layer, part.adapter, x, scale)
        else:
            result[part.rows] += low_rank(layer, part.adapter, x[part.rows], scale)
    return result


def low_rank(layer: nn.Module, adapter: str, x: Tensor, scale: float) -> Tensor:
    """scale B(A(x)) in the dtype of `x`; the float32 weights are cast, so gradients reach them in float32."""
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    down_weight, up_weight = down.weight.to(x.dtype), up.weight.to(x.dtype)
    if isinstance(down, nn.Conv2d):
        hidden = F.conv2d(x, down_weight, None, down.stride, down.padding, down.dilation, down.groups)
        return F.conv2d(_scaled(hidden, scale), up_weight)
    return F.linear(_scaled(F.linear(x, down_weight), scale), up_weight)


def _scaled(hidden: Tensor, scale: float) -> Tensor:
    """The scale goes where a layer is narrowest; alpha = rank needs none."""
    return hidden if scale == 1 else hidden * scale


def row_blocks(sizes: Sequence[int]) -> list[slice]:
    """Contiguous row slices of the given sizes."""
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
