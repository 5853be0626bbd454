"""The network passes of a training step and nothing else: recorded once, then replayed on plain diffusers networks.

A replayed pass calls diffusers' network with the same rows, low-rank products, type and checkpointing, and in forward
mode where the step asked for a derivative; discriminator heads are called on what they were called on; graphs get one
backward into the same weights and inputs, and a fused AdamW steps. No object of the loop takes part.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fastdiff.engine import Trainer
from fastdiff.methods import Batch, Update
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families import Family
from fastdiff.models.roles import Part, adapter_layers

BASE = "base"


@dataclass(frozen=True)
class Call:
    """One network call of a step; `tangents` are those of x, the time and the inputs, by name, in forward mode."""

    network: str
    parts: tuple[Part, ...]
    x: Tensor
    time: Tensor
    cond: Conditioning
    inputs: Mapping[str, Tensor]
    with_graph: bool
    input_grad: bool
    stop_at: tuple[str, ...] = ()
    tangents: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadCall:
    """One call of a module beside the network, with a copy of what it was given; inputs that had a graph get one."""

    name: str
    given: tuple[Tensor, ...]
    graphs: tuple[bool, ...]


@dataclass
class Turn:
    """One update: its calls and the groups it steps."""

    trains: tuple[str, ...]
    calls: list[Call] = field(default_factory=list)
    heads: list[HeadCall] = field(default_factory=list)


class RecordingFamily:
    """Calls the network as its family does, and writes down with what."""

    def __init__(self, family: Family, trainer: Trainer, turns: list[Turn]) -> None:
        self.family, self.turns = family, turns
        self.roles = trainer.networks.roles
        self.stop_at: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, **inputs: Any) -> Tensor:
        """As `Family.call`."""
        names = [role for role in self.roles if not self.roles.is_adapter(role)]
        name = next((role for role in names if self.roles.network(role) is network), BASE)
        trained = [*self.turns[-1].trains]
        serves = [part.adapter for part in self.roles.active.parts] + [name]
        with_graph = torch.is_grad_enabled() and (x_t.requires_grad or bool({*trained} & {*serves}))
        given = {key: forward_ad.unpack_dual(value) for key, value in {"x": x_t, "time": time, **inputs}.items()}
        told = {key: value.primal.detach() for key, value in given.items()}
        self.turns[-1].calls.append(
            Call(
                name,
                self.roles.active.parts,
                told.pop("x"),
                told.pop("time"),
                cond,
                told,
                with_graph,
                x_t.requires_grad and with_graph,
                self.stop_at,
                {key: value.tangent.detach() for key, value in given.items() if value.tangent is not None},
            )
        )
        return self.family.call(network, x_t, time, cond, **inputs)


def record(trainer: Trainer, step: Callable[[], object]) -> list[Turn]:
    """Runs a step of the trainer, or several, and returns the updates with their calls."""
    turns: list[Turn] = []
    denoiser, method = trainer.networks.denoiser, trainer.method
    family = RecordingFamily(denoiser.family, trainer, turns)
    features, updates = denoiser.features, method.updates

    def stopped(x_t: Tensor, t: Tensor, cond: Conditioning, role: str, names: tuple[str, ...]) -> list[Tensor]:
        family.stop_at = names
        try:
            return features(x_t, t, cond, role, names)
        finally:
            family.stop_at = ()

    def told(update: Update) -> Update:
        def loss(batch: Batch, ctx: Any) -> Mapping[str, Tensor]:
            turns.append(Turn(update.trains))
            return update.loss(batch, ctx)

        return dataclasses.replace(update, loss=loss)

    def head_called(name: str):
        def note(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
            graphs = tuple(one.requires_grad for one in given)
            turns[-1].heads.append(HeadCall(name, tuple(one.detach().clone() for one in given), graphs))

        return note

    denoiser.family, denoiser.features = family, stopped
    method.updates = lambda step: (told(update) for update in updates(step))
    modules = trainer.networks.modules.items()
    handles = [module.register_forward_pre_hook(head_called(name)) for name, module in modules]
    try:
        step()
    finally:
        denoiser.family = family.family
        del denoiser.features, method.updates
        for handle in handles:
            handle.remove()
    return turns


class LowRank(nn.Module):
    """A frozen layer with the low-rank products of several adapters; `at_work` is shared by all layers."""

    def __init__(self, layer: nn.Module, at_work: list[Part]) -> None:
        super().__init__()
        self.layer = layer.base_layer
        self.down = nn.ModuleDict({name: copy.deepcopy(one) for name, one in layer.lora_A.items()})
        self.up = nn.ModuleDict({name: copy.deepcopy(one) for name, one in layer.lora_B.items()})
        self.scales = dict(layer.scaling)
        self.at_work = at_work

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        result = self.layer(x, *args)
        for part in self.at_work:
            rows = x if part.rows is None else x[part.rows]
            hidden = _applied(self.down[part.adapter], rows)
            if (scale := self.scales[part.adapter] * part.scale) != 1:
                hidden = hidden * scale
            if part.rows is None:
                result += _applied(self.up[part.adapter], hidden)
            else:
                result[part.rows] += _applied(self.up[part.adapter], hidden)
        return result


def _applied(layer: nn.Module, x: Tensor) -> Tensor:
    weight = layer.weight.to(x.dtype)
    return layer._conv_forward(x, weight, None) if isinstance(layer, nn.Conv2d) else nn.functional.linear(x, weight)


class Bare:
    """Plain networks with a run's weights, and its turns."""

    def __init__(self, trainer: Trainer, turns: list[Turn]) -> None:
        roles = trainer.networks.roles
        self.family, self.turns = trainer.networks.denoiser.family, turns
        self.at_work: list[Part] = []
        full = [role for role in roles if not roles.is_adapter(role)]
        self.networks = {BASE: roles.base} | {role: roles.network(role) for role in full}
        self.networks = {name: copy.deepcopy(network) for name, network in self.networks.items()}
        self.heads = {name: copy.deepcopy(module) for name, module in trainer.networks.modules.items()}
        for name, layer in adapter_layers(self.networks[BASE]):
            parent, _, child = name.rpartition(".")
            setattr(self.networks[BASE].get_submodule(parent), child, LowRank(layer, self.at_work))
        if roles.checkpointing:
            for network in self.networks.values():
                network.enable_gradient_checkpointing(self._checkpoint)
        groups = {group for turn in turns for group in turn.trains}
        self.parameters = {group: self._parameters(group, full) for group in groups}
        self.optimizers = {
            group: torch.optim.AdamW(parameters, lr=1e-6, fused=True)
            for group, parameters in self.parameters.items()
            if parameters
        }

    def step(self) -> None:
        """All passes of one training step."""
        for turn in self.turns:
            outputs, leaves = [], [p for group in turn.trains for p in self.parameters[group]]
            for call in turn.calls:
                x = call.x.requires_grad_(True) if call.input_grad else call.x.detach()
                outputs += self._call(call, x)
                leaves += [x] if call.input_grad else []
            for head in turn.heads:
                given = [
                    one.detach().requires_grad_(graph) for one, graph in zip(head.given, head.graphs, strict=True)
                ]
                outputs.append(self.heads[head.name](*given))
                leaves += [one for one in given if one.requires_grad]
            if outputs:
                torch.stack([output.float().sum() for output in outputs]).sum().backward(inputs=leaves)
            for group in turn.trains:
                if group in self.optimizers:
                    self.optimizers[group].step()
                    self.optimizers[group].zero_grad(set_to_none=True)

    def _call(self, call: Call, x: Tensor) -> list[Tensor]:
        """The outputs that carry a graph."""
        network, found = self.networks[call.network], {}
        self.at_work[:] = call.parts
        weight = next(network.parameters())
        mixed = weight.dtype not in (x.dtype, torch.float64)
        precision = torch.autocast(weight.device.type, x.dtype) if mixed else contextlib.nullcontext()

        def read(output: Any) -> Tensor:
            return self.family.feature(network, output, x)

        with (
            torch.set_grad_enabled(call.with_graph),
            precision,
            _stopped(network, call.stop_at, read, found),
            _forward_mode() if call.tangents else contextlib.nullcontext(),
        ):
            given = {"x": x, "time": call.time, **call.inputs}
            given |= {key: forward_ad.make_dual(given[key], tangent) for key, tangent in call.tangents.items()}
            found = {"": self.family.call(network, given.pop("x"), given.pop("time"), call.cond, **given)}
        return list(found.values()) if call.with_graph else []

    def _parameters(self, group: str, full: list[str]) -> list[nn.Parameter]:
        if group in self.heads:
            return list(self.heads[group].parameters())
        if group in full:
            return list(self.networks[group].requires_grad_(True).parameters())
        layers = [module for module in self.networks[BASE].modules() if isinstance(module, LowRank)]
        return [half[group].weight for layer in layers for half in (layer.down, layer.up) if group in half]

    def _checkpoint(self, module: nn.Module, *args: Any) -> Any:
        kept = list(self.at_work)

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            before, self.at_work[:] = list(self.at_work), kept
            yield
            self.at_work[:] = before

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), again()

        return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _forward_mode() -> Iterator[None]:
    """Inside, attention is its plain formula: fused kernels have no forward derivative."""
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        yield


class _Stop(Exception):
    """Leaves a forward whose output nobody needs."""


@contextlib.contextmanager
def _stopped(
    network: nn.Module, names: tuple[str, ...], read: Callable[[Any], Tensor], found: dict[str, Tensor]
) -> Iterator[None]:
    """Inside, a call of the network ends at the last of `names`, if there are any, and leaves their outputs."""

    def hook(name: str):
        def collect(_module: nn.Module, _args: Any, output: Any) -> None:
            found[name] = read(output)
            if len(found) == len(names):
                raise _Stop

        return collect

    handles = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        with contextlib.suppress(_Stop):
            yield
    finally:
        for handle in handles:
            handle.remove()
