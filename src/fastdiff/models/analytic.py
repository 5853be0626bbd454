"""Teachers in closed form behind the interface of real ones, so that every method runs on them through the same engine.

Gaussians and mixtures of them give optima one can compute; a kernel density over real latents gives an exact
conditional teacher whose modes can be counted. Nothing was trained, so students and critics start from a small network
that `pretrain` fits to the exact denoiser, as real ones start from the teacher's weights.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.kernel import NULL_LABEL, KernelTeacher
from fastdiff.diffusion.losses import mse
from fastdiff.diffusion.mixture import GaussianMixture
from fastdiff.diffusion.prediction import Prediction, PredictionKind
from fastdiff.diffusion.randomness import Randomness
from fastdiff.diffusion.schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from fastdiff.models.analytic_networks import PointNet, ResidualNet
from fastdiff.models.codec import Codec
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families import Family
from fastdiff.models.roles import anchor

Law = Gaussian | GaussianMixture | KernelTeacher

KERNEL_LATENTS = Path(__file__).resolve().parents[1] / "assets" / "kernel_latents.safetensors"

_SD_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_IMAGE_SIDE = 4  # from this side on a sample is an image


class AnalyticFamily(Family):
    """How exact networks and their students are called: conditioning is `labels`, `(B,)` int64, -1 for none.

    Args:
        feature_tap: the module of the students' network that discriminators read.
    """

    name = "analytic"
    pipeline_classes = ()
    network_name = "network"
    lora_targets = ()
    attention_targets = ()

    def __init__(self, feature_tap: str) -> None:
        self.feature_tap = feature_tap

    def encode_prompts(self, pipeline: Mapping[str, int], prompts: Sequence[str], resolution: int) -> Conditioning:
        """Labels of `B` captions; `pipeline` is the map from caption to label.

        Raises:
            ValueError: for a caption this teacher does not have.
        """
        return Conditioning({"labels": torch.tensor([_label(pipeline, prompt) for prompt in prompts])})

    def null(self, pipeline: Mapping[str, int], resolution: int) -> Conditioning:
        return Conditioning({"labels": torch.tensor([NULL_LABEL])})

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, **inputs: Any) -> Tensor:
        return network(x_t, time, cond.tensors["labels"], **inputs)

    def feature_taps(self, network: nn.Module) -> dict[str, int]:
        if isinstance(network, ExactNetwork):
            return dict.fromkeys(("noisy", "clean"), network.channels)
        return {self.feature_tap: network.feature_channels}

    def middle_taps(self, network: nn.Module) -> dict[str, int]:
        # A closed form has no middle: all that can be said about a noisy sample is itself and its denoised version.
        return self.feature_taps(network)


class ExactNetwork(nn.Module):
    """The optimal denoiser of a law, in the parameterisation and with the time input of a network; no parameters.

    Its features, for discriminators, are its input (`noisy`) and its clean prediction (`clean`).
    """

    def __init__(self, law: Law, schedule: NoiseSchedule, kind: PredictionKind) -> None:
        super().__init__()
        self.law, self.schedule, self.kind = law, schedule, kind
        self.noisy, self.clean = nn.Identity(), nn.Identity()
        self.register_buffer("anchor", torch.zeros(()))  # tells device and dtype to whoever asks

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """`x_t` `(B, ...)`, `time` `(B,)` as networks are fed, `labels` `(B,)` -> native prediction like `x_t`."""
        t = _schedule_time(self.schedule, time)
        x_t = self.noisy(x_t)
        x0 = self.clean(self.law.denoise(x_t, t, self.schedule, labels))
        return Prediction.from_x0(x0, x_t, t, self.schedule).as_kind(self.kind).to(x_t.dtype)

    @property
    def channels(self) -> int:
        """Channels of a sample, a point being `(d, 1, 1)`."""
        if isinstance(self.law, KernelTeacher):
            return self.law.shape[0]
        return len((self.law if isinstance(self.law, Gaussian) else self.law.components[0]).mean)

    def enable_gradient_checkpointing(self, _function: Callable) -> None:
        """There is nothing to recompute."""


class AnalyticTeacher:
    """A closed-form law seen as a teacher (`TeacherLike`); takes no adapters.

    Args:
        law: what is to be sampled.
        shape: `(C, H, W)` of one sample; `H = W`.
        captions: caption -> label; the empty caption is always the null label.
        schedule: Stable Diffusion's betas if not given.
        prediction_type: what the exact network and its students predict.
        codec: turns samples into images; without it samples are their own images.
        start: what students and critics start from; a small untrained network by default. See `pretrain`.
        source: name in logs and checkpoints.
    """

    adaptable = False

    def __init__(
        self,
        law: Law,
        shape: tuple[int, int, int],
        captions: Mapping[str, int],
        *,
        schedule: NoiseSchedule | None = None,
        prediction_type: PredictionKind = "epsilon",
        codec: Codec | None = None,
        start: nn.Module | None = None,
        source: str = "analytic",
    ) -> None:
        self.law, self.shape, self.captions, self.codec, self.source = law, shape, dict(captions), codec, source
        self.schedule = schedule or VPSchedule.from_scheduler_config(_SD_BETAS)
        self.prediction_type = prediction_type
        self.network: nn.Module = ExactNetwork(law, self.schedule, prediction_type).eval()
        self.start = start or _small_network(shape, max(self.captions.values(), default=0) + 1)
        self.family = AnalyticFamily(getattr(self.start, "feature_tap", ""))

    @classmethod
    def gaussian(cls, mean: Tensor, cov: Tensor, **settings: Any) -> AnalyticTeacher:
        """N(mean, cov) over samples `(d, 1, 1)`; `settings` are those of the class."""
        source = f"gaussian-{_digest(mean, cov)}"
        return cls(Gaussian(mean, cov), (len(mean), 1, 1), {"a sample": 0}, **{"source": source, **settings})

    @classmethod
    def mixture(
        cls, weights: Tensor | Sequence[float], means: Tensor, covariances: Tensor, **settings: Any
    ) -> AnalyticTeacher:
        """A mixture over samples `(d, 1, 1)` whose component k has the caption `component k`."""
        law = GaussianMixture(weights, means, covariances)
        source = f"mixture-{_digest(law.weights, means, covariances)}"
        captions = {f"component {k}": k for k in range(len(means))}
        return cls(law, (means.shape[1], 1, 1), captions, **{"source": source, **settings})

    @classmethod
    def kernel(cls, path: str | Path = KERNEL_LATENTS, bandwidth: float | None = None, **settings: Any):
        """The kernel density over the latents of a file, by caption group.

        Args:
            path: `.safetensors` with `latents` `(N, C, H, W)` and `groups` `(N,)`; beside it, with the same name, a
                `.json` with `groups` (the captions in the order of their numbers, or caption -> number) and maybe
                `bandwidth`.
            bandwidth: standard deviation of each mode; the file's, or 0.1, if not given.
            settings: those of the class.

        Raises:
            FileNotFoundError: if either file is missing.
            ValueError: if they lack what is named above.
        """
        latents, groups, captions, stored = _read_kernel(Path(path))
        width = bandwidth or stored or 0.1
        source = f"kernel-{_digest(latents, groups, torch.tensor(width))}"
        shape = tuple(latents.shape[1:])
        return cls(KernelTeacher(latents, groups, width), shape, captions, **{"source": source, **settings})

    def schedule_at(self, resolution: int) -> NoiseSchedule:
        """The schedule; no resolution changes it."""
        return self.schedule

    @property
    def default_resolution(self) -> int:
        """Pixels of one side of a decoded sample."""
        return self.shape[-1] * (self.codec.factor if self.codec else 1)

    def encode(self, prompts: Sequence[str], resolution: int) -> Conditioning:
        """Labels of `B` captions."""
        return self.family.encode_prompts(self.captions, prompts, resolution)

    def null(self, resolution: int) -> Conditioning:
        """The null label, one row."""
        return self.family.null(self.captions, resolution)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Shape of one sample.

        Raises:
            ValueError: at any resolution but the law's own.
        """
        if resolution != self.default_resolution:
            raise ValueError(f"this closed-form teacher has --resolution {self.default_resolution}, got {resolution}")
        return self.shape

    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images to samples."""
        return self.codec.encode(images, noise) if self.codec else images

    def decode(self, latents: Tensor) -> Tensor:
        """Samples to images."""
        return self.codec.decode(latents) if self.codec else latents

    def new_network(self) -> nn.Module:
        """A copy of `start`, for students and critics."""
        return copy.deepcopy(self.start)

    def identity(self) -> dict[str, str | None]:
        """The name holds a hash of the law."""
        return {"source": self.source, "revision": None, "fingerprint": self.source}

    def sample(self, z: Tensor, u: Tensor, labels: Tensor) -> Tensor:
        """Exact data from normal `z` `(B, C, H, W)`, uniform `u` `(B,)` and `labels` `(B,)`, shaped like `z`."""
        if isinstance(self.law, Gaussian):
            return self.law.sample(z)
        return self.law.sample(z, u, labels)


def pretrain(
    network: nn.Module,
    teacher: AnalyticTeacher,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    seed: int = 0,
    null_share: float = 0.1,
) -> float:
    """Regresses the teacher's exact prediction on noised data at uniform times; returns the last step's error.

    Call it as `pretrain(teacher.start, teacher, steps)`: students and critics then start as the teacher does.
    """
    schedule, classes = teacher.schedule, max(teacher.captions.values()) + 1
    indices = torch.arange(batch_size, device=anchor(network).device)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.full((), math.nan)
    for step in range(steps):
        random = Randomness(seed, step, indices)
        labels = random.integers("label", 0, classes).masked_fill(random.bernoulli("null", null_share), NULL_LABEL)
        x0 = teacher.sample(random.normal("z", teacher.shape), random.uniform("mode"), labels)
        t = schedule.t_min + (schedule.t_max - schedule.t_min) * random.uniform("t")
        x_t = schedule.add_noise(x0, random.normal("eps", teacher.shape), t)
        time = schedule.network_time(t)
        loss = mse(network(x_t, time, labels), teacher.network(x_t, time, labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return loss.item()


def _small_network(shape: tuple[int, int, int], classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # every process and every run starts alike
        if shape[-1] >= _IMAGE_SIDE:
            return ResidualNet(math.prod(shape), classes)
        return PointNet(math.prod(shape), classes)


def _schedule_time(schedule: NoiseSchedule, time: Tensor) -> Tensor:
    """Inverse of `schedule.network_time`."""
    if isinstance(schedule, FlowSchedule):
        return time / 1000
    if isinstance(schedule, EDMSchedule):
        return (4 * time).exp()
    return time


def _label(captions: Mapping[str, int], prompt: str) -> int:
    if prompt == "":
        return NULL_LABEL
    if prompt not in captions:
        near = difflib.get_close_matches(prompt, captions, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"this closed-form teacher has no caption {prompt!r}, only {sorted(captions)}.{hint}")
    return captions[prompt]


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to("cpu", torch.float64).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_kernel(path: Path) -> tuple[Tensor, Tensor, dict[str, int], float | None]:
    from safetensors.torch import load_file

    described = path.with_suffix(".json")
    for file in (path, described):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: a kernel teacher is a .safetensors and a .json of one name")
    tensors, notes = load_file(path), json.loads(described.read_text(encoding="utf-8"))
    captions = notes if isinstance(notes, list) else notes.get("groups", notes.get("captions"))
    if captions is None or not {"latents", "groups"} <= tensors.keys():
        raise ValueError(
            f"{path} holds {sorted(tensors)} and {described.name} {sorted(notes)}: expected tensors 'latents' and "
            "'groups', and captions under 'groups'"
        )
    if not isinstance(captions, dict):
        captions = {caption: number for number, caption in enumerate(captions)}
    groups = tensors["groups"].to(torch.int64)
    if set(groups.tolist()) != set(captions.values()):
        raise ValueError(f"{described.name} names groups {sorted(captions.values())}, {path.name} has others")
    bandwidth = notes.get("bandwidth") if isinstance(notes, dict) else None
    return tensors["latents"].float(), groups, captions, bandwidth
