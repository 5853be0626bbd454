"""Precision and broadcasting rules shared by everything on this floor."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DeviceTable", "as_times", "broadcast_to", "compute_dtype"]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The precision a computation on ``tensors`` runs in: float64 if any of them is, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def as_times(t: Tensor | float, like: Tensor | None = None) -> Tensor:
    """Times as a floating tensor of at least float32.

    With ``like``, the precision is that of a computation on ``like`` and a plain number lands on its device (by a
    fill, so without waiting for the device). Integer tensors become float32, or float64 beside a float64 ``like``.
    """
    if not isinstance(t, Tensor):
        if like is None:
            return torch.tensor(t, dtype=torch.float64)
        return torch.full((), float(t), dtype=compute_dtype(like), device=like.device)
    return t.to(compute_dtype(t) if like is None else compute_dtype(like))


def broadcast_to(coefficient: Tensor, x: Tensor) -> Tensor:
    """Append singleton axes so that ``coefficient`` multiplies ``x``.

    The axes of the coefficient are the *leading* axes of ``x``: (B,) is per sample, (B, F) is per frame of a
    (B, F, C, H, W) tensor, (B, 1, F) is per frame of a (B, C, F, H, W) tensor, and a scalar stays a scalar.

    Raises:
        ValueError: if the axes do not match the leading axes of ``x`` (sizes equal, or 1).
    """
    shape = coefficient.shape
    matches = len(shape) <= x.dim() and all(n in (1, m) for n, m in zip(shape, x.shape))
    if not matches:
        raise ValueError(
            f"times or weights of shape {tuple(shape)} do not line up with a tensor of shape {tuple(x.shape)}: give a "
            "scalar, one value a sample (B,), or one a frame ((B, F) or (B, 1, F)), matching the leading axes"
        )
    return coefficient.reshape(*shape, *(1,) * (x.dim() - len(shape)))


class DeviceTable:
    """A constant kept on the host, copied once to each device and precision it is used in."""

    def __init__(self, host: Tensor) -> None:
        self.host = host.detach().cpu()
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """The constant on ``device``, in ``dtype`` (its own by default)."""
        key = (device, self.host.dtype if dtype is None else dtype)
        if key not in self._copies:
            with torch.inference_mode(False):  # a copy first made while sampling must serve training later
                self._copies[key] = self.host.to(device=key[0], dtype=key[1])
        return self._copies[key]

    def like(self, tensor: Tensor) -> Tensor:
        """The constant on the device of ``tensor``, in the precision that ``tensor`` is computed in."""
        return self.on(tensor.device, compute_dtype(tensor))
