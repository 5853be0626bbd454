"""The command `fastdiff <verb>`. No module here imports torch before a verb starts to work."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastdiff import __version__
from fastdiff.cli import bench, cache, data, distill, env, evaluate, export, methods, pairs, plan, sample
from fastdiff.recipes.errors import RunInterrupted
from fastdiff.recipes.recipe import nearest

USAGE, FAILURE = 2, 1
_SIGNALS = {"SIGINT": 130, "SIGTERM": 143}


@dataclass(frozen=True)
class Verb:
    """One thing the command can do; `main` gets the arguments after the verb and returns the exit code."""

    name: str
    help: str
    main: Callable[[list[str]], int]


VERBS = tuple(
    Verb(module.__name__.rsplit(".", 1)[1], module.HELP, module.main)
    for module in (distill, plan, evaluate, sample, export, cache, pairs, data, methods, bench, env)
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        0; 2 for what the user can mend (one line on stderr); 1 when a run failed; 130 or 143 after a signal, when the
        run can be resumed. With FASTDIFF_DEBUG=1 errors are raised with their traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0 if given else USAGE
    if given[0] == "--version":
        print(__version__)
        return 0
    verb = next((verb for verb in VERBS if verb.name == given[0]), None)
    if verb is None:
        names = [verb.name for verb in VERBS]
        return _complain(f"unknown verb {given[0]!r}; known: {', '.join(names)}.{nearest(given[0], names)}", USAGE)
    try:
        return verb.main(given[1:])
    except SystemExit as stop:  # argparse: after --help
        return stop.code if isinstance(stop.code, int) else FAILURE
    except KeyboardInterrupt:
        return _complain("interrupted", _SIGNALS["SIGINT"])
    except Exception as error:
        if os.environ.get("FASTDIFF_DEBUG") == "1":
            raise
        return _report(error)


def _report(error: Exception) -> int:
    """One line for what is expected to go wrong, a traceback for what is not."""
    if isinstance(error, RunInterrupted):
        return _complain(str(error), _SIGNALS.get(error.signal, FAILURE))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _complain(f"the disk is full ({error}); free some space or give another output folder", USAGE)
    if isinstance(error, ValueError | OSError | ImportError):
        return _complain(str(error), USAGE)
    if isinstance(error, ArithmeticError | RuntimeError) and (message := _failure(error)):
        return _complain(message, FAILURE)
    traceback.print_exception(error)
    return FAILURE


def _failure(error: Exception) -> str | None:
    """What to say of a run that failed in a known way; torch is imported by now."""
    import torch

    from fastdiff.engine.metrics import NonFiniteError
    from fastdiff.export import LoadBackError

    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"out of memory ({str(error).splitlines()[0]}); try --gradient_checkpointing, --mixed_precision bf16 with "
            "--cast_teacher_unet, --use_8bit_adam, --split_roles or a smaller --train_batch_size"
        )
    return str(error) if isinstance(error, NonFiniteError | LoadBackError | FloatingPointError) else None


def _complain(message: str, code: int) -> int:
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    who = f"fastdiff, process {os.environ.get('RANK', '?')}: error: " if several else "fastdiff: error: "
    print(who + " ".join(message.split()), file=sys.stderr)
    return code


def _overview() -> str:
    width = max(len(verb.name) for verb in VERBS)
    lines = [f"  {verb.name:{width}}  {verb.help}" for verb in VERBS]
    return "\n".join(
        [
            "usage: fastdiff <verb> [options]",
            "",
            "Distils any diffusers text-to-image pipeline into a 1-8 step one.",
            "",
            *lines,
            "",
            "`fastdiff <verb> --help` lists a verb's options. FASTDIFF_DEBUG=1 shows tracebacks.",
        ]
    )
