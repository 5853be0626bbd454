"""Importing the libraries of the optional extra ``data``."""

import importlib
from types import ModuleType


def require(module: str, purpose: str) -> ModuleType:
    """Imports `module`, or raises an ImportError that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs the package {module!r}, which is not installed: pip install 'fastdiff-diffusers[data]'"
        ) from error
