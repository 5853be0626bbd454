"""Modules that stand where a peer imports something the comparison has no use for, e.g. its tracker."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock


class Silent(types.ModuleType):
    """Has every attribute; calling one does nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


def open_sources(folder: Path, silent: tuple[str, ...]) -> None:
    """Makes a peer's sources importable, with some of what they import silent and the rest from `site` beside them."""
    if str(folder) in sys.path:
        return
    sys.path.insert(0, str(folder))
    sys.path.append(str(folder.parent / "site"))
    for name in silent:
        sys.modules[name] = Silent(name)
