"""Options of diffusers' scripts that say the same thing in other units; understood at the edge, unknown inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdiff.recipes.declared import Option, ValueType
from fastdiff.recipes.errors import RecipeError

TRANSLATED = {
    "w_min": Option("w_min", ValueType(float), None, "least guidance of LCM's scripts, where 0 means none: w - 1"),
    "w_max": Option("w_max", ValueType(float), None, "largest guidance of LCM's scripts, where 0 means none: w - 1"),
    "use_ema": Option("use_ema", ValueType(bool), None, "average the student with ema_decay 0.9999 if none is given"),
}
"""Names that have no field of their own."""

EMA_DECAY = 0.9999
"""The decay diffusers' text-to-image scripts use."""


def translate(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces `w_min`, `w_max` and `use_ema`, and splits `lora_target_modules` at commas.

    Raises:
        RecipeError: if only one of `w_min`, `w_max` is given, or they meet `guidance_range`.
    """
    values = {name: value for name, value in raw.items() if name not in TRANSLATED}
    bounds = [TRANSLATED[name].read(raw[name]) for name in ("w_min", "w_max") if name in raw]
    if bounds:
        if len(bounds) == 1 or "guidance_range" in raw:
            raise RecipeError("give both w_min and w_max, or guidance_range = (w_min + 1, w_max + 1) alone")
        values["guidance_range"] = tuple(bound + 1 for bound in bounds)
    if "use_ema" in raw and TRANSLATED["use_ema"].read(raw["use_ema"]):
        values.setdefault("ema_decay", EMA_DECAY)
    targets = values.get("lora_target_modules")
    if isinstance(targets, str | list | tuple):
        values["lora_target_modules"] = [
            name.strip() for item in ([targets] if isinstance(targets, str) else targets) for name in item.split(",")
        ]
    return values
