"""Trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastdiff.methods.base import MethodInfo
from fastdiff.methods.ctm import CTM, CTMConfig


@dataclass(frozen=True)
class TCDConfig(CTMConfig):
    """As CTM; `eta` is the paper's for four steps.

    Args:
        eta: the sampler jumps to (1 - eta) of the next time and adds noise up to it (gamma in the paper); pipelines
            must be called with it, since TCDScheduler's config does not hold it. 0 is served by DDIM.
    """

    eta: float = 0.3


class TCD(CTM):
    r"""Trajectory consistency distillation: CTM's jumps by a network that is not told where they end.

    Any clean prediction defines a jump to every s, so the optimum is a compromise between ends; in return the student
    is an ordinary one: it ships as a LoRA and runs with stock TCDScheduler (eta > 0) or DDIMScheduler (eta = 0).
    """

    info = MethodInfo(
        name="tcd",
        title="Trajectory consistency distillation (TCD)",
        family="trajectory",
        paper="Trajectory Consistency Distillation",
        arxiv="2402.19159",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = TCDConfig
    config: TCDConfig
    tells_end: ClassVar[bool] = False
