"""The undistilled teacher at its best for a number of network calls: over solver, guidance and start time.

Chosen on validation prompts, scored on others. A guided step costs two calls.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastdiff.diffusion.schedules import is_flow
from fastdiff.evaluation.benchmark import Benchmark
from fastdiff.evaluation.evaluate import evaluate, load_pipeline
from fastdiff.evaluation.features import ImageFeatures
from fastdiff.evaluation.generation import generate, sample_seeds
from fastdiff.evaluation.metrics import frechet_distance
from fastdiff.evaluation.row import Row
from fastdiff.models.sampler import SamplerSpec

SOLVERS = ("DDIM", "Euler", "DPM-Solver++ 2M", "UniPC")
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.5, 7.0)
STARTS = (999, 899, 749, 599, 449, 299)
FLOW_SPACE = {"solver": "Euler", "starts": (999,)}
SHIPPED = Path(__file__).resolve().parents[3] / "eval" / "results" / "embedded_baselines.json"


@dataclass(frozen=True)
class Sampling:
    """How an undistilled model is sampled: solver, steps, guidance, and the first time index it is run at."""

    solver: str
    steps: int
    guidance_scale: float = 1.0
    start: int = 999

    @property
    def network_calls(self) -> int:
        """Denoiser rows an image."""
        return self.steps * (2 if self.guidance_scale > 1 else 1)


def scheduler_for(config: dict[str, Any], sampling: Sampling) -> Any:
    """A stock diffusers scheduler that samples as ``sampling`` says, on the betas of ``config`` (a scheduler's
    config), or on its flow: Euler from t = 1 down an even grid.

    Starting at index s < T - 1 is done by handing the scheduler the first s + 1 betas only; the first network input is
    then what the solver takes for pure noise at s (DDIM: unit variance; Euler: sigma_s of it).

    Raises:
        ValueError: an unknown solver or a start outside the schedule.
    """
    if is_flow(config):
        if (sampling.solver, sampling.start) != (FLOW_SPACE["solver"], *FLOW_SPACE["starts"]):
            raise ValueError(
                f"a flow is sampled by Euler from index 999, not by {sampling.solver} from {sampling.start}"
            )
        return SamplerSpec.trailing("flow", sampling.steps).build_scheduler(config, "flow")
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

    classes = {
        "DDIM": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
        "Euler": (EulerDiscreteScheduler, {}),
        "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        "UniPC": (UniPCMultistepScheduler, {"solver_order": 2}),
    }
    if sampling.solver not in classes:
        raise ValueError(f"no solver {sampling.solver!r}; there are {', '.join(classes)}")
    kind, settings = classes[sampling.solver]
    betas = DDIMScheduler.from_config(config).betas
    if not 0 < sampling.start < len(betas):
        raise ValueError(f"start is {sampling.start}; the schedule has the indices 1 to {len(betas) - 1}")
    return kind(
        trained_betas=betas[: sampling.start + 1].double().numpy(),
        num_train_timesteps=sampling.start + 1,
        prediction_type=config.get("prediction_type", "epsilon"),
        timestep_spacing="trailing",
        **settings,
    )


def with_sampling(pipeline: Any, sampling: Sampling) -> Any:
    """A shallow copy of the pipeline with that scheduler; networks are shared, the original keeps its own."""
    changed = copy.copy(pipeline)
    # DiffusionPipeline.register_modules writes to the config too, which a shallow copy would share
    changed._internal_dict = copy.copy(pipeline._internal_dict)
    changed.scheduler = scheduler_for(dict(pipeline.scheduler.config), sampling)
    return changed


def candidates(
    calls: int, guidance: Sequence[float] = GUIDANCE, starts: Sequence[int] = STARTS, solver: str = SOLVERS[0]
) -> list[Sampling]:
    """All samplings by one solver that cost exactly ``calls`` network calls."""
    found = [Sampling(solver, calls // (2 if w > 1 else 1), w, start) for w in guidance for start in starts]
    return [sampling for sampling in found if sampling.steps > 0 and sampling.network_calls == calls]


def search(
    pipeline: Any,
    validation: Benchmark,
    options: Sequence[Sampling],
    against: ImageFeatures,
    count: int = 300,
    finalists: int = 2,
    solvers: Sequence[str] = SOLVERS,
    batch_size: int = 100,
    progress: bool = True,
) -> tuple[Sampling, list[dict]]:
    """The sampling with the least Frechet distance to ``against`` on validation prompts, and what was tried.

    Guidance and start time are ranked on the first ``count`` prompts; the best ``finalists`` are tried with all
    ``solvers`` there, and the best of those on all prompts.

    Raises:
        ValueError: no options.
    """
    if not options:
        raise ValueError("no samplings to choose from; candidates() gave none for this number of calls")
    pipeline = load_pipeline(pipeline)
    tried: dict[tuple[Sampling, int], float] = {}

    def distance(sampling: Sampling, n: int) -> float:
        if (sampling, n) not in tried:
            seeds = sample_seeds(validation.protocol.seed, "samples", n)
            changed, prompts = with_sampling(pipeline, sampling), validation.prompts[:n]
            scale, side = sampling.guidance_scale, validation.protocol.resolution
            size = {"height": side, "width": side}
            samples = generate(changed, prompts, seeds, sampling.steps, scale, batch_size, size, progress=False)
            found = ImageFeatures.of(samples.images, validation.extractor, validation.protocol.resize)
            tried[sampling, n] = frechet_distance(found.features, against.features)
        return tried[sampling, n]

    def best(found: Sequence[Sampling], n: int, keep: int) -> list[Sampling]:
        bar = tqdm(found, desc=f"{options[0].network_calls} calls, n = {n}", unit="sampling", disable=not progress)
        return sorted(bar, key=lambda sampling: distance(sampling, n))[:keep]

    first = min(count, len(validation.prompts))
    kept = best(options, first, finalists)
    kept = best([replace(s, solver=solver) for s in kept for solver in solvers], first, finalists)
    chosen = kept[0] if len(kept) == 1 else best(kept, len(validation.prompts), 1)[0]
    return chosen, [{**asdict(s), "n": n, "distance": value} for (s, n), value in tried.items()]


def baseline_rows(
    pipeline: Any, test: Benchmark, validation: Benchmark, calls: int, guided: bool = True, **options: Any
) -> tuple[list[Row], list[dict]]:
    """The best undistilled samplings at a number of calls, scored on the test prompts, and the search's record.

    ``undistilled-K`` has the least distance to the reference at any guidance (left out unless ``guided``); where the teacher's own samples are at
    hand, ``undistilled-K-matched`` has, at w = 1, the least distance to them. Of a flow there is one sampling at w = 1.
    ``options`` are those of ``search``.
    """
    space = FLOW_SPACE if is_flow(pipeline.scheduler.config) else {}
    options = {"solvers": (space["solver"],)} | options if space else options
    sets = [(f"undistilled-{calls}", candidates(calls, **space), validation.reference)] if guided else []
    if test.teacher is not None:
        sets.append((f"undistilled-{calls}-matched", candidates(calls, guidance=(1.0,), **space), test.teacher))
    rows, record = [], []
    for name, samplings, against in sets:
        chosen, tried = search(pipeline, validation, samplings, against, **options)
        record += [{"row": name, **line} for line in tried]
        rows.append(score_sampling(pipeline, test, chosen, name))
    return rows, record


def score_sampling(pipeline: Any, bench: Benchmark, sampling: Sampling, name: str, batch_size: int = 100) -> Row:
    """A row of the undistilled pipeline, sampled as told."""
    changed = with_sampling(load_pipeline(pipeline), sampling)
    row = evaluate(
        changed,
        bench,
        sampling.steps,
        sampling.guidance_scale,
        name=name,
        solver=sampling.solver,
        batch_size=batch_size,
    )
    return replace(row, settings={**row.settings, "sampling": asdict(sampling)})


def save_rows(path: str | Path, rows: Sequence[Row], command: str, **more: Any) -> Path:
    """Rows as JSON, with the command that makes them again; written aside, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "rows": [row.to_dict() for row in rows], **more}
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path


def load_rows(path: str | Path, bench: Benchmark | None = None) -> list[Row]:
    """Rows written by ``save_rows``, checked to belong to ``bench``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: made under another protocol, extractor or reference.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no stored rows at {path}; make them with eval/baselines.py")
    rows = [Row.from_dict(content) for content in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    wanted = bench.settings() if bench else {}
    for row in rows:
        for key in ("protocol", "extractor_sha256", "reference_sha256", "teacher_sha256"):
            if bench and row.settings.get(key) != wanted[key]:
                raise ValueError(
                    f"{path}: row {row.name} has {key} = {row.settings.get(key)}, this benchmark has {wanted[key]}; "
                    "make the rows again with eval/baselines.py"
                )
    return rows
