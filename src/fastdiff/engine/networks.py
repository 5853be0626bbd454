"""Builds the networks of a run: roles on one base, the denoiser, discriminator heads."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastdiff.engine.distributed import Replicated, is_distributed
from fastdiff.engine.settings import RoleKind, Settings
from fastdiff.engine.sharding import Sharded, Shards
from fastdiff.methods import Method
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import TEACHER, AdapterSpec, FullSpec, Roles
from fastdiff.models.scorers import Scorer
from fastdiff.models.teacher import TeacherLike

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Networks:
    """The denoiser over all roles, the trainable modules beside it, and which roles are sharded."""

    denoiser: Denoiser
    modules: dict[str, nn.Module]
    sharded: Mapping[str, Sharded] = field(default_factory=dict)
    """Sharded networks: full roles, and the base as the teacher's."""

    @property
    def roles(self) -> Roles:
        return self.denoiser.roles

    def held(self, group: str) -> Replicated | Sharded:
        """How this process holds the weights of a role or module."""
        if group in self.sharded:
            return self.sharded[group]
        module = self.modules.get(group)
        return Replicated(self.roles.parameters(group) if module is None else module.parameters())

    def parameters(self, group: str) -> list[nn.Parameter]:
        """The parameters of a role or module, as this process holds them."""
        return self.held(group).parameters

    def state_dict(self, role: str) -> Mapping[str, Tensor]:
        """Whole weights of a role; where they are sharded, all processes read them together."""
        if role not in self.sharded:
            return self.roles.state_dict(role)
        held = self.sharded[role]
        return held.whole(dict(zip(held.names, held.parameters)), range(len(held.names)))

    def load_state_dict(self, role: str, state: Mapping[str, Tensor]) -> None:
        """Copies whole weights into a role, of which a process takes its part."""
        if role not in self.sharded:
            self.roles.load_state_dict(role, state)
            return
        self.roles.check_fit(role, state)
        held = self.sharded[role]
        numbers = {name: number for number, name in enumerate(held.names)}
        with torch.no_grad():
            for name, part in held.parts(state, [numbers[name] for name in state]).items():
                held.parameters[numbers[name]].copy_(part)

    def rest(self) -> None:
        """Between steps."""
        for held in self.sharded.values():
            held.rest()

    @contextlib.contextmanager
    def whole(self, keep: bool, *roles: str) -> Iterator[dict[nn.Module, nn.Module]]:
        """Inside, these roles and the base are whole networks on a process that keeps them, and run without the others.

        Yields:
            The whole network for each sharded one.
        """
        copies = {}
        for role in (TEACHER, *roles):
            if role in self.sharded:
                copies[self.sharded[role].network] = self.sharded[role].whole_copy(keep)
        if not keep:
            yield {}
            return
        with self.roles.replaced(copies):
            yield copies


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
    if teacher.family.embeds_guidance(teacher.network) and method.compares_with_null():
        raise ValueError(
            f"{method.info.name} with these settings compares answers with and without a prompt, but this teacher embeds "
            "guidance and was not trained without one: take a teacher with an unconditional branch, or a method that "
            "asks for guidance by its strength (dmd2, lcm, pcm)"
        )
    device = _device(teacher.network)
    cuts = settings.fsdp != "none" and is_distributed()
    if cuts:
        teacher.network.to("cpu")  # copies are made there: a device never holds more than its slices and one block
    elif settings.fsdp != "none":
        logger.info("fsdp %s: one process has nothing to share its networks with", settings.fsdp)
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
            teacher.schedule_at(settings.resolution or teacher.default_resolution),
            teacher.prediction_type,
            torch.bfloat16 if settings.mixed_precision == "bf16" else _weight_dtype(teacher.network),
            one_call=not settings.split_roles,
        )
        modules = method.modules(denoiser) | (method.scorer_modules(scorer) if scorer else {})
        modules = {name: module.to(device) for name, module in modules.items()}
    return Networks(denoiser, modules, _sharded(method, denoiser, settings, device) if cuts else {})


def _sharded(method: Method, denoiser: Denoiser, settings: Settings, device: torch.device) -> dict[str, Sharded]:
    """The base and every full role, cut."""
    roles = denoiser.roles
    full = [role for role in roles if not roles.is_adapter(role)]
    if recorded := sorted(set(full) & set(method.frozen())):
        raise ValueError(
            f"{method.info.name} holds {recorded[0]} as a frozen full role, which fsdp cannot cut: train adapters, or "
            "leave out fsdp"
        )
    shards = Shards(settings.fsdp, device, torch.bfloat16 if settings.mixed_precision == "bf16" else None)
    adapters = [weight for role in roles if roles.is_adapter(role) for weight in roles.parameters(role)]
    denoiser.expose_features = True
    base = shards.cut(roles.base, adapters, [roles.active])
    return {TEACHER: base} | {role: shards.cut(roles.network(role), (), [roles.active]) for role in full}


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
            specs[target.role] = FullSpec(copy.deepcopy(specs[target.source].module), trainable=False)
    for role, like in method.frozen().items():
        own = copy.deepcopy(specs[like])
        specs[role] = replace(own, trainable=False) if isinstance(own, FullSpec) else own
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
            "LoRA cannot carry: train a full student (--student full), or leave out the setting that asks for it "
            "(guidance_range, a student's size, apex's losses code)"
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
