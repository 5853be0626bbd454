"""`fastdiff evaluate`: scores a pipeline or student folder under a named protocol."""

from __future__ import annotations

from pathlib import Path

from fastdiff.cli.parsing import Parser, show_progress_only

HELP = "score a pipeline or student folder under a named protocol"
FILES = ("prompts", "reference", "extractor_weights", "clip_weights")


def main(arguments: list[str]) -> int:
    """Generates, measures, prints the table and writes the report."""
    parser = Parser("evaluate", "Scores a folder. A student knows its own steps and guidance; flags override them.")
    parser.add_argument("folder", type=Path, help="pipeline folder, student folder or folder of LoRA files")
    parser.add_argument("--protocol", default="emoji-2k/tower-v1", help="what fixes the numbers [emoji-2k/tower-v1]")
    parser.add_argument("--num_inference_steps", type=int, help="the student's own if not given")
    parser.add_argument("--guidance_scale", type=float, help="the student's own if not given")
    parser.add_argument("--seed", type=int, help="the protocol's if not given; recorded")
    parser.add_argument("--batch_size", type=int, default=64, help="prompts a pipeline call [64]")
    parser.add_argument("--name", default="student", help="of the row [student]")
    parser.add_argument("--output", type=Path, help="report folder [report/ beside a student folder, else ./report]")
    parser.add_argument("--baselines", type=Path, help="stored rows to show beside (the shipped ones if they fit)")
    for name in FILES:
        parser.add_argument(f"--{name}", type=Path, help="a file that does not ship with the protocol")
    flags = parser.parse_all(arguments)
    from fastdiff.recipes.student import call_settings, load_pipeline

    call = call_settings(flags.folder, flags.num_inference_steps, flags.guidance_scale)
    steps, guidance = call.pop("num_inference_steps"), call.pop("guidance_scale")
    show_progress_only()
    from fastdiff.evaluation import evaluate, format_table, grid_images, open_protocol, write_report

    bench = open_protocol(flags.protocol, **{name: getattr(flags, name) for name in FILES})
    pipeline = load_pipeline(flags.folder, num_inference_steps=steps)
    row = evaluate(
        pipeline,
        bench,
        steps,
        guidance,
        name=flags.name,
        batch_size=flags.batch_size,
        seed=flags.seed,
        extra=call,
    )
    rows = [*_beside(flags.baselines, bench), row]
    prompts = bench.prompts[:: max(1, len(bench.prompts) // 12)][:12]
    images = grid_images(pipeline, prompts, steps, guidance, extra=call)
    output = flags.output or (flags.folder.parent if flags.folder.name == "student" else Path()) / "report"
    page = write_report(output, rows, [(flags.name, images)], {"folder": flags.folder.name}, prompts)
    print(format_table(rows))
    print(f"report: {page}")
    return 0


def _beside(path: Path | None, bench) -> list:
    """Rows to compare with: the given ones, the shipped ones of this protocol, or the floor."""
    from fastdiff.evaluation import floor_row
    from fastdiff.evaluation.baselines import SHIPPED, load_rows

    if path is not None:
        return load_rows(path, bench)
    if SHIPPED.is_file() and bench.protocol.name == "emoji-2k/tower-v1":
        return load_rows(SHIPPED, bench)
    return [floor_row(bench)] if bench.floor is not None else []
