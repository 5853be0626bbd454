"""Trains with the method that the recipe names; made for several processes.

    accelerate launch training/train.py --config training/recipes/sdxl/flash_dmd_4step.yaml --data DATA --output_dir runs/mine

Options are those of `fastdiff distill --method NAME --help`; training/README.md has launch commands.
"""

import sys

from fastdiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
