"""Grids of table indices as explicit (from, to) pairs, so that training and sampling walk the same steps."""

from __future__ import annotations

from .schedules import CLEAN_INDEX, Terminal

__all__ = ["lcm_grid", "trailing_grid"]


def trailing_grid(n: int, T: int = 1000, terminal: Terminal = Terminal.CLEAN) -> tuple[tuple[int, int], ...]:
    """The ``n`` steps of diffusers' "trailing" spacing, noisiest first: T=1000, n=4 -> (999,749) ... (249, end).

    Each ``to`` is the next ``from``; schedulers subtract ``T // n`` instead, which differs by an index where ``n``
    does not divide ``T``. The last ``to`` is :data:`CLEAN_INDEX` or 0 by ``terminal``.

    Raises:
        ValueError: unless 1 <= n <= T.
    """
    _check(n, T)
    starts = [round(T - j * T / n) - 1 for j in range(n)]
    return tuple(zip(starts, [*starts[1:], _end(terminal)], strict=True))


def lcm_grid(n: int = 50, T: int = 1000, terminal: Terminal = Terminal.INDEX0) -> tuple[tuple[int, int], ...]:
    """The ``n`` solver steps of latent consistency distillation, cleanest first: (19,0), (39,19), ... (999,979).

    The published training ends at index 0, which is not clean (arXiv 2310.04378).

    Raises:
        ValueError: unless ``n`` divides ``T``.
    """
    _check(n, T)
    if T % n:
        raise ValueError(
            f"{n} solver steps do not divide {T} training timesteps: give a divisor (num_ddim_timesteps), such as 50 for 1000"
        )
    starts = [T // n * j - 1 for j in range(1, n + 1)]
    if starts[0] <= 0 and terminal is Terminal.INDEX0:
        raise ValueError(
            f"a grid of all {T} indices begins at index 0, so its last step cannot end there: give at most {T // 2} steps"
        )
    return tuple(zip(starts, [_end(terminal), *starts[:-1]], strict=True))


def _end(terminal: Terminal) -> int:
    return CLEAN_INDEX if terminal is Terminal.CLEAN else 0


def _check(n: int, T: int) -> None:
    if not 1 <= n <= T:
        raise ValueError(f"{n} steps over {T} training timesteps: give between 1 and {T} steps")
