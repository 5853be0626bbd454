"""What families with a transformer for a network share: tokens that stand for square patches of latents."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from fastdiff.models.families.base import Family


class TransformerFamily(Family):
    """A family whose network is a list, or several lists, of blocks that pass image tokens on.

    Attributes:
        blocks: names of the lists in running order.
    """

    network_name = "transformer"
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)

    def patch(self, network: nn.Module) -> int:
        return network.config.patch_size

    def feature_taps(self, network: nn.Module) -> dict[str, int]:
        names = [f"{blocks}.{n}" for blocks in self.blocks for n in range(len(network.get_submodule(blocks)))]
        return dict.fromkeys(names, self.width(network))

    def middle_taps(self, network: nn.Module) -> dict[str, int]:
        taps = list(self.feature_taps(network).items())
        return dict([taps[len(taps) // 2]])

    def width(self, network: nn.Module) -> int:
        """Channels of a token."""
        return network.config.num_attention_heads * network.config.attention_head_dim

    def feature(self, network: nn.Module, output: Any, x_t: Tensor) -> Tensor:
        """Image tokens `(B, N, C)`, the last of what a block returns, as a map; tokens after them are not looked at."""
        tokens = output[-1] if isinstance(output, tuple) else output
        height, width = (side // self.patch(network) for side in x_t.shape[-2:])
        return tokens[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


def pack(latents: Tensor) -> Tensor:
    """Latents `(B, C, H, W)` as tokens `(B, HW/4, 4C)` of 2 x 2 cells."""
    return latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """The latents that `pack` made tokens of, with the height and width of `like`."""
    height, width = (side // 2 for side in like.shape[-2:])
    cells = tokens.unflatten(1, (height, width)).unflatten(3, (-1, 2, 2))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
