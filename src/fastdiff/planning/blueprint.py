"""What a teacher is made of, read from configs alone: no weight is loaded and nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.models.embedded import EMBEDDED, EMBEDDED_FLOW, SHIPPED
from fastdiff.models.families import family_of

CONFIGS = Path(__file__).with_name("configs")
PUBLIC = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "stabilityai/stable-diffusion-2-1-base": "sd21",
    "stabilityai/stable-diffusion-2-base": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd35m",
    "black-forest-labs/FLUX.1-dev": "flux1dev",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart_sigma",
}
"""Public teachers whose configs ship with this package."""


@dataclass(frozen=True)
class Blueprint:
    """Configs of a pipeline's parts, as diffusers and transformers write them.

    Args:
        pipeline: class name of the pipeline.
        network, autoencoder, scheduler: configs with their `_class_name`.
        text_encoders: configs with their `architectures`, in the pipeline's order.
    """

    pipeline: str
    network: Mapping[str, Any]
    autoencoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    text_encoders: tuple[Mapping[str, Any], ...]


def blueprint_of(source: str, like: str | None = None) -> Blueprint:
    """The parts of a teacher.

    Args:
        source: `embedded`, `embedded-flow`, a pipeline folder (its configs suffice), or the Hub id of a known public teacher.
        like: plan as if the teacher were this one: the name of a shipped file in `configs`, or a folder.

    Raises:
        FileNotFoundError: if the configs are in none of these places.
    """
    wanted = like or PUBLIC.get(source, source)
    known = sorted(path.stem for path in CONFIGS.glob("*.json"))
    if wanted in known:
        return Blueprint(**json.loads((CONFIGS / f"{wanted}.json").read_text(encoding="utf-8")))
    if wanted == EMBEDDED_FLOW:
        return _embedded_flow()
    folder = SHIPPED.get(wanted, Path(wanted))
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the configs of teacher {wanted!r} are not at hand: give --like {'|'.join(known)}, or a pipeline folder "
            "with model_index.json and the parts' config.json (weights are not needed)"
        )
    return _of_folder(folder)


def _embedded_flow() -> Blueprint:
    """Its own network and scheduler among the embedded teacher's parts; one text encoder serves as two."""
    own, parts = SHIPPED[EMBEDDED_FLOW], SHIPPED[EMBEDDED]
    encoder = _read(parts / "text_encoder") | {"architectures": ["CLIPTextModelWithProjection"]}
    return Blueprint(
        pipeline="StableDiffusion3Pipeline",
        network=_read(own / "transformer"),
        autoencoder=_read(parts / "vae"),
        scheduler=_read(own / "scheduler", "scheduler_config.json"),
        text_encoders=(encoder, encoder),
    )


def _read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _of_folder(folder: Path) -> Blueprint:
    index = _read(folder, "model_index.json")
    encoders = sorted(name for name in index if name.startswith("text_encoder") and index[name][0])
    return Blueprint(
        pipeline=index["_class_name"],
        network=_read(folder / family_of(index["_class_name"]).network_name),
        autoencoder=_read(folder / "vae"),
        scheduler=_read(folder / "scheduler", "scheduler_config.json"),
        text_encoders=tuple(_read(folder / name) for name in encoders),
    )
