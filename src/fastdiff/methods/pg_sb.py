"""PG-SB: SwiftBrush under random guidance, of SNOOPI (Nguyen et al. 2024, arXiv 2412.02687)."""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.methods.base import MethodInfo
from fastdiff.methods.swiftbrush import SwiftBrush, SwiftBrushConfig


@dataclass(frozen=True)
class PGSBConfig(SwiftBrushConfig):
    """Defaults are those of the paper's SD1.5 and SD2.1 runs, but for its image-text term (`clip_weight` 0.1), which needs
    a scorer; it takes (0.5, 3) for PixArt-alpha.

    Args:
        guidance_range: w of both scores is drawn from this range for each sample. The paper does not say whether it
            draws for a sample or for a batch.
        guidance_scale: of both scores where there is no range.
    """

    guidance_scale: float = 1.0
    guidance_range: tuple[float, float] | None = (0.5, 4.0)


class PGSB(SwiftBrush):
    r"""SwiftBrush with w ~ U(guidance_range), one draw for both scores of a sample ("proper guidance").

    A fixed w suits one teacher and breaks another; a range that reaches below 1 mixes in scores of the plain and of the
    unconditional law. The rest is SwiftBrush, with its clamped image-text term as in the paper at `clip_weight` 0.1.
    """

    info = MethodInfo(
        name="pg_sb",
        title="PG-SB (SNOOPI)",
        family="distribution matching",
        paper="SNOOPI: Supercharged One-step Diffusion Distillation with Proper Guidance",
        arxiv="2412.02687",
        needs="prompts",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = PGSBConfig
    config: PGSBConfig
