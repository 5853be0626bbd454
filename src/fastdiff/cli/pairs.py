"""`fastdiff pairs`: noise and the teacher's samples from it, once, for every method that trains on pairs."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdiff.cli.parsing import Parser, add_options, read_options, show_progress_only
from fastdiff.recipes.declared import options_of
from fastdiff.recipes.errors import RecipeError
from fastdiff.recipes.options import ALIASES

HELP = "sample the teacher once, for methods that train on pairs of noise and sample"
_UNUSED = ("init_from", "cast_teacher_unet", "offload_encoders", "enable_xformers_memory_efficient_attention")


def main(arguments: list[str]) -> int:
    """Runs the verb."""
    parser = Parser("pairs", "Samples the teacher; the same command goes on where it was stopped.")
    options = [option for option in options_of("recipes.options", "TeacherOptions") if option.name not in _UNUSED]
    options += [*options_of("recipes.options", "DataOptions"), *options_of("engine.pairs", "PairSettings")]
    add_options(parser, options, ALIASES)
    parser.add_argument("--output", type=Path, required=True, help="pairs folder, new or of an earlier such command")
    parser.add_argument("--count", type=int, help="pairs; one a prompt if not given, more go round the prompts again")
    parser.add_argument("--resolution", type=int, help="image side in pixels; the teacher's own if not given")
    parser.add_argument("--real_images", help="captioned images for the share --real_share")
    parser.add_argument(
        "--embeddings",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="store prompt embeddings too; without them training encodes the prompts [true]",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of stored tensors [float32]"
    )
    parser.add_argument(
        "--mixed_precision", choices=("no", "bf16"), default="no", help="compute type of the teacher [no]"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="pairs solved at once [16]")
    parser.add_argument("--shard_size", type=int, default=1024, help="pairs a file [1024]")
    flags = vars(parser.parse_all(arguments))
    for name in ("count", "resolution", "batch_size", "shard_size"):
        if flags[name] is not None and flags[name] < 1:
            raise RecipeError(f"--{name} must be at least 1, got {flags[name]}")
    values = read_options(flags, options, ALIASES)
    show_progress_only()
    from fastdiff.recipes.pairs import pairs

    own = ("output", "count", "resolution", "real_images", "embeddings", "dtype", "mixed_precision")
    own += ("batch_size", "shard_size")
    made = pairs(values, **{name: flags[name] for name in own})
    print(f"pairs: {flags['output']} ({made:,} pairs)")
    return 0
