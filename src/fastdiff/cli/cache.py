"""`fastdiff cache`: encodes data once, so that training needs neither text encoder nor autoencoder."""

from __future__ import annotations

from pathlib import Path

from fastdiff.cli.parsing import Parser, add_options, read_options, show_progress_only
from fastdiff.recipes.declared import options_of
from fastdiff.recipes.errors import RecipeError
from fastdiff.recipes.options import ALIASES

HELP = "encode latents and text embeddings once, for training without encoders"


def main(arguments: list[str]) -> int:
    """Runs the verb."""
    parser = Parser("cache", "Encodes images and prompts; the same command goes on where it was stopped.")
    teacher_options = options_of("recipes.options", "TeacherOptions")
    data_options = options_of("recipes.options", "DataOptions")
    unused = ("init_from", "cast_teacher_unet", "offload_encoders", "enable_xformers_memory_efficient_attention")
    teacher_options = tuple(option for option in teacher_options if option.name not in unused)
    for options in (teacher_options, data_options):
        add_options(parser, options, ALIASES)
    parser.add_argument("--output", type=Path, required=True, help="cache folder, new or of an earlier such command")
    parser.add_argument("--resolution", type=int, help="image side in pixels; the teacher's own if not given")
    parser.add_argument("--seed", type=int, default=0, help="of crops and of the autoencoder's noise [0]")
    parser.add_argument("--encode_batch_size", type=int, default=16, help="samples encoded at once [16]")
    parser.add_argument("--shard_size", type=int, default=1024, help="samples a file [1024]")
    flags = vars(parser.parse_all(arguments))
    for name in ("resolution", "encode_batch_size", "shard_size"):
        if flags[name] is not None and flags[name] < 1:
            raise RecipeError(f"--{name} must be at least 1, got {flags[name]}")
    values = read_options(flags, (*teacher_options, *data_options), ALIASES)
    show_progress_only()
    from fastdiff.recipes.caching import cache

    own = ("output", "resolution", "seed", "encode_batch_size", "shard_size")
    count, rejected = cache(values, **{name: flags[name] for name in own})
    print(f"cache: {flags['output']} ({count:,} records; {rejected})")
    return 0
