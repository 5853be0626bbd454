"""Students smaller than their teacher: narrower, shallower, or with levels of resolution left out.

Weights are taken over wherever a tensor has the teacher's shape; the rest starts at random, so that a small student is
first fitted to the teacher's scores and only then distilled (Song et al. 2024, arXiv 2410.23274).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_DOWNWARDS = (
    *("down_block_types", "block_out_channels", "layers_per_block", "attention_head_dim", "num_attention_heads"),
    *("cross_attention_dim", "transformer_layers_per_block", "only_cross_attention"),
)
_UPWARDS = ("up_block_types", "reverse_transformer_layers_per_block")
_IN_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(?:(resnets|attentions)\.(\d+)\.)?(.+)")


@dataclass(frozen=True)
class SmallShape:
    """How much of the teacher a student keeps.

    Args:
        width: channels as a share of the teacher's, rounded to whole groups of its normalisation.
        layers_per_block: most residual layers of a block; None keeps the teacher's.
        transformer_layers: most transformer layers of an attention; None keeps the teacher's.
        removed_levels: levels of resolution left out, 0 being the finest.

    Raises:
        ValueError: if a number is out of range.
    """

    width: float = 1.0
    layers_per_block: int | None = None
    transformer_layers: int | None = None
    removed_levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise ValueError(f"width must be above 0 and at most 1 (the teacher's), got {self.width}")
        for name in ("layers_per_block", "transformer_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if len(set(self.removed_levels)) != len(self.removed_levels) or min(self.removed_levels, default=0) < 0:
            raise ValueError(f"removed_levels must be different numbers from 0, got {self.removed_levels}")

    @property
    def whole(self) -> bool:
        """Whether nothing is taken away."""
        return self == SmallShape()


@dataclass(frozen=True)
class Kept:
    """What a small student has of its teacher; `new` names the tensors that start at random."""

    parameters: int
    teacher_parameters: int
    copied: int
    new: tuple[str, ...]

    def __str__(self) -> str:
        share = self.parameters / self.teacher_parameters
        first = f", the first {self.new[0]}" if self.new else ""
        return (
            f"student of {self.parameters / 1e6:.1f} M parameters ({share:.0%} of the teacher's "
            f"{self.teacher_parameters / 1e6:.1f} M): {self.copied / self.parameters:.0%} of them copied, "
            f"{len(self.new)} tensors new{first}"
        )


def small_unet(teacher: nn.Module, shape: SmallShape) -> tuple[UNet2DConditionModel, Kept]:
    """A smaller network of the teacher's kind, with its weights where shapes agree; the teacher is not changed.

    Blocks are matched by their level, layers by their place; the last layer of a way up, which takes the first skip
    connection of its level, takes the teacher's last. New weights are drawn from torch's global generator.

    Raises:
        ValueError: if the teacher is no UNet2DConditionModel, or no level would be left.
    """
    from diffusers import UNet2DConditionModel

    if not isinstance(teacher, UNet2DConditionModel):
        raise ValueError(
            f"small students are built from a UNet2DConditionModel, got {type(teacher).__name__}: keep width, layers "
            "and levels as they are"
        )
    config = {key: value for key, value in dict(teacher.config).items() if not key.startswith("_")}
    count = len(config["down_block_types"])
    levels = [level for level in range(count) if level not in shape.removed_levels]
    if not levels or max(shape.removed_levels, default=0) >= count:
        raise ValueError(f"removed_levels {shape.removed_levels} must leave some of the teacher's {count} levels")
    student = UNet2DConditionModel.from_config(_smaller(config, levels, shape))
    return student, _copy(teacher, student, levels, count)


def _smaller(config: Mapping[str, Any], levels: Sequence[int], shape: SmallShape) -> dict[str, Any]:
    own = dict(config)
    for key in (*_DOWNWARDS, *_UPWARDS):
        if isinstance(config.get(key), list | tuple):
            order = levels if key in _DOWNWARDS else [len(config[key]) - 1 - level for level in reversed(levels)]
            own[key] = tuple(config[key][place] for place in order)
    if shape.layers_per_block is not None:
        own["layers_per_block"] = _at_most(own["layers_per_block"], shape.layers_per_block)
    if shape.transformer_layers is not None:
        for key in ("transformer_layers_per_block", "reverse_transformer_layers_per_block"):
            own[key] = _at_most(own.get(key), shape.transformer_layers)
    if shape.width < 1:
        groups = own["norm_num_groups"]
        widths = tuple(groups * max(1, int(shape.width * c / groups + 0.5)) for c in own["block_out_channels"])
        heads = own.get("num_attention_heads") or own["attention_head_dim"]  # diffusers reads heads from either
        heads = heads if isinstance(heads, list | tuple) else (heads,) * len(levels)
        divisors = tuple(max(h for h in range(1, n + 1) if c % h == 0) for c, n in zip(widths, heads, strict=True))
        own |= {"block_out_channels": widths, "attention_head_dim": divisors, "num_attention_heads": None}
    return own


def _at_most(value: Any, limit: int) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_at_most(item, limit) for item in value)
    return value if value is None else min(value, limit)


@torch.no_grad()
def _copy(teacher: nn.Module, student: nn.Module, levels: Sequence[int], count: int) -> Kept:
    theirs, own = teacher.state_dict(), student.state_dict()
    last, ends = ([len(block.resnets) - 1 for block in network.up_blocks] for network in (teacher, student))
    copied, new = 0, []
    for name, tensor in own.items():
        source = theirs.get(_source(name, levels, count, last, ends))
        if source is None or source.shape != tensor.shape:
            new.append(name)
            continue
        tensor.copy_(source)
        copied += tensor.numel()
    return Kept(_count(student), _count(teacher), copied, tuple(new))


def _source(name: str, levels: Sequence[int], count: int, last: Sequence[int], ends: Sequence[int]) -> str:
    """The teacher's name of the tensor in the same place."""
    found = _IN_BLOCK.fullmatch(name)
    if found is None:
        return name
    side, block, kind, layer, rest = found[1], int(found[2]), found[3], found[4], found[5]
    number = levels[block] if side == "down_blocks" else count - 1 - levels[len(levels) - 1 - block]
    if kind is None:
        return f"{side}.{number}.{rest}"
    place = int(layer)
    if side == "up_blocks" and place == ends[block]:
        place = last[number]
    return f"{side}.{number}.{kind}.{place}.{rest}"


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
