"""A frozen base in few bits: linear layers of the repeated blocks, in the formats of bitsandbytes.

`int8` is a whole number and one scale a row (Dettmers et al. 2022, arXiv 2208.07339), `nf4` a code of 4 bits and one
scale for 64 values (Dettmers et al. 2023, arXiv 2305.14314). Adapters on top stay in float32. The product is ours: it
keeps the quantised weight for backward and nothing else, whatever the format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.compiling import blocks_of

Quantization = Literal["none", "int8", "nf4"]


class Int8:
    """One scale a row."""

    def __init__(self, weight: Tensor) -> None:
        from bitsandbytes import functional

        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        self.tensors = {"codes": codes, "scales": scales}

    @staticmethod
    def read(layer: nn.Module, dtype: torch.dtype) -> Tensor:
        """The weight `(out, in)` in `dtype`."""
        from bitsandbytes import functional

        return functional.int8_vectorwise_dequant(layer.codes, layer.scales).to(dtype)


class NF4:
    """Sixteen levels at the quantiles of a normal law, one scale for 64 values."""

    BLOCK = 64

    def __init__(self, weight: Tensor) -> None:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=self.BLOCK, quant_type="nf4")
        self.tensors = {"codes": codes, "scales": state.absmax, "levels": state.code}

    @classmethod
    def read(cls, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        """The weight `(out, in)` in `dtype`."""
        from bitsandbytes import functional

        shape = torch.Size((layer.out_features, layer.in_features))
        state = functional.QuantState(
            layer.scales, shape, layer.levels, blocksize=cls.BLOCK, quant_type="nf4", dtype=dtype
        )
        return functional.dequantize_4bit(layer.codes, state)


FORMATS: dict[str, type[Int8] | type[NF4]] = {"int8": Int8, "nf4": NF4}


class QuantizedLinear(nn.Module):
    """A frozen linear layer; its codes and scales are buffers, its bias is the original's."""

    def __init__(self, linear: nn.Linear, kind: type[Int8] | type[NF4]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.kind = linear.bias, kind
        for name, tensor in kind(linear.weight.detach()).tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)` in the type of `x`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """`x W^T + b` of frozen W and b: W is read from its codes in forward, and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.kind.read(layer, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.kind.read(ctx.layer, grad.dtype), None


def linears_in_blocks(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """The linear layers of a network's repeated blocks, by owner and name; adapters on them are left out."""
    return [
        (owner, name)
        for block in blocks_of(network)
        for owner in block.modules()
        for name, child in owner.named_children()
        if type(child) is nn.Linear and not isinstance(owner, nn.ModuleDict)  # adapters lie in ModuleDicts
    ]


def quantize_blocks(network: nn.Module, kind: Quantization) -> None:
    """Replaces the linear layers of a network's repeated blocks, one after the other; adapters on them stay.

    Raises:
        ImportError: if bitsandbytes is not installed.
        ValueError: if the network has no such layers.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"quantize_base {kind} needs bitsandbytes: pip install 'fastdiff-diffusers[8bit]', or leave it out"
        ) from error
    found = linears_in_blocks(network)
    if not found:
        raise ValueError(
            f"quantize_base: {type(network).__name__} has no repeated blocks with linear layers; leave it out"
        )
    for owner, name in found:
        setattr(owner, name, QuantizedLinear(getattr(owner, name), FORMATS[kind]))


@contextlib.contextmanager
def exact_weights(network: nn.Module, exact: nn.Module) -> Iterator[None]:
    """Inside, the quantised layers of `network` are those of `exact`, the same network as it was loaded."""
    rounded = {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    try:
        for name, layer in rounded.items():
            original = exact.get_submodule(name.removesuffix(".base_layer"))
            _put(network, name, original.to(layer.codes.device, next(network.parameters()).dtype))
        yield
    finally:
        for name, layer in rounded.items():
            _put(network, name, layer)


def _put(network: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, child = name.rpartition(".")
    setattr(network.get_submodule(owner), child, layer)
