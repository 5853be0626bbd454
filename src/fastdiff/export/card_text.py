"""The words of the model card, made of facts only: what is unknown is left out, never left to be filled in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.export.experts import EXPERTS_FILE
from fastdiff.export.lora import DIFFUSERS_FILE, KOHYA_FILE
from fastdiff.export.student import StudentRecord
from fastdiff.models.sampler import SamplerSpec

METRICS = {
    "fid": "Frechet distance",
    "fid_to_teacher": "Frechet distance to the teacher",
    "kid": "kernel distance",
    "clip": "CLIP score",
    "retrieval": "R@1",
    "precision": "precision",
    "recall": "recall",
    "diversity": "diversity",
    "sharpness": "sharpness",
}
_SCHEDULERS = {
    "lcm": "LCMScheduler",
    "ddim": "DDIMScheduler",
    "flow": "FlowMatchEulerDiscreteScheduler",
    "tcd": "TCDScheduler",
}
_COMFY_SAMPLERS = {"lcm": ("lcm", "sgm_uniform"), "ddim": ("euler", "sgm_uniform"), "flow": ("euler", "simple")}
_TRAINED_INPUT_FROM = 950


@dataclass(frozen=True)
class Facts:
    """All that the card's text is made of."""

    record: StudentRecord
    repo_id: str
    pipeline_class: str
    license: str | None
    license_link: str | None
    full: bool
    lora: bool
    kohya: bool
    experts: bool
    grid: str | None
    datasets: tuple[str, ...]
    prompt: str
    saved_scheduler: str | None = None
    absent: tuple[str, ...] = ()
    """Parts that the pipeline was saved without and wants to be told so."""

    @property
    def scheduler(self) -> str:
        """Class of the student's scheduler: the one in its folder, or the usual one of its sampler."""
        return self.saved_scheduler or _SCHEDULERS[self.sampler.kind]

    @property
    def sampler(self) -> SamplerSpec:
        return self.record.sampler

    @property
    def source(self) -> str:
        return str(self.record.teacher.get("source") or "teacher")

    @property
    def base(self) -> str:
        """What a reader loads: the Hub id, or a stand-in for a folder of the author's own machine."""
        return self.base_model or f"path/to/{Path(self.source).name}"

    @property
    def base_model(self) -> str | None:
        """The teacher's Hub id; None for a local teacher, which has no page to point at."""
        source = self.source
        parts = source.split("/")
        plain = len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")
        return source if plain and not Path(source).exists() else None


def body(facts: Facts) -> str:
    """Markdown below the card's metadata."""
    sections = [
        _headline(facts),
        f"![Samples]({facts.grid})" if facts.grid else "",
        _usage(facts),
        _comfy(facts) if facts.kohya and not facts.experts else "",
        _metrics(facts.record.metrics),
        _training(facts),
        _limits(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _headline(facts: Facts) -> str:
    steps = len(facts.sampler)
    name = facts.repo_id.rsplit("/", 1)[-1]
    teacher = (
        f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
        if facts.base_model
        else f"`{Path(facts.source).name}`"
    )
    revision = facts.record.teacher.get("revision")
    at = f" at revision `{revision}`" if revision else ""
    return (
        f"# {name}\n\nA text-to-image model that samples in **{steps} step{'s' * (steps > 1)}**, distilled from "
        f"{teacher}{at} by the method `{facts.record.method}`."
    )


def _usage(facts: Facts) -> str:
    parts = ["## Usage"]
    if facts.full:
        parts.append("The repository is a whole pipeline; its scheduler holds the trained timesteps.")
        parts.append(full_snippet(facts))
    if facts.experts:
        parts.append(
            f"The student is several LoRAs, each for an interval of noise levels that `{EXPERTS_FILE}` names; a pipeline "
            "must switch between them as it goes. fastdiff's does; elsewhere, load each file under a name of its own and "
            "call `pipe.set_adapters` between steps."
        )
        parts.append(experts_snippet(facts))
    elif facts.lora:
        parts.append("The LoRA goes on the base model, at strength 1; add style LoRAs after it.")
        parts.append(lora_snippet(facts))
    return "\n\n".join(parts)


def full_snippet(facts: Facts) -> str:
    """Python that loads the pipeline folder; only the number of steps is passed unless the student is guided."""
    guidance = f", guidance_scale={facts.sampler.guidance_scale:g}" if facts.sampler.guidance_scale > 1 else ""
    call = _call(facts) + guidance
    told = "".join(f", {part}=None" for part in facts.absent)
    return _python(
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{facts.repo_id}", torch_dtype=torch.bfloat16{told}).to("cuda")',
        f"image = pipe({json.dumps(facts.prompt)}, {call}).images[0]",
    )


def lora_snippet(facts: Facts) -> str:
    """Python that puts the LoRA on the base model."""
    scheduler = facts.scheduler
    base, repo = facts.base, facts.repo_id
    return _python(
        "import torch",
        f"from diffusers import DiffusionPipeline, {scheduler}",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")',
        f'pipe.load_lora_weights("{repo}", weight_name="{DIFFUSERS_FILE}")',
        f'pipe.scheduler = {scheduler}.from_pretrained("{repo}", subfolder="scheduler")',
        f"image = pipe({json.dumps(facts.prompt)}, {_call(facts)}, "
        f"guidance_scale={facts.sampler.guidance_scale:g}).images[0]",
    )


def experts_snippet(facts: Facts) -> str:
    """Python that makes a pipeline which switches between experts."""
    return _python(
        "from fastdiff import Student",
        "from huggingface_hub import snapshot_download",
        "",
        f'student = Student(snapshot_download("{facts.repo_id}"))',
        f"image = student.pipeline()({json.dumps(facts.prompt)}, **student.call).images[0]",
    )


def _call(facts: Facts) -> str:
    arguments = facts.sampler.call_arguments()
    levels = (
        [f"sigmas=[{', '.join(f'{level:.6g}' for level in arguments.pop('sigmas'))}]"] if facts.sampler.sigmas else []
    )
    return ", ".join([*(f"{name}={value:g}" for name, value in arguments.items()), *levels])


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _comfy(facts: Facts) -> str:
    if facts.sampler.kind not in _COMFY_SAMPLERS:
        return "## ComfyUI\n\nStock ComfyUI has no TCD sampler: use diffusers, or a node that adds one."
    sampler, scheduler = _COMFY_SAMPLERS[facts.sampler.kind]
    if facts.sampler.kind != "flow" and facts.sampler.timesteps[0] < _TRAINED_INPUT_FROM:
        return (
            "## ComfyUI\n\n"
            f"This student starts at timestep {facts.sampler.timesteps[0]:g} from noise of unit variance. Stock ComfyUI "
            "nodes scale the noise of such a start down, so its pictures differ there: use diffusers."
        )
    cfg = max(1.0, facts.sampler.guidance_scale)
    return (
        f"## ComfyUI\n\nPut `{KOHYA_FILE}` into `models/loras`, load it with *Load LoRA* at model strength 1, and set "
        "*KSampler* to:\n\n| steps | cfg | sampler_name | scheduler | denoise |\n|---|---|---|---|---|\n"
        f"| {len(facts.sampler)} | {cfg:g} | {sampler} | {scheduler} | 1.0 |"
    )


def _metrics(metrics: Mapping[str, Any] | None) -> str:
    if not metrics or not metrics["rows"]:
        return ""
    rows = metrics["rows"]
    settings = ("steps", "network_calls", "guidance_scale", "solver")
    columns = [key for key in (*settings, *METRICS) if any(row.get(key) is not None for row in rows)]
    titles = [METRICS.get(key, key.replace("_", " ")) for key in columns]
    lines = [f"| model | {' | '.join(titles)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {row['name']} | {' | '.join(_cell(row, key) for key in columns)} |" for row in rows]
    return (
        f"## Results\n\nAll numbers follow the protocol `{metrics['protocol']}` and compare only with numbers of the "
        "same protocol; brackets hold 95 % intervals.\n\n" + "\n".join(lines)
    )


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    interval = (row.get("interval") or {}).get(key)
    return f"{text} [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else text


def _training(facts: Facts) -> str:
    record = facts.record
    times = ", ".join(f"{time:g}" for time in facts.sampler.timesteps)
    lines = [
        f"- method: `{record.method}`, student: {'LoRA' if record.kind == 'lora' else 'full weights'}",
        f"- sampler: `{facts.scheduler}` at timesteps {times}, guidance scale {facts.sampler.guidance_scale:g}",
        f"- teacher weights: `{record.teacher['fingerprint']}`" if record.teacher.get("fingerprint") else "",
        f"- data: {', '.join(facts.datasets)}" if facts.datasets else "",
        f"- versions: {', '.join(f'{name} {number}' for name, number in record.versions.items())}",
    ]
    text = "## Training\n\n" + "\n".join(line for line in lines if line)
    if not record.recipe:
        return text
    recipe = json.dumps(record.recipe, indent=2, default=str)
    return f"{text}\n\n<details><summary>Recipe</summary>\n\n```json\n{recipe}\n```\n\n</details>"


def _limits(facts: Facts) -> str:
    terms = ""
    if facts.license:
        link = f" ([terms]({facts.license_link}))" if facts.license_link else ""
        terms = f" It is a derivative of its teacher and carries the licence `{facts.license}`{link}."
    negative = (
        "" if facts.sampler.guidance_scale > 1 else " Negative prompts have no effect, since no guidance is run."
    )
    return (
        "## Limits\n\nThe student inherits the teacher's biases and failures, and was trained for the timesteps above: "
        f"other step counts may look worse.{negative}{terms}"
    )
