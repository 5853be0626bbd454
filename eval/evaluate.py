"""Scores a pipeline folder under a named protocol and writes a report.

python eval/evaluate.py runs/demo/student --steps 1 --output runs/demo/report
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdiff.evaluation import (
    evaluate,
    floor_row,
    format_table,
    grid_images,
    load_pipeline,
    open_protocol,
    write_report,
)
from fastdiff.evaluation.baselines import load_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder DiffusionPipeline.from_pretrained loads")
    parser.add_argument("--protocol", default="emoji-2k/tower-v1")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--guidance_scale", type=float, default=0.0)
    parser.add_argument("--name", default="student")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=None, help="replaces the protocol's")
    parser.add_argument("--output", type=Path, default=Path("runs/report"))
    parser.add_argument("--baselines", type=Path, default=None, help="rows to show beside: eval/results/*.json")
    for name in ("prompts", "reference", "extractor_weights", "clip_weights"):
        parser.add_argument(f"--{name}", type=Path, default=None, help="a file that does not ship; see eval/README.md")
    flags = parser.parse_args()

    bench = open_protocol(
        flags.protocol,
        prompts=flags.prompts,
        reference=flags.reference,
        extractor_weights=flags.extractor_weights,
        clip_weights=flags.clip_weights,
    )
    pipeline = load_pipeline(flags.folder)
    settings = {"name": flags.name, "batch_size": flags.batch_size, "seed": flags.seed}
    row = evaluate(pipeline, bench, flags.steps, flags.guidance_scale, **settings)
    others = load_rows(flags.baselines, bench) if flags.baselines else [floor_row(bench)] if bench.floor else []
    rows = [*others, row]
    prompts = bench.prompts[:: max(1, len(bench.prompts) // 12)][:12]
    images = grid_images(pipeline, prompts, flags.steps, flags.guidance_scale)
    page = write_report(flags.output, rows, [(flags.name, images)], {"folder": flags.folder.name}, prompts)
    print(format_table(rows))
    print(f"report: {page}")


if __name__ == "__main__":
    main()
