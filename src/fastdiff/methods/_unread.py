"""Refuses options that another option leaves without effect: a setting ignored in silence is a wrong result."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any


def refuse_unread(config: Any, names: Collection[str], where: str) -> None:
    """Refuses those of the dataclass's fields `names` that are not at their defaults.

    Args:
        config: the method's config.
        names: fields that nothing reads.
        where: completes `... has no effect`, e.g. `with the objective mse`.

    Raises:
        ValueError: naming them and what to do.
    """
    given = [
        field.name
        for field in dataclasses.fields(config)
        if field.name in names and getattr(config, field.name) != field.default
    ]
    if given:
        raise ValueError(
            f"{', '.join(given)} has no effect {where}: leave it out (in a recipe with stages, give it in the stage "
            "that reads it)"
        )
