"""Training of bfloat16 weights: stochastic rounding, and Adam with 8-bit moments.

A bfloat16 has 8 bits of mantissa, so an update below 1/512 of a weight is lost when it is rounded to nearest; at
learning rates of 5e-7 that is every update. Rounded up or down at random, with probabilities by nearness, the mean is
exact (Zamirai et al. 2020, arXiv 2010.06192). Moments are kept in blocks that share one scale (Dettmers et al. 2021,
arXiv 2110.02861), in 8-bit codes of our own: the root of the value, rounded at random like the weights, since the
slow second moment moves by less than one code a step.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.diffusion.randomness import philox4x32

BLOCK = 256
"""Values that share a scale."""
_FIRST_POWER, _SECOND_POWER = 3, 4
"""Codes are roots: a code of k bits spans k^power of magnitude, finest in relative terms at the top."""


def round_stochastically(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Float32 values to bfloat16, each to one of its two neighbours, so that the mean is the value.

    The lower 16 bits of a float32 are what a bfloat16 lacks: a random number below 2^16 is added and they are cut off.
    Infinities and NaN stay what they are.
    """
    bits = values.detach().float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


class Codes:
    """Eight-bit codes of one moment: `sign(x) (|x| / scale)^(1/power)` with the largest |x| of each block as scale.

    Args:
        signed: codes are -127..127, else 1..255 for what is not zero: a second moment never becomes zero, where the
            update would become huge.
        power: of the root.
    """

    def __init__(self, signed: bool, power: int) -> None:
        self.top = 127 if signed else 255
        self.dtype = torch.int8 if signed else torch.uint8
        self.signed, self.power = signed, power

    def zeros(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `(blocks, BLOCK)` and float32 scales `(blocks, 1)` of zeros, for a tensor of this size."""
        blocks = -(-like.numel() // BLOCK)
        codes = torch.zeros(blocks, BLOCK, dtype=self.dtype, device=like.device)
        return codes, torch.zeros(blocks, 1, device=like.device)

    def read(self, codes: Tensor, scales: Tensor, like: Tensor) -> Tensor:
        """Float32 values in the shape of `like`."""
        roots = codes.float() / self.top
        values = roots.abs().pow_(self.power).mul_(roots.sign()).mul_(scales)
        return values.flatten()[: like.numel()].view(like.shape)

    def write(self, values: Tensor, codes: Tensor, scales: Tensor, generator: torch.Generator | None) -> None:
        """Replaces codes and scales in place."""
        rows = F.pad(values.flatten(), (0, codes.numel() - values.numel())).view_as(codes)
        torch.amax(rows.abs(), 1, keepdim=True, out=scales)
        roots = (rows.abs() / scales.clamp_min(torch.finfo(torch.float32).tiny)).pow_(1 / self.power).mul_(self.top)
        noise = torch.rand(roots.shape, generator=generator, device=roots.device)
        whole = (roots + noise).floor_().clamp_(0 if self.signed else 1, self.top)
        codes.copy_(whole * rows.sign() if self.signed else torch.where(rows > 0, whole, 0))


FIRST, SECOND = Codes(True, _FIRST_POWER), Codes(False, _SECOND_POWER)


class LowPrecisionAdamW(torch.optim.Optimizer):
    """AdamW on float32 or bfloat16 weights with 8-bit moments; the arithmetic is float32, one tensor at a time.

    A draw depends on (seed, group, step, tensor) alone, so that resuming is exact.

    Args:
        parameters: what is trained; bfloat16 ones are rounded stochastically.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        seed: of the rounding.
        name: of the group, so that two groups round independently.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int,
        name: str,
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        own = self.param_groups[0]["params"]
        self.seed, self.site = seed, zlib.crc32(name.encode())
        self.found_inf: Tensor | None = None
        """Not 0 where the gradients of a step are not finite: the weights then stay what they are."""
        self.counts = [0] * len(own)
        """Steps of each parameter; on the host, so that no device is waited for."""
        self._numbers = {parameter: number for number, parameter in enumerate(own)}
        self._generators = {device: torch.Generator(device) for device in {parameter.device for parameter in own}}
        # All at once: made inside backward, each would pin a hole among temporaries that nothing else fits into.
        for parameter in own:
            first, second = FIRST.zeros(parameter), SECOND.zeros(parameter)
            self.state[parameter] = dict(zip(("first", "first_scale", "second", "second_scale"), (*first, *second)))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Moves every parameter that has a gradient."""
        for parameter in self._numbers:
            if parameter.grad is not None:
                self.step_one(parameter, self.found_inf)

    @torch.no_grad()
    def step_one(self, parameter: nn.Parameter, found_inf: Tensor | None = None) -> None:
        """Moves one parameter by its gradient."""
        group, state, number = self.param_groups[0], self.state[parameter], self._numbers[parameter]
        (beta1, beta2), rate = group["betas"], group["lr"]
        self.counts[number] += 1
        count = self.counts[number]
        generator = self._generator(parameter, number, count)
        finite = torch.ones((), device=parameter.device) if found_inf is None else (found_inf == 0).float()
        gradient = torch.where(finite > 0, parameter.grad.float(), 0)
        first = FIRST.read(state["first"], state["first_scale"], parameter).lerp_(gradient, finite * (1 - beta1))
        second = SECOND.read(state["second"], state["second_scale"], parameter)
        second.lerp_(gradient.square_(), finite * (1 - beta2))
        FIRST.write(first, state["first"], state["first_scale"], generator)
        SECOND.write(second, state["second"], state["second_scale"], generator)
        spread = second.div_(1 - beta2**count).sqrt_().add_(group["eps"])
        weights = parameter.float()
        change = first.div_(spread).mul_(rate / (1 - beta1**count)).add_(weights, alpha=rate * group["weight_decay"])
        moved = weights - change * finite
        if parameter.dtype == torch.bfloat16:
            moved = round_stochastically(moved, generator)
        parameter.copy_(moved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, without its cast of every state to the parameter's type."""
        for parameter, number in self._numbers.items():
            if number in state_dict["state"]:
                own = state_dict["state"][number]
                self.state[parameter] = {key: value.clone().to(parameter.device) for key, value in own.items()}

    def _generator(self, parameter: nn.Parameter, number: int, count: int) -> torch.Generator:
        counter = (number, self.site, count & 0xFFFFFFFF, 0)
        low, high, *_ = philox4x32(counter, (self.seed & 0xFFFFFFFF, (self.seed >> 32) & 0xFFFFFFFF))
        return self._generators[parameter.device].manual_seed((high << 31) ^ low)
