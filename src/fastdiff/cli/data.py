"""`fastdiff data`: builds data sets."""

from __future__ import annotations

import json
from pathlib import Path

from fastdiff.cli.parsing import Parser
from fastdiff.recipes.errors import RecipeError

HELP = "build a data set (emoji: small text-to-image data from npm packages)"
DESCRIPTION = """Builds the emoji data set: pictures of openly licensed icon sets with captions at three levels.
The packages are fetched with: npm install --prefix DIR @iconify-json/noto @iconify-json/twemoji
@iconify-json/fluent-emoji-flat @iconify-json/fluent-emoji @iconify-json/emojione emojibase-data
and are then in DIR/node_modules."""


def main(arguments: list[str]) -> int:
    """Runs the verb."""
    parser = Parser("data", DESCRIPTION)
    parser.add_argument("name", choices=["emoji"], help="which data set")
    parser.add_argument("--packages", type=Path, required=True, help="the node_modules folder of the npm packages")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--resolution", type=int, default=32, help="side of the pictures in pixels [32]")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the captions [0]")
    parser.add_argument("--prompts", type=Path, help="folder of the prompt lists [OUTPUT/prompts]")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw [2]")
    flags = parser.parse_all(arguments)
    if flags.resolution < 1:
        raise RecipeError(f"--resolution must be at least 1, got {flags.resolution}")
    if not (flags.packages / "@iconify-json").is_dir():
        raise FileNotFoundError(f"{flags.packages} holds no @iconify-json packages; see `fastdiff data --help`")
    from fastdiff.data.emoji import build_emoji_dataset

    facts = build_emoji_dataset(
        flags.packages, flags.output, flags.resolution, flags.seed, prompts=flags.prompts, workers=flags.workers
    )
    print(json.dumps(facts, indent=2))
    return 0
