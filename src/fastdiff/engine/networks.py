"""Builds the networks of a run: roles on one base, the denoiser, discriminator heads."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastdiff.engine.settings import RoleKind, Settings
from fastdiff.methods import Method
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import AdapterSpec, FullSpec, Roles
from fastdiff.models.scorers import Scorer
from fastdiff.models.teacher import TeacherLike


@dataclass(frozen=True)
class Networks:
    """The denoiser over all roles, and the trainable modules beside it."""

    denoiser: Denoiser
    modules: dict[str, nn.Module]

    @property
    def roles(self) -> Roles:
        return self.denoiser.roles

    def parameters(self, group: str) -> list[nn.Parameter]:
        """The parameters of a role or module."""
        return list(self.modules[group].parameters()) if group in self.modules else self.roles.parameters(group)


def build_networks(method: Method, teacher: TeacherLike, settings: Settings, scorer: Scorer | None = None) -> Networks:
    """Roles as adapters or full modules, as the settings say and the method allows.

    The same seed gives the same initial weights on every process.

    Raises:
        ValueError: if the method cannot train the wanted kind of student on this teacher.
    """
    if settings.student not in method.info.student_kinds:
        own = method.student_network(teacher.network) is not None
        reason = "; its student's network has inputs or a size that the teacher's has not, which no LoRA can hold"
        raise ValueError(
            f"method {method.info.name} cannot train a {settings.student} student: only "
            f"{' or '.join(method.info.student_kinds)}{reason if own else ''}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        specs = _specs(method, teacher, settings)
        if settings.quantize_base != "none":
            _refuse_full_roles(specs, settings)
            teacher.identity()  # it is remembered, and must be that of the weights before they are rounded
        roles = Roles(
            teacher.network,
            specs,
            settings.gradient_checkpointing,
            settings.activation_offload,
            settings.quantize_base,
            settings.torch_compile,
        )
        denoiser = Denoiser(
            roles,
            teacher.family,
            teacher.schedule,
            teacher.prediction_type,
            torch.bfloat16 if settings.mixed_precision == "bf16" else _weight_dtype(teacher.network),
            one_call=not settings.split_roles,
        )
        modules = method.modules(denoiser) | (method.scorer_modules(scorer) if scorer else {})
        modules = {name: module.to(_device(teacher.network)) for name, module in modules.items()}
    return Networks(denoiser, modules)


def _specs(method: Method, teacher: TeacherLike, settings: Settings) -> dict[str, AdapterSpec | FullSpec]:
    specs = {}
    for group in method.groups():
        if group == "student":
            specs[group] = _student_spec(method, teacher, settings)
        elif group in method.critics:
            rank = settings.fake_score_lora_rank or settings.lora_rank
            dtype = torch.bfloat16 if settings.fake_score_dtype == "bf16" else torch.float32
            specs[group] = _spec(settings.fake_score, rank, teacher, settings, dtype)
    for group in [name for name in specs if name in method.critics]:
        own = method.critic_network(teacher.network) if isinstance(specs[group], FullSpec) else None
        if own is not None:
            specs[group] = replace(specs[group], module=own)
    for target in method.targets():
        if settings.fake_score_dtype == "bf16" and {target.role, target.source} & set(method.critics):
            raise ValueError(
                f"{method.info.name} averages the weights of {target.role} and {target.source}, and bfloat16 is too "
                "coarse for an average: leave out fake_score_dtype"
            )
        full = isinstance(specs[target.source], FullSpec)
        if target.role in specs:
            if not (full and isinstance(specs[target.role], FullSpec)):
                raise ValueError(
                    f"{method.info.name} averages the weights of {target.role} and {target.source}, which adapters do "
                    "not have: an average of low-rank factors is not the average of products. Train both in full "
                    "(student and fake_score: full), or leave out the pull."
                )
        # An adapter's target is the live adapter, for the same reason.
        elif full:
            specs[target.role] = FullSpec(copy.deepcopy(specs[target.source].module))
    for role, like in method.frozen().items():
        specs[role] = copy.deepcopy(specs[like])
    return specs


def _refuse_full_roles(specs: dict[str, AdapterSpec | FullSpec], settings: Settings) -> None:
    full = [role for role, spec in specs.items() if isinstance(spec, FullSpec)]
    if full:
        raise ValueError(
            f"quantize_base {settings.quantize_base} rounds the base, and {', '.join(full)} would be trained in full "
            "from weights that are not: train adapters (student and fake_score: lora), or leave it out"
        )


def _student_spec(method: Method, teacher: TeacherLike, settings: Settings) -> AdapterSpec | FullSpec:
    # A closed form has no weights to widen: its students start from a small network.
    widened = method.student_network(teacher.network if teacher.adaptable else teacher.new_network())
    if widened is None:
        return _spec(settings.student, settings.lora_rank, teacher, settings)
    if settings.student == "lora":
        raise ValueError(
            f"{method.info.name} with these settings changes the network itself (a new input, or another size), which a "
            "LoRA cannot carry: train a full student (--student full), or leave guidance_range and sizes alone"
        )
    return FullSpec(widened)


def _spec(
    kind: RoleKind, rank: int, teacher: TeacherLike, settings: Settings, dtype: torch.dtype = torch.float32
) -> AdapterSpec | FullSpec:
    if not teacher.adaptable and kind == "lora":
        raise ValueError("this teacher is a closed form and takes no adapters: set student and fake_score to 'full'")
    if kind == "lora":
        targets = settings.lora_target_modules or teacher.family.lora_targets
        return AdapterSpec(rank, settings.lora_alpha or rank, tuple(targets))
    return FullSpec(teacher.new_network(), dtype)


def _device(network: nn.Module) -> torch.device:
    return next(iter(network.state_dict().values())).device


def _weight_dtype(network: nn.Module) -> torch.dtype:
    return next(iter(network.state_dict().values())).dtype
