"""Regional compilation: the blocks that a network repeats, compiled one by one with static shapes.

A whole network compiles in minutes and again for every role; its blocks are few kinds of program that all their copies
share, and what surrounds them (taps, checkpointing, roles) stays ordinary Python.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

PROGRAMS = 256
"""Programs that one kind of block may have: its shapes, times the roles and gradient modes it is called with."""
_RESIDUAL = "ResnetBlock2D"


class Compilation:
    """Compiled blocks, at work inside `at_work` only: previews and exports have other shapes, each worth minutes."""

    def __init__(self) -> None:
        self.on = False

    def add(self, network: nn.Module) -> None:
        """Compiles the repeated blocks of a diffusers network when they are first called.

        Raises:
            ValueError: if the network names no repeated blocks.
        """
        blocks = [module for module in network.modules() if type(module).__name__ == _RESIDUAL]
        blocks += blocks_of(network)
        if not blocks:
            raise ValueError(
                f"torch_compile compiles the blocks that a network repeats, and {type(network).__name__} has none: "
                "leave it out"
            )
        import torch._dynamo.config
        import torch._functorch.config

        # The eighth program would be the last otherwise, and the ninth role or shape silently run uncompiled.
        torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
        # A program that reuses what it saved cannot be differentiated twice, as weighing loss terms does.
        torch._functorch.config.donated_buffer = False
        for block in blocks:
            block.forward = _Switched(block.forward, self)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, blocks run compiled."""
        before, self.on = self.on, True
        try:
            yield
        finally:
            self.on = before


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks that a diffusers network says it repeats, its transformer blocks."""
    names = getattr(network, "_repeated_blocks", None) or ()
    return [module for module in network.modules() if type(module).__name__ in names]


class _Switched:
    """A forward with a compiled twin. A copy of the block is an ordinary block: the twin belongs to the original."""

    def __init__(self, eager: Callable[..., Any], compilation: Compilation) -> None:
        self.eager, self.compilation = eager, compilation
        self.compiled = torch.compile(eager, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.compiled if self.compilation.on else self.eager)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self.eager, memo)
