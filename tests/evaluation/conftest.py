"""A tiny random tower in the format of the shipped ones, and a benchmark over random images."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastdiff.evaluation.benchmark import Benchmark
from fastdiff.evaluation.extractors import ClipTower
from fastdiff.evaluation.features import ImageFeatures
from fastdiff.evaluation.protocol import Protocol

MERGES = 20
CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 512 + MERGES + 2, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "size": 32, "upsample": 1}


def _write_tower(folder: Path, seed: int = 0) -> Path:
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    state = CLIP(**CONFIG).state_dict()
    save_file({k: v.half().contiguous() for k, v in state.items()}, folder / "model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({**CONFIG, "preprocess": PREPROCESS}))
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = "\n".join(["#version", *(f"{a} {b}" for a, b in itertools.pairwise(letters[: MERGES + 1]))])
    with gzip.open(folder / "bpe.txt.gz", "wt") as stream:
        stream.write(merges)
    return folder


def _tiny_benchmark(tower: ClipTower, n: int = 12, **changes: object) -> Benchmark:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (2, n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    reference, floor = (ImageFeatures.of(half, tower) for half in images)
    settings = {
        "protocol": Protocol("tiny/random-tower", n=n, resolution=32, draws=2, diversity_samples=2),
        "prompts": tuple(f"thing number {i}" for i in range(n)),
        "extractor": tower,
        "clip": tower,
        "reference": reference,
        "floor": floor,
        "groups": tuple("ab"[i % 2] for i in range(n)),
    }
    return Benchmark(**(settings | changes))


@pytest.fixture(scope="session")
def write_tower():
    return _write_tower


@pytest.fixture(scope="session")
def tiny_benchmark():
    return _tiny_benchmark


@pytest.fixture(scope="session")
def tower_folder(tmp_path_factory):
    return _write_tower(tmp_path_factory.mktemp("towers") / "random")


@pytest.fixture(scope="session")
def tower(tower_folder):
    return ClipTower.from_folder(tower_folder)
