"""Loads exported files in a fresh stock pipeline and compares them with the network that is being trained.

A partial load is an error here: module counts, diffusers' own warnings, the network's output and a whole sample are
all checked, since each of them alone misses a way in which LoRA files go wrong silently.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import FlowSchedule, NoiseSchedule
from fastdiff.export.experts import EXPERTS_FILE, load_experts
from fastdiff.export.lora import count_modules
from fastdiff.models.absent import absent_parts
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families import Family
from fastdiff.models.roles import adapter_layers
from fastdiff.models.sampler import SamplerSpec, sample

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
GPU_TOLERANCE = 1e-4
"""On one GPU, whose kernels sum in orders of their own for merged weights and adapters (not measured: none was at hand)."""
APART_TOLERANCE = 1e-3
"""Between a GPU and a CPU."""
HALF_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_BAD_WARNING = re.compile(
    r"unexpected key|missing key|not used when init|newly initialized|not expected by|unsupported key"
    r"|will be ignored|load report|no lora keys associated to \S+ found with the prefix='(?:unet|transformer)'",
    re.IGNORECASE,
)
# diffusers itself saves this attribute of AutoencoderTiny and then warns about it.
_HARMLESS = re.compile(r"config attributes \{'block_out_channels': [^}]*\} were passed to AutoencoderTiny")


class LoadBackError(RuntimeError):
    """An exported file does not give back the trained student; the message says which and by how much."""


@dataclass(frozen=True)
class Probe:
    """What the trainer's student answers to fixed inputs, made by `make_probe`; all tensors on the CPU.

    `outputs[k]` is the native output at the k-th trained time for the input `noise`; `sample` is the trainer's sampler
    run with step noise drawn from a CPU generator seeded with `seed`, as stock schedulers draw it. Loaded files are
    asked on `device`; answers of `made_on`, another one, may differ more.
    """

    conditioning: Conditioning
    noise: Tensor
    seed: int
    times: Tensor
    outputs: tuple[Tensor, ...]
    sample: Tensor
    made_on: torch.device = torch.device("cpu")
    device: torch.device = torch.device("cpu")

    def allowed(self, tolerance: float, device: torch.device) -> float:
        """The largest allowed error of files that are asked on `device`."""
        if device.type == self.made_on.type == "cpu":
            return tolerance
        return max(tolerance, GPU_TOLERANCE if device.type == self.made_on.type else APART_TOLERANCE)


@dataclass(frozen=True)
class LoadBackCheck:
    """One exported form: errors are maxima, relative to the largest reference value (or 1 if that is smaller)."""

    name: str
    network_error: float
    sample_error: float
    modules_saved: int
    modules_loaded: int
    warnings: tuple[str, ...]
    tolerance: float

    def problems(self) -> list[str]:
        """Why this form does not give the student back; empty when it does."""
        found = []
        if self.modules_loaded != self.modules_saved:
            found.append(f"{self.modules_loaded} of {self.modules_saved} modules were loaded")
        for title, error in (("network output", self.network_error), ("sample", self.sample_error)):
            if not error <= self.tolerance:
                found.append(f"{title} differs by {error:.2e} (allowed {self.tolerance:.0e})")
        return found + [f"diffusers warned: {text}" for text in self.warnings]


@dataclass(frozen=True)
class LoadBackReport:
    """All checks of an export."""

    checks: tuple[LoadBackCheck, ...]

    @property
    def ok(self) -> bool:
        return not any(check.problems() for check in self.checks)

    @property
    def max_error(self) -> float:
        """The largest error of any check."""
        return max(max(check.network_error, check.sample_error) for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "max_error": self.max_error, "checks": [asdict(check) for check in self.checks]}

    def require_ok(self) -> LoadBackReport:
        """Itself.

        Raises:
            LoadBackError: if any check has a problem.
        """
        bad = [f"{check.name}: {'; '.join(check.problems())}" for check in self.checks if check.problems()]
        if bad:
            raise LoadBackError("the exported student does not load back equal to the trained one. " + " | ".join(bad))
        return self


@contextlib.contextmanager
def _whole_float32() -> Iterator[None]:
    """Inside, GPUs multiply float32 in float32: TF32 keeps ten bits of it."""
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    were = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, was in zip(switches, were, strict=True):
            switch.allow_tf32 = was


@torch.no_grad()
@_whole_float32()
def make_probe(
    predict: Callable[[Tensor, Tensor, Conditioning], Prediction],
    conditioning: Conditioning,
    latent_shape: tuple[int, ...],
    sampler: SamplerSpec,
    schedule: NoiseSchedule,
    family: Family,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Probe:
    """Asks the trainer's own student; costs 2 network calls a step.

    Args:
        predict: (x_t, t, conditioning) -> the student's prediction: unguided, or with `sampler.guidance_scale` fed to its
            guidance embedding if it has a trained one.
        conditioning: a few prompts' worth; `len(conditioning)` samples are made.
        latent_shape: (C, H, W) of one latent.
        sampler: the trained sampler.
        schedule: the student's noise schedule.
        family: whose pipeline is to draw the same noise between steps.
        device: where `predict` wants its inputs.
        seed: of the noise.
    """
    made_on = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(conditioning), *latent_shape), generator=generator)
    cond = conditioning.to(device=torch.device(device))
    x = noise.to(device)
    steps = torch.Generator().manual_seed(seed)

    def ask(x_t: Tensor, t: Tensor, _end: Tensor) -> Prediction:
        return predict(x_t, t, cond)

    times = [torch.full((len(x),), t, dtype=torch.float32, device=device) for t in sampler.schedule_times(schedule)]
    outputs = tuple(predict(x, t, cond).native.float().cpu() for t in times)
    made = sample(sampler, ask, x, lambda _: family.step_noise(noise, steps).to(device), schedule)
    fed = torch.stack([schedule.network_time(t)[0].cpu().float() for t in times])
    # A stock flow scheduler that renoises draws on its own device, where no generator of a CPU reaches.
    own_noise = isinstance(schedule, FlowSchedule) and sampler.kind == "lcm" and len(sampler) > 1
    asked_on = torch.device("cpu") if own_noise else made_on
    cpu = conditioning.to(device=torch.device("cpu"))
    return Probe(cpu, noise, seed, fed, outputs, made.float().cpu(), made_on, asked_on)


def check_pipeline(
    folder: str | Path, probe: Probe, sampler: SamplerSpec, family: Family, tolerance: float = TOLERANCE
) -> LoadBackCheck:
    """Loads a student's pipeline folder with plain `DiffusionPipeline.from_pretrained` and compares.

    Plain but for T5, where the teacher had none: diffusers wants `text_encoder_3=None` said.

    The sample is made with the pipeline's default guidance if that has been switched off in the export.
    """
    from diffusers import DiffusionPipeline

    with _bad_warnings() as caught:
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent_parts(folder))
    return _compare("pipeline", pipeline, probe, sampler, family, tolerance, (0, 0), tuple(caught))


def check_lora(
    path: str | Path,
    fresh_pipeline: Callable[[], DiffusionPipeline],
    scheduler: SchedulerMixin,
    probe: Probe,
    sampler: SamplerSpec,
    family: Family,
    expected_modules: int | None = None,
    tolerance: float = TOLERANCE,
) -> LoadBackCheck:
    """Loads a LoRA file into a fresh stock pipeline with plain `load_lora_weights` and compares.

    Args:
        path: the file, in diffusers' or kohya's form.
        fresh_pipeline: loads the teacher's pipeline again, e.g. `lambda: DiffusionPipeline.from_pretrained(teacher)`.
        scheduler: what the user is told to set; it is rebuilt from its config.
        probe: the trainer's answers.
        sampler: the trained sampler.
        family: how the network is called.
        expected_modules: modules the trained adapter has; None trusts the file.
        tolerance: largest allowed error.
    """
    path = Path(path)
    pipeline = fresh_pipeline()
    pipeline.scheduler = type(scheduler).from_config(dict(scheduler.config))
    network = getattr(pipeline, family.network_name)
    with _bad_warnings() as caught:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
    loaded = [layer for _, layer in adapter_layers(network)]
    caught += [
        f"a loaded module has strength {strength} instead of 1"
        for strength in sorted({s for layer in loaded for s in layer.scaling.values()} - {1.0})
    ]
    saved = count_modules(path) if expected_modules is None else expected_modules
    counts = (saved, len(loaded))
    return _compare(path.name, pipeline, probe, sampler, family, tolerance, counts, tuple(caught))


def check_experts(
    folder: str | Path,
    pipeline: DiffusionPipeline,
    scheduler: SchedulerMixin,
    probe: Probe,
    sampler: SamplerSpec,
    family: Family,
    tolerance: float = TOLERANCE,
) -> LoadBackCheck:
    """Loads all experts of a student folder into a fresh pipeline of the teacher, which switches, and compares.

    `probe` holds the answers of the expert whose time it is; the other arguments are as in `check_lora`.
    """
    pipeline.scheduler = type(scheduler).from_config(dict(scheduler.config))
    with _bad_warnings() as caught:
        load_experts(pipeline, folder, family.network_name)
    return _compare(EXPERTS_FILE, pipeline, probe, sampler, family, tolerance, (0, 0), tuple(caught))


def _compare(
    name: str,
    pipeline: DiffusionPipeline,
    probe: Probe,
    sampler: SamplerSpec,
    family: Family,
    tolerance: float,
    counts: tuple[int, int],
    caught: tuple[str, ...],
) -> LoadBackCheck:
    pipeline.set_progress_bar_config(disable=True)
    device = probe.device
    try:
        errors = _errors(pipeline, probe, sampler, family, device)
    except NotImplementedError:  # weights that are not there cannot be moved; diffusers has warned of them
        errors = (math.inf, math.inf)
    except torch.OutOfMemoryError:
        logger.warning("%s does not fit beside the run: it is compared on the CPU, which takes long", name)
        device = torch.device("cpu")
        pipeline.to(device)
        torch.cuda.empty_cache()
        errors = _errors(pipeline, probe, sampler, family, device)
    return LoadBackCheck(name, *errors, *counts, caught, probe.allowed(tolerance, device))


@torch.no_grad()
@_whole_float32()
def _errors(
    pipeline: DiffusionPipeline, probe: Probe, sampler: SamplerSpec, family: Family, device: torch.device
) -> tuple[float, float]:
    """Largest errors of the network's outputs and of a sample, asked on `device`."""
    pipeline.to(device)
    network: nn.Module = getattr(pipeline, family.network_name)
    dtype = next(network.parameters()).dtype
    cond = probe.conditioning.to(device, dtype)
    x = probe.noise.to(device, dtype)
    inputs, call = _guidance(pipeline, network, sampler, family, len(x))
    network_error = max(
        _error(family.call(network, x, time.to(device).expand(len(x)), cond, **inputs), expected)
        for time, expected in zip(probe.times, probe.outputs, strict=True)
    )
    pixels = x.shape[-1] * family.codec(pipeline.vae).factor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(probe.seed)  # pipelines of flows do not hand their generator on to the scheduler
        made = pipeline(
            **family.sampling_arguments(cond, x, pixels),
            **sampler.call_arguments(),
            generator=torch.Generator().manual_seed(probe.seed),
            output_type="latent",
            **call,
        ).images
    return network_error, _error(family.sampled(made, x), probe.sample)


def _guidance(
    pipeline: DiffusionPipeline, network: nn.Module, sampler: SamplerSpec, family: Family, rows: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Inputs of the network and arguments of the pipeline that stand for the guidance the probe was made with.

    A trained guidance embedding is fed the sampler's scale; one that only switches guidance off is left to the
    pipeline's default, to prove that it does; a network without one is compared unguided.
    """
    weight = next(network.parameters())
    if family.embeds_guidance(network):
        told = torch.full((rows,), sampler.guidance_scale, device=weight.device)
        return {"guidance": told}, {"guidance_scale": sampler.guidance_scale}
    size = network.config.get("time_cond_proj_dim")
    if not size:
        return {}, {"guidance_scale": 0.0}
    if sampler.guidance_scale <= 1:
        return {}, {}
    strength = torch.full((rows,), sampler.guidance_scale - 1)
    embedding = pipeline.get_guidance_scale_embedding(strength, embedding_dim=size)
    return {"timestep_cond": embedding.to(weight)}, {"guidance_scale": sampler.guidance_scale}


def _error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value or 1; infinite if anything is not finite."""
    difference = (actual.float().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1.0)
    return float(difference) if torch.isfinite(difference) else float("inf")


@contextlib.contextmanager
def _bad_warnings() -> Iterator[list[str]]:
    """Collects warnings of diffusers, transformers and peft that mean that something was not loaded."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    found: list[str] = []
    collector = _Collector(found)
    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    handlers = [list(logger.handlers) for logger in loggers]
    with warnings.catch_warnings(record=True) as python_warnings:
        warnings.simplefilter("always")
        for library, level, logger in zip(libraries, levels, loggers):
            library.set_verbosity(min(level, logging.WARNING))
            logger.handlers = [collector]  # harmless warnings are not shown
        try:
            yield found
        finally:
            for library, level, logger, kept in zip(libraries, levels, loggers, handlers):
                logger.handlers = kept
                library.set_verbosity(level)
            found += [str(w.message) for w in python_warnings if _is_bad(str(w.message))]


class _Collector(logging.Handler):
    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if _is_bad(message):
            self._found.append(message)


def _is_bad(message: str) -> bool:
    return bool(_BAD_WARNING.search(message)) and not _HARMLESS.search(message)
