"""`fastdiff export`: a student folder from a run or checkpoint."""

from __future__ import annotations

from pathlib import Path

from fastdiff.cli.parsing import Parser, show_progress_only

HELP = "write a student folder from a run or checkpoint, and load it back"


def main(arguments: list[str]) -> int:
    """Runs the verb."""
    parser = Parser("export", "Writes a student folder from a run's last checkpoint, or from a given one.")
    parser.add_argument("source", type=Path, help="a run folder, or one of its checkpoints/step-N")
    parser.add_argument("--output", type=Path, required=True, help="the student folder to write")
    parser.add_argument(
        "--format",
        choices=["lora", "pipeline"],
        help="lora: LoRA files only; pipeline: whole pipeline, with the LoRA files of a LoRA student [pipeline]",
    )
    parser.add_argument(
        "--tiny_decoder", type=Path, help="folder of an AutoencoderTiny that replaces the pipeline's autoencoder"
    )
    parser.add_argument(
        "--num_inference_steps", type=int, metavar="N", help="steps the student is meant to be run with [as trained]"
    )
    flags = parser.parse_all(arguments)
    from fastdiff.recipes.recipe import run_folder_of

    run_folder_of(flags.source)
    show_progress_only()
    from fastdiff.recipes.reexport import export_checkpoint

    student = export_checkpoint(
        flags.source, flags.output, flags.format != "lora", flags.tiny_decoder, flags.num_inference_steps
    )
    print(f"student: {student.folder} (loads back with error {student.record.load_back['max_error']:.1e})")
    return 0
