"""The latency table of `fastdiff bench inference`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiff.cli.bench_results import keep

TEACHER = "teacher"


def inference(flags: Any) -> int:
    """Measures each model that was named, in this process, and prints a line for each."""
    print(f"{'model':28}{'calls':>6}{'s':>9}{'bare s':>9}{'ratio':>7}{'text':>9}{'network':>9}{'decoder':>9}")
    for name in flags.models or [TEACHER]:
        from fastdiff.planning.measure_inference import measure

        pipeline, call = _opened(name, flags)
        row = measure(pipeline, call, batch=flags.batch, pairs=flags.pairs)
        numbers = "".join(f"{value:9.4f}" for value in row["split_seconds"].values())
        times = f"{row['seconds']:9.4f}{row['bare_seconds']:9.4f}{row['ratio']:7.3f}"
        print(f"{name[-27:]:28}{row['calls']['network']:6}{times}{numbers}", flush=True)
        keep(flags.output, name if name == TEACHER else Path(name).name, row)
    return 0


def _opened(name: str, flags: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the arguments it is called with: a student's own, the defaults of the teacher's pipeline."""
    import torch

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if name == TEACHER:
        from fastdiff.models.teacher import Teacher

        device = "cuda" if on_gpu else "cpu"
        return Teacher.from_pretrained(flags.teacher, dtype=dtype, device=device).pipeline, {}
    from fastdiff.recipes.student import call_settings, load_pipeline

    return load_pipeline(name, dtype), call_settings(name)
