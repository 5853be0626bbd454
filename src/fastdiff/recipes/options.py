"""What a run can be told besides the loop's settings and the method's config; and the names other scripts use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class TeacherOptions:
    """The model that is distilled.

    Args:
        pretrained_teacher_model: pipeline folder, .safetensors file, Hub id, or `embedded` for the one shipped here.
        teacher_revision: Hub revision of the teacher.
        variant: file variant of the teacher, such as fp16.
        cache_dir: where Hub downloads are kept.
        teacher_config: folder with the configs of a single-file teacher, needed offline.
        pretrained_vae_model_name_or_path: another autoencoder for the teacher, folder or Hub id.
        cast_teacher_unet: store frozen weights in the type of mixed_precision (half the memory of the base).
        offload_encoders: keep text encoders and autoencoder on the CPU, and move them to the device for their work only.
        enable_xformers_memory_efficient_attention: use xformers if it can be imported, else warn and go on.
        init_from: start from an earlier student: its folder, or a checkpoint of its run.
    """

    pretrained_teacher_model: str | None = None
    teacher_revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    teacher_config: str | None = None
    pretrained_vae_model_name_or_path: str | None = None
    cast_teacher_unet: bool = False
    offload_encoders: bool = False
    enable_xformers_memory_efficient_attention: bool = False
    init_from: str | None = None


@dataclass(frozen=True)
class DataOptions:
    """What is trained on.

    Args:
        data: prompts (txt, jsonl, parquet), captioned images (folder, .tar shards, parquet, a datasets folder) or a
            cache; recognised by looking.
        image_column: column of the images in tables.
        caption_column: column of the captions; found by its name if not given.
        center_crop: crop the middle of an image instead of a random place.
        random_flip: mirror images at random.
        image_interpolation_mode: filter used to resize images.
        max_train_samples: use the first so many samples only.
        max_rejected: share of unreadable images that is tolerated.
    """

    data: str | None = None
    image_column: str = "image"
    caption_column: str | None = None
    center_crop: bool = False
    random_flip: bool = False
    image_interpolation_mode: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bilinear"
    max_train_samples: int | None = None
    max_rejected: float = 0.05


@dataclass(frozen=True)
class HubOptions:
    """Where the finished student goes.

    Args:
        push_to_hub: upload the student folder to the Hugging Face Hub.
        hub_model_id: repository, such as you/sdxl-4step; the run folder's name if not given.
        hub_token: access token; the stored login if not given. Never written to recipe.yaml.
        license: licence of the student; the teacher's own if not given.
        license_name, license_link: what `license` other is called and where its terms are.
    """

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


def picked(cls: type, values: Mapping[str, Any]) -> Any:
    """One of these classes from the options that are its own."""
    return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


SECRET = ("hub_token",)

ALIASES = {
    "teacher": "pretrained_teacher_model",
    "pretrained_model_name_or_path": "pretrained_teacher_model",
    "revision": "teacher_revision",
    "train_data_dir": "data",
    "train_shards_path_or_url": "data",
    "dataset_name": "data",
    "prompts": "data",
    "interpolation_type": "image_interpolation_mode",
    "rank": "lora_rank",
    "validation_prompt": "validation_prompts",
}
"""Other names of the same thing, as diffusers' training scripts spell them."""

REFUSED = {
    "dataset_config_name": "a local folder holds one configuration; save the one you want with Dataset.save_to_disk "
    "and give that folder as --dataset_name",
    "num_train_epochs": "runs are counted in steps; use --max_train_steps",
    "encode_batch_size": "prompts are encoded with the batch that needs them; `fastdiff cache` encodes them "
    "beforehand, with --encode_batch_size",
    "vae_encode_batch_size": "images are encoded with the batch that needs them; `fastdiff cache` encodes them "
    "beforehand, with --encode_batch_size",
    "proportion_empty_prompts": "guidance is baked into the student, which is never run without a prompt",
    "cache_latents": "caches are made beforehand with `fastdiff cache` and given as --data",
    "scale_lr": "the learning rate is used as given; multiply --learning_rate yourself",
    "optimizer": "the optimizer is AdamW; --use_8bit_adam keeps its states in 8 bits",
    "lora_dropout": "teacher, student and fake score share one base in one call, where adapters have no dropout; "
    "leave it out",
    "unet_time_cond_proj_dim": "the guidance embedding has 256 features, as in the published models; give "
    "--guidance_range (or --w_min and --w_max) and --student full to have one",
    "output_kohya_format": "a LoRA is always written in both forms, diffusers' and kohya's; leave it out",
    "upcast_before_saving": "trained weights are float32 and are saved as they are; leave it out",
    "logging_dir": "logs lie in the run folder, under logs; give --output_dir",
    "use_fsdp": "sharding is a setting of the run, not of the launcher: give --fsdp full_shard or hybrid_shard",
    "fsdp_sharding_strategy": "give --fsdp full_shard or hybrid_shard",
    "local_rank": "the launcher sets LOCAL_RANK in the environment; use accelerate launch or torchrun",
    "num_validation_images": "previews show one image a prompt; repeat a prompt in --validation_prompts to see more",
    "validation_epochs": "previews are counted in steps; use --validation_steps",
    "prediction_type": "the prediction type is read from the teacher's scheduler",
    "snr_gamma": "it weights the plain denoising loss, which no method here trains the student with",
    "noise_offset": "the student must see the noise that its sampler will feed it, which has no offset",
    "weighting_scheme": "it belongs to plain flow-matching training; the method fixes its own weights",
}
"""Flags of diffusers' scripts without an effect here: the reason, and what to use instead."""
