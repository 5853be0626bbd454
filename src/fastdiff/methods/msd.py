"""MSD: multi-student diffusion distillation (Song et al. 2024, arXiv 2410.23274)."""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.methods.base import MethodInfo
from fastdiff.methods.dmd2 import DMD2, DMD2Config


@dataclass(frozen=True)
class MSDConfig(DMD2Config):
    """Four students are the paper's; each is trained as by DMD2, whose defaults stay.

    Args:
        students: how many parts the conditions are split into.
    """

    students: int = 4


class MSD(DMD2):
    r"""K students, each for one part of the conditions, Y = Y_1 + ... + Y_K; student f(c) serves condition c.

    Student k is distilled by DMD2 with a fake score (and discriminator) of its own, on conditions c in Y_k only:

        L_k = E_{c in Y_k} L_DMD2(G_k, fake_k; c).

    Nothing is shared but the frozen teacher, so one run trains one student: a recipe lists K of them as stages, or K
    machines take one each. The router f is deterministic, covers every condition and gives parts of equal size
    (`Router`). With one student nothing is split, and this is DMD2. Every other method of distribution
    matching or Fisher divergences that distils, `ladd` and `rcm` take `students`, too (`method: f_distill` with
    `students: 4`), and all of them but `disback` and `phased_dmd` the sizes below.

    A student may be a smaller full network, whose fake score, if full, is as small. It is first fitted to the teacher's
    scores by `score_matching` with the same sizes; `init_from` that run gives its weights to both.
    """

    info = MethodInfo(
        name="msd",
        title="Multi-student distillation (MSD)",
        family="distribution matching",
        paper="Multi-student Diffusion Distillation for Better One-step Generators",
        arxiv="2410.23274",
        needs="prompts",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = MSDConfig
    config: MSDConfig
