"""What flags and help are made of must be what the real dataclasses say."""

import dataclasses
import types
import typing

import pytest

from fastdiff.engine import Settings
from fastdiff.methods import METHODS, MethodInfo
from fastdiff.recipes import declared_methods, sections
from fastdiff.recipes.declared import REQUIRED, ValueType, options_of
from fastdiff.recipes.options import DataOptions, HubOptions, TeacherOptions

DECLARED = [
    (Settings, options_of("engine.settings", "Settings")),
    (TeacherOptions, options_of("recipes.options", "TeacherOptions")),
    (DataOptions, options_of("recipes.options", "DataOptions")),
    (HubOptions, options_of("recipes.options", "HubOptions")),
    *((method.Config, declared.options) for method, declared in zip(METHODS, declared_methods(), strict=True)),
]


def value_type(hint) -> ValueType:
    """The same as `declared` finds, from the evaluated annotation."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [arm for arm in typing.get_args(hint) if arm is not types.NoneType]
        return dataclasses.replace(value_type(inner[0]), optional=True)
    if typing.get_origin(hint) is typing.Literal:
        return ValueType(choices=typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        arms = typing.get_args(hint)
        return dataclasses.replace(value_type(arms[0]), many=0 if arms[-1] is Ellipsis else len(arms))
    return ValueType(hint)


@pytest.mark.parametrize(("cls", "options"), DECLARED, ids=lambda value: getattr(value, "__name__", ""))
def test_options_are_the_fields(cls, options):
    hints = typing.get_type_hints(cls)
    real = {
        field.name: (
            value_type(hints[field.name]),
            REQUIRED if field.default is dataclasses.MISSING else field.default,
        )
        for field in dataclasses.fields(cls)
    }
    assert {option.name: (option.type, option.default) for option in options} == real


@pytest.mark.parametrize(("cls", "options"), DECLARED, ids=lambda value: getattr(value, "__name__", ""))
def test_every_option_has_a_sentence(cls, options):
    assert [option.name for option in options if not option.help] == []


def test_methods_are_the_listed_classes():
    names = [field.name for field in dataclasses.fields(MethodInfo)]
    for method, declared in zip(METHODS, declared_methods(), strict=True):
        assert list(declared.info) == names
        assert declared.info == {name: getattr(method.info, name) for name in names}


@pytest.mark.parametrize("method", [method.info.name for method in METHODS])
def test_no_name_is_declared_twice(method):
    names = [option.name for section in sections(method) for option in section.options]
    assert len(names) == len(set(names))
