"""`fastdiff env`: what to paste into a bug report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from fastdiff.cli.parsing import Parser

HELP = "print versions and devices, for bug reports"
PACKAGES = (
    *("fastdiff-diffusers", "torch", "torchvision", "diffusers", "transformers", "accelerate", "peft"),
    *("safetensors", "huggingface_hub", "numpy", "pyarrow", "open_clip_torch", "torch-fidelity", "torchmetrics"),
    *("datasets", "webdataset", "bitsandbytes", "xformers", "wandb", "trackio", "tensorboard"),
)


def main(arguments: list[str]) -> int:
    """Prints one line a fact."""
    Parser("env", "Prints versions and devices.").parse_all(arguments)
    print(f"python: {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    for package in PACKAGES:
        try:
            print(f"{package}: {version(package)}")
        except PackageNotFoundError:
            print(f"{package}: not installed")
    import torch

    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        print(f"cuda {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    print(f"cuda: {torch.version.cuda or 'not built in'}; usable: {torch.cuda.is_available()}")
    return 0
