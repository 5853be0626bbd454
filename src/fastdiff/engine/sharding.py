"""Networks cut over the processes by torch's `fully_shard` (FSDP: Zhao et al. 2023, arXiv 2304.11277).

A network gathers a block before its work and drops it after; between them every process holds a slice of each weight,
the rows that are its own. What moves weights (optimizers, averages, targets) sees these slices as ordinary tensors,
autograd sees the gathered weights, and files see whole tensors, gathered one at a time. Adapters are small and stay
whole on every process.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fastdiff.engine.settings import Sharding

_TORCH = (2, 14)
_REPLICATE, _SHARD = "replicate", "shard"


class Shards:
    """Cuts networks over one mesh of processes.

    Args:
        kind: `full_shard` cuts over all processes; `hybrid_shard` over those of one node, and every node holds the same.
        device: where slices and gathered blocks lie.
        compute_dtype: what weights are gathered in; their own type if not given. Autocast would keep a copy of every
            weight until backward, which is what sharding is to avoid.

    Raises:
        ValueError: if the processes are not spread evenly over nodes.
        ImportError: if torch is older than what this was written for.
    """

    def __init__(self, kind: Sharding, device: torch.device, compute_dtype: torch.dtype | None = None) -> None:
        if torch.__version__ < _TORCH:
            raise ImportError(f"fsdp needs torch {'.'.join(map(str, _TORCH))}, this is {torch.__version__}: update it")
        self.device = device
        self.mesh = _mesh(kind, device)
        # Inputs keep their types: a time of 999 is no bfloat16.
        self.precision = MixedPrecisionPolicy(
            compute_dtype, torch.float32 if compute_dtype else None, cast_forward_inputs=False
        )

    def cut(
        self, network: nn.Module, adapters: Collection[nn.Parameter] = (), shared: Iterable[object] = ()
    ) -> Sharded:
        """Shards a network in place, block by block.

        Args:
            network: whole, on any device.
            adapters: parameters of it that stay whole.
            shared: objects inside the network that its whole copies have in common with it.

        Raises:
            ValueError: if the network does not say what its blocks are.
        """
        kept = [*adapters, *network.buffers(), *shared]
        hollow = _hollow(network, kept)
        options = {
            "mesh": self.mesh,
            "mp_policy": self.precision,
            "ignored_params": set(adapters),
            # Also at the root: what steps between two forwards without a backward would not be gathered again.
            "reshard_after_forward": True,
        }
        for block in _blocks(network):
            fully_shard(block, **options)
        fully_shard(network, **options)
        with torch.no_grad():
            for parameter in adapters:
                parameter.data = parameter.to(self.device)
        mesh = self.mesh[_SHARD] if self.mesh.ndim > 1 else self.mesh
        return Sharded(network, mesh, lambda: _hollow(hollow, kept))


class Sharded:
    """The slices that this process holds of one network.

    Args:
        network: a sharded one.
        mesh: the processes it is cut over.
        hollow: makes an ordinary copy of it without weights.

    Attributes:
        parameters: one plain tensor a weight, sharing memory with the network's own slice; some may be empty.
        leaves: the gathered weights, which autograd sees; they hold memory only while their block works.
    """

    def __init__(self, network: nn.Module, mesh: DeviceMesh, hollow: Callable[[], nn.Module]) -> None:
        self.network, self._mesh, self._hollow = network, mesh, hollow
        gathered = _gathered_parameters(network)
        own = {name: parameter for name, parameter in network.named_parameters() if isinstance(parameter, DTensor)}
        self.names = list(own)
        self._slices: list[DTensor] = list(own.values())
        self.leaves: list[Tensor] = [gathered[name] for name in self.names]
        self.parameters = [nn.Parameter(own.detach().to_local(), own.requires_grad) for own in self._slices]

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Hands the gradients, which backward has averaged, to `parameters`."""
        for parameter, own in zip(self.parameters, self._slices):
            parameter.grad = None if own.grad is None else own.grad.to_local()
            own.grad = None

    def norm(self, own: Tensor) -> Tensor:
        """The norm of whole gradients from that of the slices here."""
        squares = own.to(self.parameters[0].device).square()
        dist.all_reduce(squares, group=self._mesh.get_group())
        return squares.sqrt()

    def whole(self, tensors: Mapping[str, Tensor], numbers: Iterable[int]) -> Mapping[str, Tensor]:
        """Slices seen as whole tensors. Each is gathered when it is read, which all processes do in the same order."""
        of = dict(zip(tensors, numbers, strict=True))
        return _Changed(tensors, lambda name, tensor: self._gather(of[name], tensor))

    def parts(self, tensors: Mapping[str, Tensor], numbers: Iterable[int]) -> Mapping[str, Tensor]:
        """Whole tensors seen as the slices of this process."""
        of = dict(zip(tensors, numbers, strict=True))
        return _Changed(tensors, lambda name, tensor: self._slice(of[name], tensor))

    def whole_copy(self, keep: bool) -> nn.Module | None:
        """An ordinary module with whole weights, on processes that `keep` it; the others help to gather."""
        weights = self.whole(dict(zip(self.names, self.parameters)), range(len(self.names)))
        if not keep:
            read(weights)
            return None
        network = self._hollow()
        network.load_state_dict(dict(weights), strict=False, assign=True)
        return network

    def rest(self) -> None:
        """Between steps: forgets the order of calls, which a network without a backward would remember for ever."""
        self.network.reset_iter_state()

    def _gather(self, number: int, tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:  # an optimizer's count of steps
            return tensor
        like = self._slices[number]
        layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
        return DTensor.from_local(tensor.detach(), like.device_mesh, like.placements, **layout).full_tensor()

    def _slice(self, number: int, tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:
            return tensor
        rows = -(-len(tensor) // self._mesh.size())  # the last processes have fewer or none
        start = min(rows * self._mesh.get_local_rank(), len(tensor))
        return tensor[start : start + rows].clone()  # else it would keep the whole one in memory


def read(tensors: Mapping[str, Tensor]) -> None:
    """Takes part in gathering tensors that another process keeps."""
    for _ in tensors.values():
        pass


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a weight."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Changed(Mapping[str, Tensor]):
    """A mapping whose values are changed when they are read."""

    def __init__(self, tensors: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> None:
        self._tensors, self._change = tensors, change

    def __getitem__(self, name: str) -> Tensor:
        return self._change(name, self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _mesh(kind: Sharding, device: torch.device) -> DeviceMesh:
    world = dist.get_world_size()
    if kind == "full_shard":
        return init_device_mesh(device.type, (world,), mesh_dim_names=(_SHARD,))
    node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % node:
        raise ValueError(
            f"fsdp hybrid_shard needs as many processes on every node: there are {world}, of which {node} are here. "
            "Start as many on each, or give fsdp full_shard"
        )
    return init_device_mesh(device.type, (world // node, node), mesh_dim_names=(_REPLICATE, _SHARD))


def _blocks(network: nn.Module) -> list[nn.Module]:
    """What is gathered at once, inner blocks first."""
    names = getattr(network, "_no_split_modules", None)
    if not names:
        raise ValueError(
            f"{type(network).__name__} does not say what its blocks are (_no_split_modules), so it cannot be sharded: "
            "leave out fsdp"
        )
    found = [module for module in network.modules() if type(module).__name__ in names]
    return found[::-1]


def _hollow(network: nn.Module, shared: Iterable[object]) -> nn.Module:
    """A copy whose weights have shapes and no memory; `shared` objects are not copied but used by both."""
    memo = {id(kept): kept for kept in shared}
    for parameter in network.parameters():
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        memo.setdefault(id(parameter), empty)
    return copy.deepcopy(network, memo)


def _gathered_parameters(network: nn.Module) -> dict[str, Tensor]:
    """The parameters that forwards see; torch makes each in its first gathering and uses it in all later ones."""
    found: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            prefix = f"{path}." if path else ""
            found |= {
                prefix + name: parameter
                for name, parameter in module.named_parameters()
                if not isinstance(parameter, DTensor)
            }
            module.reshard()
    return found
