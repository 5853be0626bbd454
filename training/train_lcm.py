"""Trains with LCM; made for several processes.

    accelerate launch training/train_lcm.py --config training/recipes/sd15/lcm_lora.yaml --data DATA --output_dir runs/mine

Options are those of `fastdiff distill --method lcm --help`; training/README.md has launch commands.
"""

import sys

from fastdiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", "--method", "lcm", *sys.argv[1:]]))
