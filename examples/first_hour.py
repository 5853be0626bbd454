"""The first hour on a card of one's own: a short DMD2 LoRA run, and a page that says which claims held.

    python examples/first_hour.py --teacher stabilityai/stable-diffusion-xl-base-1.0 --output_dir runs/first-hour
    python examples/first_hour.py --teacher embedded --max_train_steps 20 --train_batch_size 4       # anywhere

Before the run the planner predicts its memory; after it the student is loaded back by stock diffusers and draws the
same prompts from the same noise as its teacher. Further flags are those of `fastdiff distill`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"embedded": ROOT / "training" / "recipes" / "embedded" / "dmd2_1step.yaml"}
LARGE = ROOT / "training" / "recipes" / "sdxl" / "dmd2_4step_lora.yaml"
PROMPTS = ROOT / "eval" / "prompts" / "emoji_train.txt"
SHOWN = ("red apple", "a flower", "dog face", "red heart", "house", "a red fox in the snow")
TEACHER_STEPS = 25
GIB = 2**30


@dataclass(frozen=True)
class Claim:
    """Something the project says, what was seen, and whether that agrees; None where it cannot be told here."""

    says: str
    seen: str
    held: bool | None


def recipe_of(arguments: argparse.Namespace, extra: list[str]) -> Any:
    """The published recipe of the teacher's size as a short run of two adapters on one base."""
    from fastdiff.recipes import resolve

    given = {
        "pretrained_teacher_model": arguments.teacher,
        "data": str(arguments.prompts),
        "output_dir": str(arguments.output_dir),
        "max_train_steps": arguments.max_train_steps,
        "student": "lora",
        "fake_score": "lora",
        "resolution": None,  # the teacher's own
        "gradient_accumulation_steps": 1,
        "offload_encoders": True,
        "lr_warmup_steps": 0,
        "log_every": 1,
        "validation_samples": 0,
        "validation_steps": arguments.max_train_steps,
        "checkpointing_steps": arguments.max_train_steps,
        "validation_prompts": list(SHOWN),
        "report_to": "none",
    }
    names = [text.removeprefix("--") for text in extra[::2]]
    return resolve(given | dict(zip(names, extra[1::2], strict=True)), RECIPES.get(arguments.teacher, LARGE))


def network_bytes(recipe: Any) -> int:
    """Weights of the teacher's network alone, as the run stores them."""
    import diffusers
    import torch

    from fastdiff.planning.blueprint import blueprint_of

    config = dict(blueprint_of(recipe.values["pretrained_teacher_model"]).network)
    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"]).from_config(config)
    width = 2 if recipe.values["cast_teacher_unet"] else 4
    return width * sum(parameter.numel() for parameter in network.parameters())


def bands(log: Path) -> dict[str, tuple[list[float], list[float]]]:
    """For each loss and score gap: lower quartile, median, upper quartile of its first and of its last quarter."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    names = sorted({name for line in lines for name in line if name.startswith("loss/") or name.endswith("score_gap")})
    found = {}
    for name in names:
        values = [line[name] for line in lines if name in line]
        part = max(2, len(values) // 4)
        if len(values) >= 2 * part:  # else both quarters would be the same readings
            found[name] = (_quartiles(values[:part]), _quartiles(values[-part:]))
    return found


def claims(plan: Any, peak: int, on_gpu: bool, student: Any, network_bytes: int) -> list[Claim]:
    """What the project says about such a run, beside what happened."""
    ratio = plan.tensors / peak if peak else float("inf")
    large = peak > GIB
    told = on_gpu or peak > 0  # a process's resident peak cannot be reset: planning may have needed more than the run
    frozen = plan.split["frozen weights"]
    error, times = student.record.load_back["max_error"], list(student.sampler.timesteps)
    kind = "allocated at the peak" if on_gpu else "resident at the peak, above that after imports"
    return [
        Claim(
            "three roles share one frozen base",
            f"{_size(frozen)} of frozen weights in the plan, the network alone has {_size(network_bytes)}",
            frozen <= 1.01 * network_bytes,
        ),
        Claim(
            "the run needs no more than the planner says",
            f"{_size(peak)} {kind}, {_size(plan.needed)} planned with margin and context",
            peak <= plan.needed if told else None,
        ),
        Claim(
            "tensors at the peak are predicted within 15 %",
            f"predicted / measured = {ratio:.2f}" + ("" if large else " (below 1 GiB libraries outweigh tensors)"),
            0.85 <= ratio <= 1.15 if large else None,
        ),
        Claim("a 24 GB card is enough", f"{peak / 1e9:.1f} GB", peak <= 24e9 if on_gpu else None),
        Claim(
            f"stock diffusers loads the student back (steps at t = {times})",
            f"largest relative difference {error:.1e} over {len(student.record.load_back['checks'])} files",
            bool(student.record.load_back["ok"]),
        ),
        Claim("losses and gradients stay finite", f"{student.record.effort['steps']} steps were taken", True),
    ]


def pictures(student: Any, teacher: str) -> list[tuple[str, Any]]:
    """The same prompts and noise: the teacher, the teacher with the student's few steps, and the student."""
    import torch

    from fastdiff.evaluation import grid_images
    from fastdiff.models.teacher import Teacher

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    call = dict(student.sampler.call_arguments())
    steps = call.pop("num_inference_steps")
    options = {"batch_size": 2, "seed": 0}
    # One at a time, so that a small card holds them.
    drawn = grid_images(student.pipeline(dtype), SHOWN, steps, 0.0, extra=call, **options)
    gc.collect()
    pipeline = Teacher.from_pretrained(teacher, dtype=dtype, device=device).pipeline
    guidance = student.record.recipe["guidance_scale"]
    full = grid_images(pipeline, SHOWN, TEACHER_STEPS, guidance, **options)
    config, kind = pipeline.scheduler.config, pipeline.scheduler.config.get("prediction_type", "epsilon")
    pipeline.scheduler = student.sampler.build_scheduler(config, kind)
    few = grid_images(pipeline, SHOWN, steps, 0.0, extra=call, **options)
    return [
        (f"teacher, {TEACHER_STEPS} steps", full),
        (f"teacher, {steps} of the student's steps", few),
        (f"student, {steps} steps", drawn),
    ]


def page(recipe: Any, plan: Any, student: Any, found: list[Claim], seen: dict[str, Any], device: str) -> str:
    """The report in Markdown."""
    effort, values = student.record.effort, recipe.values
    rate = effort["steps"] * values["train_batch_size"] / effort["seconds"]
    verdict = {True: "**held**", False: "**did not hold**", None: "cannot be told here"}
    lines = [
        "# First hour",
        "",
        f"{recipe.method}, LoRA student and LoRA fake score of rank {values['lora_rank']} on "
        f"`{values['pretrained_teacher_model']}`, {plan.resolution} pixels, batch {plan.batch}, "
        f"{effort['steps']} steps on {device}.",
        "",
        f"**{rate:.2f} images a second** in training, {effort['seconds'] / effort['steps']:.2f} s a step, "
        f"{effort['network_passes'] / effort['steps'] / plan.batch:.1f} network passes a sample and step.",
        "",
        "## Claims",
        "",
        "| the project says | seen here | |",
        "|---|---|---|",
        *(f"| {claim.says} | {claim.seen} | {verdict[claim.held]} |" for claim in found),
        "",
        "## Memory, predicted",
        "",
        f"The fullest moment is in `{plan.fullest}`.",
        "",
        "| what | size |",
        "|---|---|",
        *(f"| {name} | {_size(size)} |" for name, size in plan.split.items() if size),
        "",
        "## Losses and score gap",
        "",
        "Lower quartile, median and upper quartile. The student's loss is a direction and not a distance: it may rise.",
        "The gap between fake and real score starts at zero, where both are the teacher, and rises before it falls.",
        "",
        "| | first quarter | last quarter |",
        "|---|---|---|",
        *(f"| `{name}` | {_band(first)} | {_band(last)} |" for name, (first, last) in seen.items()),
        "",
        "## Pictures",
        "",
        "Same prompts, same noise.",
        "",
        "![grid](grid.png)",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Plans, trains, draws and writes `report/README.md` in the run folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="embedded", help="Hub id or pipeline folder")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="file of training prompts")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/first-hour"))
    parser.add_argument("--max_train_steps", type=int, default=200)
    parser.add_argument("--plan_only", action="store_true", help="print what it would need, and train nothing")
    arguments, extra = parser.parse_known_args()
    if len(extra) % 2 or not all(name.startswith("--") for name in extra[::2]):
        parser.error(f"flags of `fastdiff distill` are given as --name value, got {' '.join(extra)}")

    import torch

    from fastdiff.cli.parsing import show_progress_only
    from fastdiff.engine.memory import peak_memory
    from fastdiff.evaluation import draw_grid
    from fastdiff.evaluation.grid import save_picture
    from fastdiff.planning.plan import plan_recipe
    from fastdiff.recipes.run import run_recipe

    show_progress_only()
    recipe = recipe_of(arguments, extra)
    plan = plan_recipe(recipe, cached=True)
    print(f"planned: {plan.needed / GIB:.2f} GiB, fullest in {plan.fullest}")
    if arguments.plan_only:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = 0 if device.type == "cuda" else peak_memory(device)
    student = run_recipe(recipe)
    peak = peak_memory(device) - before
    gc.collect()
    found = claims(plan, peak, device.type == "cuda", student, network_bytes(recipe))
    folder = arguments.output_dir / "report"
    save_picture(draw_grid(pictures(student, arguments.teacher), SHOWN), folder / "grid.png")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    seen = bands(arguments.output_dir / "logs" / "metrics.jsonl")
    (folder / "README.md").write_text(page(recipe, plan, student, found, seen, name), encoding="utf-8")
    print(f"report: {folder / 'README.md'}")


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _quartiles(values: Iterable[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def _band(values: list[float]) -> str:
    return " .. ".join(f"{value:.3g}" for value in values)


if __name__ == "__main__":
    main()
