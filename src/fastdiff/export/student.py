"""`fastdiff.json`: what a student folder is, in a form that programs read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from fastdiff.engine.files import write_json
from fastdiff.models.sampler import SamplerSpec

RECORD_FILE = "fastdiff.json"
FORMAT = 1
_PACKAGES = ("fastdiff-diffusers", "torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class StudentRecord:
    """Where a student comes from and how it is used.

    Args:
        method: name of the distillation method.
        kind: "lora" or "full".
        teacher: source, revision and fingerprint, as `Teacher.identity()` gives them.
        sampler: the trained sampler.
        recipe: the resolved recipe.
        metrics: content of a report's metrics.json ({"protocol", "rows"}), or None when nothing was measured.
        load_back: content of `LoadBackReport.to_dict()`, or None.
        versions: package versions of the run.
        effort: what the run cost: steps, seconds, network passes, peak memory.
    """

    method: str
    kind: Literal["lora", "full"]
    teacher: Mapping[str, Any]
    sampler: SamplerSpec
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] | None = None
    load_back: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())
    effort: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON content of `fastdiff.json`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"format": FORMAT} | values | {"sampler": self.sampler.to_dict()}


def package_versions() -> dict[str, str]:
    """Installed versions of what a student depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_record(folder: str | Path, record: StudentRecord) -> Path:
    """Writes `fastdiff.json` into an existing folder, whole or not at all."""
    path = Path(folder) / RECORD_FILE
    write_json(path, record.to_dict())
    return path


def read_record(folder: str | Path) -> StudentRecord:
    """Reads `fastdiff.json`.

    Raises:
        FileNotFoundError: if the folder is not a student of this project.
        ValueError: if the file is damaged or written by a later version.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RECORD_FILE}: it is not a student folder written by fastdiff.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.pop("format")
        if found > FORMAT:
            raise ValueError(f"it has format {found} and this version reads up to {FORMAT}; update fastdiff")
        return StudentRecord(**{**values, "sampler": SamplerSpec.from_dict(values["sampler"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
