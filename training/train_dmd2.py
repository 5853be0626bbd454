"""Trains with DMD2; made for several processes.

    accelerate launch training/train_dmd2.py --config training/recipes/sd15/dmd2_1step.yaml --data DATA --output_dir runs/mine

Options are those of `fastdiff distill --method dmd2 --help`; training/README.md has launch commands.
"""

import sys

from fastdiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", "--method", "dmd2", *sys.argv[1:]]))
