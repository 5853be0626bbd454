"""Pipeline families that can be distilled. A new family adds its file and one line here."""

from __future__ import annotations

from fastdiff.models.families.base import Family
from fastdiff.models.families.flux import Flux
from fastdiff.models.families.pixart_sigma import PixArtSigma
from fastdiff.models.families.qwen_image import QwenImage
from fastdiff.models.families.sana import Sana
from fastdiff.models.families.stable_diffusion import StableDiffusion
from fastdiff.models.families.stable_diffusion_3 import StableDiffusion3
from fastdiff.models.families.stable_diffusion_xl import StableDiffusionXL
from fastdiff.models.families.z_image import ZImage

FAMILIES: tuple[Family, ...] = (
    StableDiffusion(),
    StableDiffusionXL(),
    StableDiffusion3(),
    PixArtSigma(),
    Flux(),
    Sana(),
    QwenImage(),
    ZImage(),
)


def family_of(pipeline_class: str) -> Family:
    """The family that serves a diffusers pipeline class name.

    Raises:
        ValueError: if no family serves it; the message lists those that are served.
    """
    for family in FAMILIES:
        if pipeline_class in family.pipeline_classes:
            return family
    served = ", ".join(name for family in FAMILIES for name in family.pipeline_classes)
    raise ValueError(
        f"unsupported pipeline class {pipeline_class!r}: fastdiff distils {served}. "
        "For an image-to-image or inpainting variant, load the text-to-image pipeline of the same weights."
    )


__all__ = ["FAMILIES", "Family", "StableDiffusion", "StableDiffusion3", "StableDiffusionXL", "family_of"]
