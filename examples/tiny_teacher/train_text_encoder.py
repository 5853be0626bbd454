"""Stage 2: the teacher's CLIPTextModel and CLIPTokenizer, trained contrastively against a throw-away image tower.

python train_text_encoder.py --data emoji.parquet --output runs/text_encoder --minutes 7
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from common import (
    CONTEXT,
    LEVELS,
    Rows,
    count_parameters,
    open_clip_tokenizer,
    parser,
    retrieval_at_1,
    seed_everything,
    train_contrastive,
    write_bpe,
    write_record,
)
from train_tower import build as build_open_clip
from train_tower import preprocess, read_config
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(bpe: Path) -> CLIPTokenizer:
    """transformers' tokenizer with the ids of open_clip's truncated one."""
    source = open_clip_tokenizer(bpe)
    names = {"<start_of_text>": START, "<end_of_text>": END}
    vocab = {names.get(word, word): number for word, number in source.encoder.items()}
    merges = sorted(source.bpe_ranks, key=source.bpe_ranks.get)
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Ids (N, CONTEXT), as StableDiffusionPipeline makes them."""
    padded = tokenizer(captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    return padded.input_ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main() -> None:
    flags = parser(__doc__, batch=256, lr=1.5e-3, minutes=7.0, weight_decay=0.1, ema=0.99, seed=303)
    flags.add_argument(
        "--levels", type=float, nargs=3, default=(0.15, 0.30, 0.55), help="weights of the caption levels"
    )
    flags.add_argument("--shift", type=int, default=2)
    flags.add_argument("--jitter", type=float, default=0.1)
    settings = flags.parse_args()
    seed_everything(settings.seed, settings.threads)
    settings.output.mkdir(parents=True, exist_ok=True)

    bpe = write_bpe(settings.output / "bpe_4096.txt.gz")
    tokenizer = build_tokenizer(bpe)
    bpe.unlink()
    tokenizer.save_pretrained(settings.output / "tokenizer")
    train, held_out = Rows(settings.data, "train"), Rows(settings.data, "validation")
    tokens = {level: tokenize(tokenizer, train.captions[level]) for level in LEVELS}

    config = read_config("measuring")
    visual = build_open_clip("throw_away", config).visual.to(memory_format=torch.channels_last)
    text = build_text_encoder(tokenizer)
    if settings.init_from:
        text = CLIPTextModel.from_pretrained(settings.init_from / "text_encoder").float()
    project = torch.nn.Linear(128, config["embed_dim"], bias=False)
    scale = torch.nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
    modules = torch.nn.ModuleList([visual, text, project])

    def encode_image(x):
        return torch.nn.functional.normalize(visual(preprocess(x, config)), dim=-1)

    def encode_text(ids):
        return torch.nn.functional.normalize(project(text(ids).pooler_output), dim=-1)

    average, progress = train_contrastive(settings, encode_image, encode_text, modules, scale, train, tokens)
    average.copy_to([*modules.parameters(), scale])
    modules.eval()
    text.half().save_pretrained(settings.output / "text_encoder")
    text.float()
    with torch.no_grad():
        images = torch.cat([encode_image(chunk) for chunk in held_out.unit(slice(0, 1000)).split(250)])
        texts = encode_text(tokenize(tokenizer, held_out.captions["style"][:1000]))
    metrics = {
        "r1_image_to_text_1000": retrieval_at_1(images, texts),
        "r1_text_to_image_1000": retrieval_at_1(texts, images),
    }
    print(json.dumps(metrics), flush=True)
    write_record(
        settings.output,
        settings,
        stage="text encoder",
        parameters=count_parameters(text),
        steps=progress.step,
        seconds=round(progress.elapsed),
        metrics=metrics,
    )


if __name__ == "__main__":
    main()
