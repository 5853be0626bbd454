"""What a run can be told, read from the source of the dataclasses that declare it.

Importing a method costs seconds, since it imports torch; `--help`, flags and YAML keys need names, types, defaults and
sentences only. They are taken from the same declarations by parsing, so that nothing is written down twice.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdiff.recipes.errors import RecipeError

PACKAGE = Path(__file__).resolve().parents[1]
REQUIRED = "required"
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_WANTED = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}


@dataclass(frozen=True)
class ValueType:
    """The type of an option: `many` is None for one value, 0 for any number of values, else how many."""

    kind: type = str
    optional: bool = False
    choices: tuple[str, ...] = ()
    many: int | None = None


@dataclass(frozen=True)
class Option:
    """One field of a dataclass: its name is the YAML key and the flag."""

    name: str
    type: ValueType
    default: Any
    help: str

    def read(self, value: Any) -> Any:
        """A YAML, Python or command-line value as the declared type.

        Raises:
            RecipeError: naming the option, what was given and what is expected.
        """
        if self.type.optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
            return None
        if self.type.many is None:
            return self._one(value)
        values = list(value) if isinstance(value, list | tuple) else [value]
        if self.type.kind is not str:
            values = [part for item in values for part in (item.split(",") if isinstance(item, str) else [item])]
        if self.type.many and len(values) != self.type.many:
            raise RecipeError(f"{self.name} takes {self.type.many} values, got {len(values)}: {values}")
        return tuple(self._one(item) for item in values)

    def _one(self, value: Any) -> Any:
        try:
            found = _READERS[self.type.kind](value)
        except (TypeError, ValueError):
            raise RecipeError(f"{self.name} must be {_WANTED[self.type.kind]}, got {value!r}") from None
        if self.type.choices and found not in self.type.choices:
            raise RecipeError(f"{self.name} must be one of {', '.join(self.type.choices)}, got {value!r}")
        return found


@dataclass(frozen=True)
class DeclaredMethod:
    """A method as `methods/__init__.py` lists it: the fields of its `MethodInfo`, and its config's options."""

    info: dict[str, Any]
    options: tuple[Option, ...]

    @property
    def name(self) -> str:
        return self.info["name"]


def options_of(module: str, name: str) -> tuple[Option, ...]:
    """The fields of the dataclass `fastdiff.<module>.<name>`, those of its bases first."""
    return tuple(_options(_Module.read(f"fastdiff.{module}"), name))


@functools.cache
def declared_methods() -> tuple[DeclaredMethod, ...]:
    """All methods in the order of `METHODS`."""
    listing = _Module.read("fastdiff.methods")
    defaults = {option.name: option.default for option in options_of("methods.base", "MethodInfo")}
    return tuple(_method(listing, element.id, defaults) for element in listing.assigned["METHODS"].elts)


def _method(listing: _Module, class_name: str, defaults: dict[str, Any]) -> DeclaredMethod:
    module, name = listing.locate(class_name)
    body = {
        target.id: statement.value
        for statement in module.classes[name].body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    info = {keyword.arg: ast.literal_eval(keyword.value) for keyword in body["info"].keywords}
    return DeclaredMethod(defaults | info, tuple(_options(module, body["Config"].id)))


class _Module:
    """A parsed source file of this package: its classes, constants and where imported names come from."""

    def __init__(self, tree: ast.Module) -> None:
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self.assigned: dict[str, Any] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        for node in tree.body:
            if isinstance(node, ast.Assign):
                self.assigned |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self.assigned[node.target.id] = node.value
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastdiff"):
                self.imported |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}

    @classmethod
    @functools.cache
    def read(cls, module: str) -> _Module:
        path = PACKAGE.joinpath(*module.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return cls(ast.parse(path.read_text(encoding="utf-8")))

    def locate(self, name: str) -> tuple[_Module, str]:
        """The module that defines `name`, and its name there."""
        if name in self.classes or name in self.assigned:
            return self, name
        module, original = self.imported[name]
        return _Module.read(module).locate(original)


def _options(module: _Module, name: str) -> Iterator[Option]:
    module, name = module.locate(name)
    node = module.classes[name]
    found: dict[str, Option] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and (base.id in module.classes or base.id in module.imported):
            found |= {option.name: option for option in _options(module, base.id)}
    sentences = _argument_help(ast.get_docstring(node) or "")
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
            option = _option(module, statement)
            found[option.name] = replace(option, help=option.help or sentences.get(option.name, ""))
    for option in found.values():
        yield option if option.help else replace(option, help=sentences.get(option.name, ""))


def _option(module: _Module, statement: ast.AnnAssign) -> Option:
    value, text = statement.value, ""
    if isinstance(value, ast.Call):  # setting(default, help)
        value, text = value.args[0], ast.literal_eval(value.args[1])
    if isinstance(value, ast.Name):
        owner, name = module.locate(value.id)
        value = owner.assigned[name]
    default = REQUIRED if value is None else ast.literal_eval(value)
    return Option(statement.target.id, _type(module, statement.annotation), default, text)


def _type(module: _Module, node: ast.expr) -> ValueType:
    if isinstance(node, ast.BinOp):
        sides = [side for side in (node.left, node.right) if ast.unparse(side) != "None"]
        return replace(_type(module, sides[0]), optional=len(sides) == 1)
    if isinstance(node, ast.Subscript):
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            return ValueType(choices=tuple(ast.literal_eval(element) for element in inside))
        ellipsis = ast.unparse(inside[-1]) == "..."
        return replace(_type(module, inside[0]), many=0 if ellipsis else len(inside))
    kinds = {kind.__name__: kind for kind in _WANTED}
    if node.id in kinds:
        return ValueType(kinds[node.id])
    owner, name = module.locate(node.id)
    return _type(owner, owner.assigned[name])


def _argument_help(docstring: str) -> dict[str, str]:
    """The entries of a docstring's `Args:` section; `a, b: text` documents both."""
    sentences: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in inspect.cleandoc(docstring).splitlines():
        if not line.startswith(" "):
            inside = line.strip() == "Args:" or (inside and not line.strip())
            continue
        entry = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if inside and entry:
            names = entry[1].split(", ")
            sentences |= {name: entry[2].strip() for name in names}
        elif inside:
            sentences |= {name: f"{sentences[name]} {line.strip()}" for name in names}
    return sentences


def _read_bool(value: Any) -> bool:
    text = str(value).lower()
    if text not in (*_TRUE, *_FALSE):
        raise ValueError(text)
    return text in _TRUE


def _read_int(value: Any) -> int:
    number = _read_float(value)
    if number != int(number):
        raise ValueError(number)
    return int(value) if isinstance(value, int) else int(number)


def _read_float(value: Any) -> float:
    # YAML 1.1 takes 1e-5 for text, so text is read as a number wherever a number is declared.
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError(value)
    return float(value)


def _read_str(value: Any) -> str:
    if isinstance(value, list | tuple | dict | bool) or value is None:
        raise TypeError(value)
    return str(value)


_READERS = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str}
