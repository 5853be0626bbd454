"""Argument parsing shared by the verbs: errors as exceptions with the nearest name, flags from declared options."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from fastdiff.recipes.declared import REQUIRED, Option
from fastdiff.recipes.errors import RecipeError
from fastdiff.recipes.recipe import nearest


class Parser(argparse.ArgumentParser):
    """Like argparse's, but bad input is a RecipeError, so that every error leaves through one door."""

    def __init__(self, verb: str, description: str, **settings) -> None:
        super().__init__(f"fastdiff {verb}", description=description, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}; see `{self.prog} --help`")

    def parse_all(self, arguments: list[str]) -> argparse.Namespace:
        """Parses, and refuses what is left over with the nearest flag."""
        flags, rest = self.parse_known_args(arguments)
        if rest:
            known = [flag for action in self._actions for flag in action.option_strings]
            raise RecipeError(f"unknown argument {rest[0]!r}.{nearest(rest[0], known)} See `{self.prog} --help`")
        return flags


def add_options(group: argparse._ArgumentGroup | Parser, options: Iterable[Option], aliases: dict[str, str]) -> None:
    """Adds a flag for each option, and hidden ones for its other names; values stay text for `Option.read`."""
    for option in options:
        names = [alias for alias, own in aliases.items() if own == option.name]
        also = f" (also --{', --'.join(names)})" if names else ""
        shape = _shape(option)
        text = f"{option.help}{also}{_default(option)}".replace("%", "%%")
        group.add_argument(f"--{option.name}", help=text, default=argparse.SUPPRESS, **shape)
        for name in names:
            group.add_argument(f"--{name}", help=argparse.SUPPRESS, default=argparse.SUPPRESS, **shape)


def read_options(flags: Mapping[str, Any], options: Iterable[Option], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The value of each option, under whichever of its names it was given, or its default."""
    values = {}
    for option in options:
        names = [option.name, *(alias for alias, own in aliases.items() if own == option.name)]
        given = [flags[name] for name in names if name in flags]
        values[option.name] = option.read(given[-1]) if given else option.default
    return values


def show_progress_only() -> None:
    """Our own messages on stderr; of the libraries only errors, and none of their loading bars."""
    import warnings

    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("fastdiff").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _shape(option: Option) -> dict:
    if option.type.kind is bool:
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    if option.type.many is not None:
        return {"nargs": "+", "metavar": option.type.kind.__name__.upper()}
    if option.type.choices:
        return {"metavar": "|".join(option.type.choices)}
    return {"metavar": option.type.kind.__name__.upper()}


def _default(option: Option) -> str:
    if option.default is None or option.default is REQUIRED or option.default == ():
        return ""
    shown = " ".join(map(str, option.default)) if isinstance(option.default, tuple) else str(option.default)
    return f" [{shown.lower() if option.type.kind is bool else shown}]"
