"""A Stable Diffusion pipeline that samples a few-step student without any flag: `pipe("a cat")`.

    pipe = DiffusionPipeline.from_pretrained(student, custom_pipeline="fastdiff_few_step.py", trust_remote_code=True)

The number of steps and the guidance scale come from the student's `fastdiff.json`; what the caller passes wins.
"""

import json
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from diffusers import StableDiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

RECORD_FILE = "fastdiff.json"


class FastdiffFewStepPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` with the trained number of steps and guidance as its defaults."""

    @cached_property
    def trained_sampler(self):
        """Settings the student was trained for: `timesteps`, `guidance_scale` and more.

        Raises:
            ValueError: if the pipeline was not loaded from a student folder or repository with a `fastdiff.json`.
        """
        source = self.config.get("_name_or_path")
        if not source:
            raise ValueError(
                "this pipeline was not loaded from a student; pass num_inference_steps and guidance_scale."
            )
        path = Path(source) / RECORD_FILE
        if not Path(source).exists():
            with suppress(EntryNotFoundError):
                path = Path(hf_hub_download(source, RECORD_FILE))
        if not path.is_file():
            raise ValueError(f"{source} holds no {RECORD_FILE}; pass num_inference_steps and guidance_scale.")
        return json.loads(path.read_text(encoding="utf-8"))["sampler"]

    def __call__(self, prompt=None, *, num_inference_steps=None, guidance_scale=None, **kwargs):
        """As `StableDiffusionPipeline.__call__`; None takes the trained value."""
        if num_inference_steps is None and kwargs.get("timesteps") is None:
            num_inference_steps = len(self.trained_sampler["timesteps"])
        if guidance_scale is None:
            guidance_scale = self.trained_sampler["guidance_scale"]
        steps = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
        return super().__call__(prompt, guidance_scale=guidance_scale, **steps, **kwargs)
