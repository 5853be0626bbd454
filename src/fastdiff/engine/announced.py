"""How many processes whoever started this one wanted."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_MODULE = "accelerate.commands.launch"


def announced_processes() -> int:
    """The number of processes of the launcher above this one; 1 without a launcher.

    torchrun tells its children in WORLD_SIZE. `accelerate launch` tells a single child nothing, so that its own command
    line, and the configuration it read, are looked at.
    """
    if world := os.environ.get("WORLD_SIZE"):
        return int(world)
    words = _launch_arguments(_parent_command())
    if words is None:
        return 1
    from accelerate.commands.launch import launch_command_parser

    given, _ = launch_command_parser().parse_known_args(words)
    return given.num_processes or _configured(given.config_file)


def _parent_command() -> list[str]:
    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent else []
    except psutil.Error:  # gone, or not ours to look at
        return []


def _launch_arguments(command: list[str]) -> list[str] | None:
    """What follows `accelerate launch` or `python -m accelerate.commands.launch`; None for another command."""
    if _MODULE in command:
        return command[command.index(_MODULE) + 1 :]
    if "launch" in command and any(Path(word).stem == "accelerate" for word in command[:2]):
        return command[command.index("launch") + 1 :]
    return None


def _configured(config_file: str | None) -> int:
    """What the configuration says that `accelerate launch` reads: the given one, or the user's own."""
    from accelerate.commands.config import default_config_file, load_config_from_file

    if config_file is None and not os.path.isfile(default_config_file):
        return 1
    return load_config_from_file(config_file).num_processes
