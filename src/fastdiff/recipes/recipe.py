"""A recipe: defaults, overridden by a YAML file, overridden by flags; flat, with the same names in all three."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastdiff.recipes.declared import DeclaredMethod, Option, declared_methods, options_of
from fastdiff.recipes.errors import RecipeError
from fastdiff.recipes.options import ALIASES, REFUSED, SECRET
from fastdiff.recipes.translate import TRANSLATED, translate

DEFAULT_METHOD = "dmd2"
RECIPE_FILE = "recipe.yaml"
STAGE_KEYS = ("name", "method", "init_from", "teacher_from")
_EDGE = ("config", "method", "stages")
T = TypeVar("T")


@dataclass(frozen=True)
class Section:
    """Options that one dataclass declares."""

    title: str
    options: tuple[Option, ...]

    def names(self) -> list[str]:
        """The options' names."""
        return [option.name for option in self.options]


@dataclass(frozen=True)
class Recipe:
    """Everything about a run, resolved.

    Args:
        method: the method's name.
        values: every option with its value.
        given: the values that are not defaults of this method; what stages build on.
        stages: overrides of each stage, in order; empty for an ordinary run.
    """

    method: str
    values: Mapping[str, Any]
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    stages: tuple[Mapping[str, Any], ...] = ()

    def build(self, cls: type[T]) -> T:
        """An instance of the dataclass `cls` (settings, a method's config ...) from the values of its fields."""
        return cls(**{field.name: self.values[field.name] for field in dataclasses.fields(cls)})

    def changed(self, **values: Any) -> Recipe:
        """The recipe with some values replaced."""
        return dataclasses.replace(self, values={**self.values, **values})

    def to_dict(self) -> dict[str, Any]:
        """JSON and YAML values, defaults included unless stages follow; secrets are left out."""
        found = {name: self.values[name] for section in sections(self.method) for name in section.names()}
        if self.stages:
            found = {**self.given, "stages": [dict(stage) for stage in self.stages]}
        return {"method": self.method} | {name: _plain(found[name]) for name in found if name not in SECRET}

    def write(self, path: Path) -> None:
        """Writes YAML aside and renames it; `--config` reads it again."""
        import yaml

        aside = path.with_name(f".{path.name}.partial")
        aside.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        os.replace(aside, path)


def sections(method: str) -> tuple[Section, ...]:
    """All options of a run with this method.

    Raises:
        RecipeError: if there is no such method; the message names the nearest.
    """
    declared = declared_method(method)
    return (
        Section("teacher", options_of("recipes.options", "TeacherOptions")),
        Section("data", options_of("recipes.options", "DataOptions")),
        Section(f"method {method}", declared.options),
        Section("run", options_of("engine.settings", "Settings")),
        Section("hub", options_of("recipes.options", "HubOptions")),
    )


def declared_method(name: str) -> DeclaredMethod:
    """The declaration of a method, without importing it.

    Raises:
        RecipeError: if there is no such method; the message names the nearest.
    """
    known = {method.name: method for method in declared_methods()}
    if name not in known:
        raise RecipeError(f"unknown method {name!r}; known: {', '.join(known)}.{nearest(name, known)}")
    return known[name]


def resolve(flags: Mapping[str, Any], config: str | Path | None = None) -> Recipe:
    """Defaults < YAML < flags.

    Args:
        flags: what was given by name; the value None counts as given.
        config: a YAML file.

    Raises:
        RecipeError: unknown or refused keys, values of the wrong type, two names of one thing.
        FileNotFoundError: no such YAML file.
    """
    written = read_yaml(config) if config else {}
    where = str(config)
    stages = written.pop("stages", None) or ()
    method = str(flags.get("method") or written.get("method") or DEFAULT_METHOD)
    methods = {method} | {str(stage.get("method", method)) for stage in _stage_list(stages, where)}
    base = _canonical(written, methods, f" in {where}")
    given = _canonical(flags, methods, "")
    recipe = _resolved(method, base | given)
    merged = tuple(_check_stage(stage, method, where) | _of_flags(stage, given) for stage in stages)
    return dataclasses.replace(recipe, given=base | given, stages=merged)


def stage_recipe(recipe: Recipe, stage: Mapping[str, Any], **values: Any) -> Recipe:
    """The ordinary recipe of one stage: what the base was given, the stage's overrides, then `values`."""
    method = stage.get("method", recipe.method)
    own = {name: value for name, value in stage.items() if name not in STAGE_KEYS}
    known = {name for section in sections(method) for name in section.names()}
    base = {name: value for name, value in recipe.given.items() if name in known}
    return _resolved(method, base | _canonical(own, {method}, "") | values)


def run_folder_of(source: Path) -> Path:
    """The run folder of a checkpoint `run/checkpoints/step-N`, or of itself.

    Raises:
        FileNotFoundError: if there is no recipe.yaml where it should be.
    """
    for folder in (source, source.parent.parent):
        if (folder / RECIPE_FILE).is_file():
            return folder
    raise FileNotFoundError(
        f"{source} is neither a run folder nor a checkpoint of one: {RECIPE_FILE} is missing. Give a run's "
        "--output_dir, or checkpoints/step-N in it"
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError, RecipeError: no such file, or not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no recipe at {path}: give --config a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise RecipeError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecipeError(f"{path} must hold `key: value` lines, got {type(content).__name__}")
    return content


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?`, or nothing when no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_name(name: str, methods: Iterable[str], where: str) -> None:
    """Refuses names that no run with these methods knows.

    Raises:
        RecipeError: with the reason, or the nearest name.
    """
    if name in REFUSED:
        raise RecipeError(f"{name}{where} has no effect here: {REFUSED[name]}.")
    known = {name for method in methods for section in sections(method) for name in section.names()}
    if name in known or name in ALIASES or name in TRANSLATED:
        return
    owners = [method.name for method in declared_methods() if name in {option.name for option in method.options}]
    if owners:
        raise RecipeError(f"{name}{where} belongs to method {' or '.join(owners)}, this run's is {', '.join(methods)}")
    hint = nearest(name, [*known, *ALIASES, *TRANSLATED, *REFUSED, *_EDGE])
    raise RecipeError(f"unknown option {name!r}{where}.{hint} `fastdiff distill --help` lists all.")


def _canonical(raw: Mapping[str, Any], methods: Iterable[str], where: str) -> dict[str, Any]:
    """The same values under our own names and in our own units."""
    found: dict[str, Any] = {}
    sources: dict[str, str] = {}
    given = {name: value for name, value in raw.items() if name not in ("method", "config")}
    for name in given:
        check_name(name, methods, where)
    for name, value in translate(given).items():
        own = ALIASES.get(name, name)
        if own in found and found[own] != value:
            raise RecipeError(f"{sources[own]} and {name}{where} are two names of one thing; give one of them")
        found[own], sources[own] = value, name
    return found


def _resolved(method: str, given: Mapping[str, Any]) -> Recipe:
    values = {}
    for section in sections(method):
        for option in section.options:
            values[option.name] = option.read(given[option.name]) if option.name in given else option.default
    return Recipe(method, values)


def _stage_list(stages: Any, where: str) -> Iterable[Mapping[str, Any]]:
    if not isinstance(stages, list | tuple) or not all(isinstance(stage, dict) for stage in stages):
        raise RecipeError(f"stages in {where} must be a list of mappings, one a stage")
    return stages


def _check_stage(stage: Mapping[str, Any], method: str, where: str) -> dict[str, Any]:
    method = str(stage.get("method", method))
    for name in stage:
        if name not in STAGE_KEYS:
            check_name(name, {method}, f" in a stage of {where}")
    return dict(stage)


def _of_flags(stage: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What flags say about options that the stage would otherwise override."""
    return {name: given[own] for name in stage if (own := ALIASES.get(name, name)) in given and name != "init_from"}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
