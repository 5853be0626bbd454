"""`fastdiff bench`: memory beside its prediction, and what steps and pictures cost beyond their network passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiff.cli.bench_inference import inference
from fastdiff.cli.bench_results import keep, kept
from fastdiff.cli.parsing import Parser, show_progress_only
from fastdiff.recipes.errors import RecipeError

HELP = "measure memory and time of training steps on random weights, and the latency of pipelines"
USAGE = """fastdiff bench memory [--case NAME ...] [--output FILE]
       fastdiff bench step [--method NAME ...] [--size middle|tiny] [--batch N] [--resolution N] [--pairs N]
                            [--output FILE]
       fastdiff bench methods [--method NAME ...] [--size middle|tiny] [--batch N] [--resolution N] [--pairs N]
                            [--output FILE]
       fastdiff bench inference [teacher|STUDENT ...] [--teacher NAME] [--batch N] [--pairs N] [--output FILE]"""
KINDS = {
    "memory": lambda flags: _memory(flags),
    "step": lambda flags: _step(flags),
    "methods": lambda flags: _methods(flags),
    "inference": inference,
}


def main(arguments: list[str]) -> int:
    """Runs the verb."""
    parser = Parser(
        "bench", "Measures training steps on random weights, and the latency of whole pipelines.", usage=USAGE
    )
    parser.add_argument(
        "what",
        metavar="|".join(KINDS),
        help="peak memory; time of a step, or of a picture, against bare network passes",
    )
    parser.add_argument("models", nargs="*", help="inference: student folders, or `teacher` [teacher]")
    parser.add_argument("--teacher", default="embedded", help="inference: what `teacher` stands for [embedded]")
    parser.add_argument("--case", nargs="+", help="memory: which cases; those of 8 GiB if not given")
    parser.add_argument("--method", nargs="+", help="step, methods: which [dmd2 lcm, and all]")
    parser.add_argument("--size", default="middle", help="step, methods: middle (about 50 M weights) or tiny [middle]")
    parser.add_argument("--batch", type=int, help="samples [step and methods 2, inference 1]")
    parser.add_argument(
        "--resolution", type=int, help="step, methods: pixels [those of the size: middle 256, tiny 64]"
    )
    parser.add_argument("--pairs", type=int, default=20, help="interleaved pairs behind the median [20]")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="step: recompute activations")
    parser.add_argument("--torch_compile", action="store_true", help="step: compiled, beside passes that are not")
    parser.add_argument("--output", type=Path, help="JSON file; results are added by name")
    flags = parser.parse_all(arguments)
    if flags.what not in KINDS:
        raise RecipeError(f"bench measures {', '.join(KINDS)}, got {flags.what!r}")
    if flags.models and flags.what != "inference":
        raise RecipeError(f"unknown argument {flags.models[0]!r}: only bench inference takes models")
    flags.batch = flags.batch or (1 if flags.what == "inference" else 2)
    show_progress_only()
    return KINDS[flags.what](flags)


def _memory(flags: Any) -> int:
    from fastdiff.planning.measure_memory import CASES, SUITE, compared, measure

    names = flags.case or SUITE
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise RecipeError(f"unknown case {unknown[0]!r}; known: {', '.join(CASES)}")
    print(f"{'case':28}{'weights':>12}{'measured':>12}{'predicted':>12}{'ratio':>8}{'s/step':>9}  peak / peak of")
    rows = kept(flags.output)
    for name in names:
        row = rows[name] = compared(measure(name), rows)
        sizes = "".join(f"{row[key] / 2**30:8.2f} GiB" for key in ("peak", "predicted"))
        ratio = row["predicted"] / row["peak"]
        against = f"  {row['peak_share']:.2f} {row['against']}" if "against" in row else ""
        seconds = row["seconds_a_step"]
        print(f"{name:28}{row['network_weights']:12,}{sizes}{ratio:8.2f}{seconds:9.1f}{against}", flush=True)
        keep(flags.output, name, row)
    return 0


def _methods(flags: Any) -> int:
    from fastdiff.methods import METHODS, method_named
    from fastdiff.planning.measure_methods import combinations, measure

    _check_size(flags.size)
    print(f"{'method':24}{'student':>8}{'critics':>8}{'peak':>12}{'step s':>10}{'bare s':>10}{'ratio':>8}")
    for name in flags.method or [method.info.name for method in METHODS]:
        for kinds in combinations(method_named(name)):
            row = measure(name, kinds, flags.size, flags.batch, flags.pairs, flags.resolution)
            peak = f"{row['peak'] / 2**20:8.0f} MiB"
            times = f"{row['step_seconds']:10.3f}{row['bare_seconds']:10.3f}{row['ratio']:8.3f}"
            print(f"{name:24}{kinds[0]:>8}{kinds[1] or '':>8}{peak}{times}", flush=True)
            keep(flags.output, "-".join([name, flags.size, *filter(None, kinds)]), row)
    return 0


def _check_size(size: str) -> None:
    from fastdiff.planning.measure_step import SIZES

    if size not in SIZES:
        raise RecipeError(f"--size must be one of {', '.join(SIZES)}, got {size!r}")


def _step(flags: Any) -> int:
    from fastdiff.planning.measure_step import measure

    _check_size(flags.size)
    names = {"gradient_checkpointing": "checkpointed", "torch_compile": "compiled"}
    settings: dict[str, Any] = {name: True for name in names if getattr(flags, name)}
    row_name = [flags.size, *(names[one] for one in settings)]
    if flags.resolution:
        settings["resolution"] = flags.resolution
        row_name.append(f"{flags.resolution}px")
    print(f"{'method':22}{'weights':>12}{'step s':>10}{'bare s':>10}{'ratio':>8}{'of cpu':>8}  calls")
    for name in flags.method or ["dmd2", "lcm"]:
        row = measure(name, flags.size, batch=flags.batch, pairs=flags.pairs, settings=settings)
        calls = "; ".join(
            f"{'+'.join(turn['trains'])}: " + ", ".join(_call(call) for call in turn["calls"]) for turn in row["calls"]
        )
        times = f"{row['step_seconds']:10.3f}{row['bare_seconds']:10.3f}{row['ratio']:8.3f}{row['cpu_ratio']:8.3f}"
        print(f"{name:22}{row['weights']:12,}{times}  {calls}", flush=True)
        keep(flags.output, "-".join([name, *row_name]), row)
    return 0


def _call(call: dict[str, Any]) -> str:
    words = {"graph": " with graph", "derivative": " with derivative"}
    return f"{call['rows']} rows" + "".join(word for key, word in words.items() if call[key])
