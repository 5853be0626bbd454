"""A diffusers pipeline seen as denoiser, conditioner, codec and noise schedule."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff.diffusion.prediction import PredictionKind
from fastdiff.diffusion.schedules import NoiseSchedule, is_flow, schedule_from_config
from fastdiff.models.absent import absent_parts
from fastdiff.models.codec import Codec
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.embedded import EMBEDDED_FLOW, SHIPPED, embedded_flow
from fastdiff.models.families import Family, family_of

_SIGNS_PER_TENSOR = 4096


class TeacherLike(Protocol):
    """What a run needs of its teacher; `Teacher` and `AnalyticTeacher` offer it."""

    family: Family
    network: nn.Module
    schedule: NoiseSchedule
    prediction_type: PredictionKind
    adaptable: bool
    default_resolution: int

    def encode(self, prompts: Sequence[str], resolution: int) -> Conditioning: ...

    def null(self, resolution: int) -> Conditioning: ...

    def schedule_at(self, resolution: int) -> NoiseSchedule: ...

    def latent_shape(self, resolution: int) -> tuple[int, int, int]: ...

    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def new_network(self) -> nn.Module: ...

    def identity(self) -> dict[str, str | None]: ...


class Teacher:
    """The model that is distilled.

    Args:
        pipeline: a diffusers text-to-image pipeline of a supported family.
        source: where it came from; a folder, a Hub id, `embedded` or `embedded-flow`.
        revision: the Hub revision, if any.
        variant, cache_dir, config: how it was loaded, for `reloaded`.

    Raises:
        ValueError: if the pipeline class or its scheduler is not supported.
    """

    adaptable = True

    def __init__(
        self,
        pipeline: Any,
        source: str = "",
        revision: str | None = None,
        variant: str | None = None,
        cache_dir: str | None = None,
        config: str | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.source = source
        self.revision = revision
        self.variant = variant
        self._files = {"cache_dir": cache_dir, "config": config}
        self.family = family_of(type(pipeline).__name__)
        self.family.prepare(pipeline)
        self.network: nn.Module = getattr(pipeline, self.family.network_name).requires_grad_(False).eval()
        self.codec: Codec = self.family.codec(pipeline.vae)
        self.schedule = self.schedule_at(self.default_resolution)
        self.prediction_type = prediction_type_of(scheduler_config(pipeline))
        self._home: torch.device | None = None
        self._fingerprint: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        cache_dir: str | None = None,
        config: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Teacher:
        """Loads a pipeline folder, a `.safetensors` single file, a Hub id, or a teacher shipped here.

        Those are `embedded` (noise prediction by a UNet) and `embedded-flow` (rectified flow by an SD3 transformer).

        Args:
            source: what to load.
            revision, variant, cache_dir: as in `DiffusionPipeline.from_pretrained`.
            config: local folder with the configs of a single-file checkpoint, needed offline.
            dtype: storage of all frozen weights.
            device: where to put them.

        Raises:
            FileNotFoundError: if a local-looking path does not exist or is not a pipeline.
            ValueError: if weights are pickled or the pipeline class is not supported.
        """
        source = str(source)
        if source == EMBEDDED_FLOW:
            pipeline = embedded_flow(dtype)
        else:
            path = SHIPPED.get(source, Path(source))
            _refuse_bad_path(source, path)
            target = str(path) if path.exists() else source
            pipeline = _load(target, revision, variant, cache_dir, config, dtype)
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline.to(device), source, revision, variant, cache_dir, config)

    def reloaded(self) -> Teacher:
        """Itself as it was loaded, anew from where it came, on the CPU; for teachers that have a `source`."""
        return Teacher.from_pretrained(self.source, revision=self.revision, variant=self.variant, **self._files)

    def replace_autoencoder(self, autoencoder: nn.Module) -> None:
        """Takes another autoencoder for the pipeline's own."""
        self.pipeline.register_modules(vae=autoencoder)
        self.codec = self.family.codec(autoencoder)

    def to(self, device: torch.device | str) -> Teacher:
        """Moves everything to a device, but for encoders that rest on the CPU."""
        if self._home is None:
            self.pipeline.to(device)
        else:
            self.network.to(device)
        return self

    def encoders_to(self, device: torch.device | str) -> Teacher:
        """Moves what a cache needs and nothing else: text encoders and autoencoder."""
        for part in (*self._text_encoders, self.pipeline.vae):
            part.to(device)
        return self

    def offload_encoders(self) -> None:
        """From now on text encoders and autoencoder rest on the CPU, and are moved to the network's device to work."""
        self._home = torch.device("cpu")
        for part in (*self._text_encoders, self.pipeline.vae):
            part.to(self._home)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], resolution: int) -> Conditioning:
        """Conditioning of `B` prompts."""
        with self._at_work(*self._text_encoders):
            return self.family.encode_prompts(self.pipeline, prompts, resolution)

    @torch.no_grad()
    def null(self, resolution: int) -> Conditioning:
        """The unconditional row of this teacher."""
        with self._at_work(*self._text_encoders):
            return self.family.null(self.pipeline, resolution)

    @property
    def default_resolution(self) -> int:
        """Pixels of the size the network was trained at."""
        return self.family.sample_size(self.network) * self.codec.factor

    def schedule_at(self, resolution: int) -> NoiseSchedule:
        """The noise schedule for images of `resolution` pixels; in some families its shift depends on their size."""
        tokens = (resolution // self.codec.factor // self.family.patch(self.network)) ** 2
        return schedule_from_config(scheduler_config(self.pipeline), tokens)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Shape `(C, H, W)` of one latent.

        Raises:
            ValueError: if the resolution is not a multiple of a token's side.
        """
        factor = self.codec.factor
        token = factor * self.family.patch(self.network)
        if resolution < token or resolution % token:
            raise ValueError(f"--resolution must be a positive multiple of {token} for this teacher, got {resolution}")
        return (self.codec.channels, resolution // factor, resolution // factor)

    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images in [-1, 1] to latents."""
        with self._at_work(self.pipeline.vae):
            return self.codec.encode(images, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images in [-1, 1]."""
        with self._at_work(self.pipeline.vae, stays=torch.is_grad_enabled() and latents.requires_grad):
            return self.codec.decode(latents)

    @property
    def _text_encoders(self) -> list[nn.Module]:
        return [part for name, part in self.pipeline.components.items() if name.startswith("text_encoder") and part]

    @contextlib.contextmanager
    def _at_work(self, *parts: nn.Module, stays: bool = False) -> Iterator[None]:
        """Inside, offloaded parts are beside the network; what backward will need stays there."""
        if self._home is None:
            yield
            return
        device = next(iter(self.network.state_dict().values())).device
        for part in parts:
            part.to(device)
        try:
            yield
        finally:
            for part in () if stays else parts:
                part.to(self._home)

    @contextlib.contextmanager
    def replaced(self, networks: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
        """Inside, the pipeline has another network with the same weights, if there is one for its own."""
        own = self.network
        self._serve(networks.get(own, own))
        try:
            yield
        finally:
            self._serve(own)

    def _serve(self, network: nn.Module) -> None:
        self.network = network
        setattr(self.pipeline, self.family.network_name, network)

    def new_network(self) -> nn.Module:
        """A copy of the teacher's network with the same weights, for full students and critics."""
        return copy.deepcopy(self.network)

    def identity(self) -> dict[str, str | None]:
        """What a checkpoint or cache stores to find and recognise this teacher again: where from, and a fingerprint.

        The fingerprint is taken when it is first asked for: a run may store the weights in fewer bits later.
        """
        self._fingerprint = self._fingerprint or fingerprint(self.network)
        own = {"source": self.source, "revision": self.revision, "fingerprint": self._fingerprint}
        return own | ({"variant": self.variant} if self.variant else {})


def fingerprint(network: nn.Module) -> str:
    """A short hash over config, names, shapes and the signs of a sample of every weight.

    Signs survive rounding to any dtype, also where small weights underflow; rounded values would not. Where the weights
    were loaded from and by which version of diffusers does not count.
    """
    config = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in network.state_dict().items():
        if "lora_" in name:
            continue
        digest.update(f"{name.replace('base_layer.', '')}{tuple(tensor.shape)}".encode())
        values = tensor.flatten()[:: tensor.numel() // _SIGNS_PER_TENSOR + 1]
        digest.update(values.signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def scheduler_config(pipeline: Any) -> dict[str, Any]:
    """The config of a pipeline's scheduler, with the class name that one made in code lacks."""
    return {"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config}


def prediction_type_of(config: Mapping[str, Any]) -> str:
    """What a network predicts, as its scheduler's config says."""
    if is_flow(config):
        return "flow"
    return config.get("prediction_type", "epsilon")


def _refuse_bad_path(source: str, path: Path) -> None:
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"{source}: pickled weights are not loaded. Convert the file to .safetensors first.")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{source}: this folder holds no model_index.json, so it is not a diffusers pipeline. "
            "Give the folder that pipeline.save_pretrained wrote, not its unet/ subfolder."
        )
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix == ".safetensors"
    if looks_local and not path.exists():
        raise FileNotFoundError(
            f"teacher {source!r} does not exist. Give a pipeline folder, a .safetensors file, or a Hub id."
        )


def _load(target: str, revision: str | None, variant: str | None, cache_dir: str | None, config: str | None, dtype):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    if target.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(target, "pt") as weights:
            is_xl = any(name.startswith("conditioner.embedders.1") for name in weights.keys())
        single = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
        return single.from_single_file(target, config=config, torch_dtype=dtype, local_files_only=config is not None)
    settings = {"revision": revision, "variant": variant, "cache_dir": cache_dir, "torch_dtype": dtype}
    try:
        return DiffusionPipeline.from_pretrained(target, use_safetensors=True, **settings, **absent_parts(target))
    except OSError as error:
        if ".bin" in str(error) or "safetensors" in str(error):
            raise ValueError(
                f"{target}: no .safetensors weights found; pickled weights are not loaded. ({error})"
            ) from error
        raise FileNotFoundError(f"teacher {target!r} could not be loaded: {error}") from error
