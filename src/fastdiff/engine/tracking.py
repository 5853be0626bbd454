"""Metrics to `logs/metrics.jsonl` always, and to the tracker of one's choice through accelerate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastdiff.engine.settings import Settings


class Tracker:
    """Context manager that logs on the main process only."""

    def __init__(self, settings: Settings, folder: Path, is_main: bool) -> None:
        self.settings = settings
        self.folder = folder / "logs"
        self.is_main = is_main
        self._trackers: list[Any] = []

    def __enter__(self) -> Tracker:
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
            self._trackers = _start(self.settings, self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_main:
            self._file.close()
            for tracker in self._trackers:
                tracker.finish()

    def log(self, values: dict[str, float], step: int) -> None:
        """Appends one line and forwards it."""
        if not self.is_main:
            return
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(values, step=step)


def tracker_class(name: str) -> Any:
    """accelerate's tracker of that name; None for `none`.

    Raises:
        ValueError: if it is unknown or not installed.
    """
    if name == "none":
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    if name not in available:
        raise ValueError(f"report_to {name!r} is unknown or not installed; available: {', '.join(available)}, none")
    return LOGGER_TYPE_TO_CLASS[name]


def _start(settings: Settings, folder: Path) -> list[Any]:
    kind = tracker_class(settings.report_to)
    if kind is None:
        return []
    project = settings.tracker_project_name
    tracker = kind(project, folder) if kind.requires_logging_directory else kind(project)
    tracker.start()
    return [tracker]
