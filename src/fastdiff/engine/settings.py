"""Everything a run can be told that is not the method's own; flag names follow diffusers' training scripts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from fastdiff.models.scorers import LOSS_TOWER

RoleKind = Literal["lora", "full"]
Sharding = Literal["none", "full_shard", "hybrid_shard"]


def setting(default: Any, help: str) -> Any:
    """A dataclass field with the help text that `--help` prints."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Settings of the training loop.

    Raises:
        ValueError: naming the first setting that is out of range.
    """

    output_dir: str = setting("runs/distilled", "run folder: recipe, checkpoints, logs, previews, student, report")
    seed: int = setting(0, "seed of everything random; the same seed gives the same student")
    resolution: int | None = setting(None, "image side in pixels; the teacher's own if not given")
    max_train_steps: int = setting(1000, "steps; for two-time-scale methods every step updates the fake score")
    train_batch_size: int = setting(16, "samples a process and micro-batch")
    gradient_accumulation_steps: int = setting(1, "micro-batches a step")

    student: RoleKind = setting("lora", "train low-rank adapters on the teacher, or a full copy")
    fake_score: RoleKind = setting("lora", "the same choice for the fake score and other critics")
    fake_score_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "storage of full critics; bf16 means stochastic rounding and 8-bit Adam: 4 bytes a weight, not 16"
    )
    fake_score_in_backward: bool = setting(
        False, "full critics step inside backward: no stored gradients, one step a micro-batch, clipped by tensor"
    )
    lora_rank: int = setting(64, "rank of the student's adapter")
    lora_alpha: float | None = setting(None, "alpha of all adapters; the rank if not given")
    fake_score_lora_rank: int | None = setting(None, "rank of the critics' adapters; the student's if not given")
    lora_target_modules: tuple[str, ...] | None = setting(
        None, "module names to adapt; the family's list if not given"
    )

    scorer: str = setting(
        LOSS_TOWER,
        "network of perceptual, image-text and pixel-adversarial terms: loss_tower (shipped), lpips (torchmetrics' VGG), or "
        "the folder of an open_clip tower or of a SAM encoder",
    )

    learning_rate: float = setting(1e-4, "student's learning rate (1e-4 suits LoRA, 1e-6 to 1e-5 full students)")
    lr_scheduler: str = setting("constant_with_warmup", "any schedule of diffusers.optimization.get_scheduler")
    lr_warmup_steps: int = setting(0, "steps of warm-up")
    adam_beta1: float = setting(0.9, "Adam beta 1")
    adam_beta2: float = setting(0.999, "Adam beta 2")
    adam_weight_decay: float = setting(1e-2, "decoupled weight decay")
    adam_epsilon: float = setting(1e-8, "Adam epsilon")
    use_8bit_adam: bool = setting(False, "optimizer states in 8 bits")
    max_grad_norm: float = setting(10.0, "gradient clipping norm of each group")
    ema_decay: float | None = setting(None, "decay of the evaluated average of the student; none if not given")

    mixed_precision: Literal["no", "bf16"] = setting("no", "compute type; trained weights stay float32")
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: slower, much less memory")
    activation_offload: bool = setting(
        False, "what gradient_checkpointing keeps for its recomputation waits in the host's memory"
    )
    quantize_base: Literal["none", "int8", "nf4"] = setting(
        "none",
        "storage of the frozen transformer blocks under adapters (needs bitsandbytes); exports use exact weights",
    )
    torch_compile: bool = setting(False, "compile the blocks that networks repeat: minutes once, then faster steps")
    split_roles: bool = setting(False, "evaluate teacher and critics one after the other: less memory, more calls")
    fsdp: Sharding = setting(
        "none",
        "cut full networks and the frozen base over all processes, or (hybrid) over those of a node; adapters stay whole",
    )
    allow_tf32: bool = setting(False, "TF32 matrix products and convolutions on Ampere and newer")

    checkpointing_steps: int = setting(500, "steps between checkpoints")
    checkpoints_total_limit: int | None = setting(2, "how many checkpoints are kept besides the best one")
    resume_from_checkpoint: str | None = setting(None, "'latest' or a checkpoint folder")
    validation_prompts: tuple[str, ...] = setting((), "prompts of the previews; some of the data's if not given")
    validation_steps: int = setting(200, "steps between previews and validations")
    validation_samples: int = setting(64, "samples behind the number that picks checkpoints/best; 0 keeps no best")
    report_to: str = setting("tensorboard", "tracker: tensorboard, wandb, trackio ... or none")
    tracker_project_name: str = setting("fastdiff", "project name at the tracker")
    log_every: int = setting(
        10, "steps between reads of the metrics, the only host synchronisation of a single process"
    )
    dataloader_num_workers: int = setting(0, "loader processes")

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            _check(name, getattr(self, name), "a positive finite number", lambda value: 0 < value < float("inf"))
        for name in _POSITIVE_IF_GIVEN:
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), "a positive finite number", lambda value: 0 < value < float("inf"))
        for name in _NOT_NEGATIVE:
            _check(name, getattr(self, name), "a finite number of at least 0", lambda value: 0 <= value < float("inf"))
        for name in _FRACTIONS:
            _check(name, getattr(self, name), "in [0, 1)", lambda value: value is None or 0 <= value < 1)
        if self.fake_score == "lora" and (self.fake_score_dtype != "fp32" or self.fake_score_in_backward):
            raise ValueError(
                "fake_score_dtype and fake_score_in_backward are for full critics: adapters are small and stay "
                "float32. Give fake_score full, or leave them out"
            )
        if self.activation_offload and not self.gradient_checkpointing:
            raise ValueError(
                "activation_offload moves what checkpointed blocks keep: give gradient_checkpointing as well"
            )
        if self.fake_score_dtype == "bf16" and self.mixed_precision != "bf16":
            raise ValueError("fake_score_dtype bf16 computes in bf16 as well: give mixed_precision bf16")
        if self.fsdp != "none":
            self._check_sharding()

    def _check_sharding(self) -> None:
        if self.fake_score_dtype != "fp32" or self.fake_score_in_backward:
            raise ValueError(
                "fake_score_dtype bf16 and fake_score_in_backward are for critics that one device holds whole: moments in "
                "8 bits share scales across the cuts of fsdp. Sharded float32 training needs 16 bytes a weight over all "
                "processes together: leave them out, or fsdp"
            )
        if self.use_8bit_adam and "full" in (self.student, self.fake_score):
            raise ValueError(
                "use_8bit_adam shares scales across the cuts of fsdp: leave it out for full networks, whose moments are "
                "sharded anyway, or leave out fsdp"
            )
        if self.quantize_base != "none" or self.torch_compile:
            raise ValueError(
                "quantize_base and torch_compile have not been made to work on networks that fsdp cuts: leave them out, "
                "or fsdp"
            )


_POSITIVE = (
    *("train_batch_size", "gradient_accumulation_steps", "lora_rank", "learning_rate", "adam_epsilon"),
    *("max_grad_norm", "checkpointing_steps", "validation_steps", "log_every"),
)
_POSITIVE_IF_GIVEN = ("resolution", "lora_alpha", "fake_score_lora_rank", "checkpoints_total_limit")
_NOT_NEGATIVE = (
    "max_train_steps",
    "lr_warmup_steps",
    "adam_weight_decay",
    "seed",
    "dataloader_num_workers",
    "validation_samples",
)
_FRACTIONS = ("adam_beta1", "adam_beta2", "ema_decay")


def _check(name: str, value: Any, expected: str, accept: Callable[[Any], bool]) -> None:
    if not accept(value):
        raise ValueError(f"{name} must be {expected}, got {value}")
