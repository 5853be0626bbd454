"""Makes the reference features: both held-out halves of the emoji, as the teacher's autoencoder reconstructs them.

python eval/references.py --data runs/emoji/emoji.parquet --teacher src/fastdiff/assets/teacher
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch
from PIL import Image

from fastdiff.evaluation import ImageFeatures, load_pipeline, prompts_folder
from fastdiff.evaluation.benchmark import MEASURING_TOWER, REFERENCES, read_prompts
from fastdiff.evaluation.extractors import ClipTower, file_sha256
from fastdiff.evaluation.resizing import to_tensor


@torch.no_grad()
def reconstruct(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) through encoder and decoder; a Gaussian posterior is taken at its mean."""
    parts = []
    for chunk in images.split(100):
        encoded = vae.encode(chunk.float() / 127.5 - 1)
        latents = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()
        pixels = vae.decode(latents).sample / 2 + 0.5
        parts.append((pixels.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(parts)


def main() -> None:
    import pyarrow.parquet as pq

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="emoji.parquet of `fastdiff data emoji`")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=REFERENCES)
    flags = parser.parse_args()
    vae, tower = load_pipeline(flags.teacher).vae.float(), ClipTower.from_folder(MEASURING_TOWER)
    weights = file_sha256(next((flags.teacher / "vae").glob("*.safetensors")))
    table = pq.read_table(flags.data).to_pylist()
    for split in ("test", "validation"):
        rows = [row for row in table if row["split"] == split]
        lines = read_prompts(prompts_folder() / f"emoji_{split}.jsonl")
        # Row i must be the image behind prompt i: the floor is scored with those prompts.
        if [(r["concept"], r["style"]) for r in rows] != [(line["concept"], line["style"]) for line in lines]:
            raise ValueError(
                f"{flags.data} and emoji_{split}.jsonl differ; make both in one run of `fastdiff data emoji`"
            )
        images = torch.stack([to_tensor(Image.open(io.BytesIO(row["image"]))) for row in rows])
        features = ImageFeatures.of(reconstruct(vae, images), tower, split=split, vae_sha256=weights)
        print(features.save(flags.output / f"emoji-{split}.npz"), len(features))


if __name__ == "__main__":
    main()
