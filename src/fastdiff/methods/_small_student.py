"""A student that may be a smaller network than its teacher."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn

from fastdiff.methods.base import Method
from fastdiff.models.small import SmallShape, small_unet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SmallStudentConfig:
    """The size of the student's network, and of a full fake score.

    Args:
        student_width: channels as a share of the teacher's.
        student_layers_per_block: most residual layers of a block; the teacher's if not given.
        student_transformer_layers: most transformer layers of an attention; the teacher's if not given.
        student_removed_levels: levels of resolution left out, 0 being the finest.
    """

    student_width: float = 1.0
    student_layers_per_block: int | None = None
    student_transformer_layers: int | None = None
    student_removed_levels: tuple[int, ...] = ()

    def check_whole(self, reason: str) -> None:
        """Refuses a smaller student.

        Raises:
            ValueError: with the reason.
        """
        if not self.shape().whole:
            raise ValueError(f"this method has no smaller student: {reason}. Leave the student's sizes out")

    def shape(self) -> SmallShape:
        """The size in one object.

        Raises:
            ValueError: if a number is out of range.
        """
        return SmallShape(
            self.student_width,
            self.student_layers_per_block,
            self.student_transformer_layers,
            self.student_removed_levels,
        )


class SmallStudent(Method):
    """A method whose student may be a smaller network than its teacher."""

    config: SmallStudentConfig

    @property
    def own_network(self) -> bool:
        return not self.config.shape().whole or super().own_network

    def student_network(self, network: nn.Module) -> nn.Module | None:
        if self.config.shape().whole:
            return super().student_network(network)
        student, kept = small_unet(network, self.config.shape())
        logger.info("%s", kept)
        return student

    def critic_network(self, network: nn.Module) -> nn.Module | None:
        shape = self.config.shape()
        return super().critic_network(network) if shape.whole else small_unet(network, shape)[0]

    def inherits(self) -> dict[str, tuple[str, ...]] | None:
        """A small fake score starts as the student of the run that was fitted to the teacher's scores."""
        if self.config.shape().whole:
            return super().inherits()
        starts = {name: (name,) for name in self.groups()}
        return starts | {name: (name, "student") for name in self.critics if name in starts}
