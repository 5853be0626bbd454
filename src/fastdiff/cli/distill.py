"""`fastdiff distill`: trains, exports and loads back a student."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

from fastdiff.cli.parsing import Parser, add_options, show_progress_only
from fastdiff.recipes.options import ALIASES
from fastdiff.recipes.recipe import DEFAULT_METHOD, check_name, read_yaml, sections
from fastdiff.recipes.translate import TRANSLATED

USAGE = "fastdiff distill [--config recipe.yaml] [--method NAME] --teacher T --data D [options]"
HELP = "distil a teacher into a few-step student, and export it"
DESCRIPTION = """Distils a teacher. Options come from defaults, then --config, then flags; names are the same everywhere.
Options of another method: fastdiff distill --method NAME --help."""


def main(arguments: list[str]) -> int:
    """Runs the verb."""
    edge = Parser("distill", DESCRIPTION, add_help=False)
    _add_edge(edge)
    known, _ = edge.parse_known_args(arguments)
    written = read_yaml(known.config) if known.config else {}
    method = str(known.method or written.get("method") or DEFAULT_METHOD)
    stages = written.get("stages") or ()
    methods = [method, *(str(s.get("method", method)) for s in stages if isinstance(s, dict))]
    flags = _parse(list(dict.fromkeys(methods)), arguments)
    config = flags.pop("config")
    given = {name: value for name, value in flags.items() if name != "method" or value is not None}

    from fastdiff.recipes.recipe import resolve

    resolve(given, config)  # what is wrong with the words is said before torch is imported
    show_progress_only()
    from fastdiff.engine.distributed import leave_together
    from fastdiff.recipes.run import distill

    student = distill(config=config, **given)
    leave_together()
    if os.environ.get("RANK", "0") != "0":
        return 0
    steps, guidance = student.call["num_inference_steps"], student.call["guidance_scale"]
    error = student.record.load_back["max_error"]
    print(f"student: {student.folder} ({student.kind}, steps {steps}, guidance_scale {guidance:g})")
    print(f"loaded back in stock diffusers and compared: error {error:.1e}")
    print(f'try it:  fastdiff sample {student.folder} --prompt "..."')
    return 0


def _parse(methods: Iterable[str], arguments: list[str]) -> dict[str, object]:
    parser = Parser("distill", DESCRIPTION, usage=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_edge(parser)
    added: set[str] = set()
    for method in methods:
        for section in sections(method):
            new = [option for option in section.options if option.name not in added]
            added |= {option.name for option in new}
            if new:
                add_options(parser.add_argument_group(section.title), new, ALIASES)
    others = parser.add_argument_group("as in diffusers' scripts")
    add_options(others, TRANSLATED.values(), {})
    flags, rest = parser.parse_known_args(arguments)
    for argument in rest:
        if argument.startswith("--"):
            check_name(argument[2:].split("=")[0], methods, "")
    if rest:
        parser.error(f"argument {rest[0]!r} belongs to no flag")
    return vars(flags)


def _add_edge(parser: Parser) -> None:
    parser.add_argument("--config", metavar="YAML", help="a recipe; flags override it")
    parser.add_argument("--method", metavar="NAME", help="see `fastdiff methods` [dmd2]")
