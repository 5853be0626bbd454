"""The model card (README.md) of a student folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.export import card_text
from fastdiff.export.experts import EXPERTS_FILE
from fastdiff.export.lora import DIFFUSERS_FILE, KOHYA_FILE
from fastdiff.export.student import StudentRecord
from fastdiff.models.absent import absent_parts
from fastdiff.models.embedded import SHIPPED

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

CARD_FILE = "README.md"
GRID_FILE = "grid.png"
_METRIC_TYPES = ("fid", "fid_to_teacher", "kid", "clip", "retrieval", "precision", "recall", "diversity")
_FAMILY_TAGS = {
    "StableDiffusionPipeline": ("stable-diffusion", "stable-diffusion-diffusers"),
    "StableDiffusionXLPipeline": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
}


@dataclass(frozen=True)
class License:
    """A licence as model cards name it; `name` and `link` go with the identifier "other"."""

    identifier: str
    name: str | None = None
    link: str | None = None

    def __post_init__(self) -> None:
        if self.identifier == "other" and not (self.name and self.link):
            raise ValueError("licence 'other' needs license_name and license_link, so that users can read its terms.")


def teacher_license(source: str | Path, revision: str | None = None, token: str | None = None) -> License | None:
    """The licence in the teacher's own model card; None when there is no card, or no whole licence in it.

    Args:
        source: a pipeline folder (its README.md is read), the name of a shipped teacher, or a Hub id (its card, from
            the cache when offline).
        revision: of the Hub repository.
        token: for private teachers.
    """
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    folder = SHIPPED.get(str(source), Path(source))
    path = folder / CARD_FILE
    if not path.is_file():
        if folder.exists() or str(source) in SHIPPED:
            return None
        try:
            path = Path(hf_hub_download(str(source), CARD_FILE, revision=revision, token=token))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
            return None
    data = ModelCard.load(path, ignore_metadata_errors=True).data
    link = data.license_link
    if link and "://" not in link and not folder.exists():
        # A file beside the teacher's card is not beside the student's.
        link = f"https://huggingface.co/{source}/blob/{revision or 'main'}/{link}"
    if not data.license or (data.license == "other" and not (data.license_name and link)):
        return None
    return License(data.license, data.license_name, link)


def write_card(
    folder: str | Path,
    record: StudentRecord,
    pipeline_class: str,
    license: License | None,
    *,
    repo_id: str = "",
    datasets: Sequence[str] = (),
    prompt: str = "a photo of a cat",
) -> Path:
    """Writes README.md for the files that are in `folder`; the sample grid is shown if `grid.png` is there.

    Args:
        folder: the student folder.
        record: what is known of the student; its metrics become the table and the card's model-index.
        pipeline_class: class name of the teacher's pipeline, for tags and snippets.
        license: of the student, normally the teacher's; None leaves it out, and `push_to_hub` then refuses.
        repo_id: what the snippets load; the folder's name by default.
        datasets: Hub ids of training data.
        prompt: of the snippets.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    from diffusers.utils.hub_utils import populate_model_card
    from huggingface_hub import ModelCard

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; export the student before its card.")
    facts = card_text.Facts(
        record=record,
        repo_id=repo_id or folder.name,
        pipeline_class=pipeline_class,
        license=license.name or license.identifier if license else None,
        license_link=license.link if license else None,
        full=(folder / "model_index.json").is_file(),
        lora=(folder / DIFFUSERS_FILE).is_file(),
        kohya=(folder / KOHYA_FILE).is_file(),
        experts=(folder / EXPERTS_FILE).is_file(),
        grid=GRID_FILE if (folder / GRID_FILE).is_file() else None,
        datasets=tuple(datasets),
        prompt=prompt,
        saved_scheduler=_saved_scheduler(folder),
        absent=tuple(absent_parts(folder)),
    )
    data = _card_data(facts, license)
    card = populate_model_card(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text.body(facts)}"), _tags(facts))
    path = folder / CARD_FILE
    aside = folder / f".{CARD_FILE}.partial"
    card.save(aside)
    os.replace(aside, path)
    return path


def _card_data(facts: card_text.Facts, license: License | None) -> ModelCardData:
    from huggingface_hub import ModelCardData

    results = _eval_results(facts.record.metrics)
    named = license is not None and license.identifier == "other"
    fields = {
        "base_model": facts.base_model,
        "base_model_relation": ("adapter" if facts.record.kind == "lora" else "finetune")
        if facts.base_model
        else None,
        "license": license.identifier if license else None,
        "license_name": license.name if named else None,
        "license_link": license.link if named else None,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "datasets": list(facts.datasets) or None,
        "eval_results": results or None,
        "model_name": facts.repo_id.rsplit("/", 1)[-1] if results else None,
        "widget": [{"text": facts.prompt, "output": {"url": facts.grid}}] if facts.grid else None,
    }
    return ModelCardData(**{key: value for key, value in fields.items() if value is not None})


def _tags(facts: card_text.Facts) -> list[str]:
    tags = [
        *_FAMILY_TAGS.get(facts.pipeline_class, ()),
        "text-to-image",
        "diffusers",
        "diffusers-training",
        "fastdiff",
    ]
    tags += ["few-step", "distillation", facts.record.method]
    return tags + (["lora", "template:sd-lora"] if facts.lora else [])


def _eval_results(metrics: Mapping[str, Any] | None) -> list[EvalResult]:
    """The student's numbers for the card's model-index, each with its protocol."""
    from huggingface_hub import EvalResult

    if not metrics:
        return []
    protocol = metrics["protocol"]
    row = next((row for row in metrics["rows"] if row["name"] == "student"), None)
    if row is None:
        return []
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type=protocol,
            dataset_name=protocol,
            metric_type=kind,
            metric_name=f"{card_text.METRICS[kind]} ({protocol})",
            metric_value=row[kind],
            metric_args={key: row.get(key) for key in ("steps", "network_calls", "guidance_scale", "solver")},
        )
        for kind in _METRIC_TYPES
        if row.get(kind) is not None
    ]


def _saved_scheduler(folder: Path) -> str | None:
    path = folder / "scheduler" / "scheduler_config.json"
    return json.loads(path.read_text(encoding="utf-8"))["_class_name"] if path.is_file() else None
