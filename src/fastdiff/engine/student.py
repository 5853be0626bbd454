"""The student's weights as they are evaluated: live, or averaged by diffusers' EMAModel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from fastdiff.engine.networks import Networks


class StudentWeights:
    """Averages the student after each of its updates, if a decay is given."""

    def __init__(self, networks: Networks, decay: float | None) -> None:
        from diffusers.training_utils import EMAModel

        self.parameters = networks.parameters("student")
        self.ema = None if decay is None else EMAModel(self.parameters, decay=decay, foreach=True)

    def average(self) -> None:
        """Moves the average towards the live weights."""
        if self.ema is not None:
            self.ema.step(self.parameters)

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside, the student has its averaged weights (if any)."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    @property
    def average_steps(self) -> int:
        return 0 if self.ema is None else self.ema.optimization_step

    def average_tensors(self) -> dict[str, Tensor]:
        """The averaged weights in parameter order."""
        return {} if self.ema is None else {str(index): tensor for index, tensor in enumerate(self.ema.shadow_params)}

    def load_average(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Restores `average_tensors`."""
        if self.ema is None:
            return
        self.ema.optimization_step = steps
        for index, shadow in enumerate(self.ema.shadow_params):
            shadow.copy_(tensors[str(index)])
