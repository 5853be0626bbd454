"""The only place that calls a network: it knows roles, guidance and batching.

Guidance is `D_null + w (D_cond - D_null)` with w = 1 meaning none (Ho & Salimans 2022, arXiv 2207.12598), for one w
or one per sample. Conditional and unconditional rows, and all roles asked at the same (x_t, t), run as one batch.

A network that embeds guidance (FLUX.1-dev) has no unconditional branch: there w is an input, one row serves, and what
a method leaves unguided is told its family's `own_guidance`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.prediction import Prediction, PredictionKind, guide
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families import Family
from fastdiff.models.roles import Part, Roles, anchor, row_blocks


@dataclass(frozen=True)
class Ask:
    """One question at a shared (x_t, t): which role, under which conditioning, with how much guidance."""

    role: str
    cond: Conditioning
    null: Conditioning | None = None
    guidance: float | Tensor | None = None

    @property
    def guided(self) -> bool:
        """Whether a second, unconditional row is needed (never decided by looking at tensor values)."""
        if self.guidance is None or (isinstance(self.guidance, (int, float)) and self.guidance == 1.0):
            return False
        if self.null is None:
            raise ValueError(f"guidance {self.guidance} for role {self.role!r} needs the null conditioning")
        return True


@dataclass(frozen=True)
class Taps:
    """Where to read features: module names of the network, filled by forward hooks."""

    names: tuple[str, ...]
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Cost:
    """What the networks of a run have been asked, in samples, so that methods can be compared by what they need.

    A forward pass counts 1, a backward pass through a network 1, or 2 if its own weights get a gradient (a full role
    that the update trains; the products of an adapter are small), a recomputation 1.
    """

    calls: int = 0
    """Samples evaluated by a network."""
    passes: int = 0
    """The same with backward passes and recomputation."""
    trained: tuple[str, ...] = ()
    """The roles that the update at work trains; set by the loop."""

    def count(self, samples: int, role: str, roles: Roles, x: Tensor) -> None:
        """One network call for `samples` rows; whether a graph is kept follows from torch's state."""
        self.calls += samples
        trains = role in self.trained
        keeps_graph = torch.is_grad_enabled() and (trains or x.requires_grad)
        backward = (2 if trains and not roles.is_adapter(role) else 1) if keeps_graph else 0
        self.passes += samples * (1 + backward + (keeps_graph and roles.checkpointing))


class Denoiser:
    """Turns role, noisy latents, times and conditioning into a `Prediction`.

    Args:
        roles: the networks.
        family: how a network of this pipeline family is called.
        schedule: the noise schedule of all roles.
        kind: the native prediction type of the network.
        compute_dtype: what networks compute in; roles with other weights run under autocast.
        one_call: run all roles of `together` that share the base in one batched call; False saves memory.
    """

    def __init__(
        self,
        roles: Roles,
        family: Family,
        schedule: NoiseSchedule,
        kind: PredictionKind,
        compute_dtype: torch.dtype = torch.float32,
        one_call: bool = True,
    ) -> None:
        self.roles = roles
        self.family = family
        self.schedule = schedule
        self.kind = kind
        self.compute_dtype = compute_dtype
        self.one_call = one_call
        self.expose_features = False
        """Features are outputs of the network as well: hooks on it must see everything that backward starts from."""
        self.cost = Cost()

    @property
    def calls(self) -> int:
        """Samples evaluated by a network so far."""
        return self.cost.calls

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Conditioning,
        role: str,
        null: Conditioning | None = None,
        guidance: float | Tensor | None = None,
        taps: Taps | None = None,
        **inputs: Any,
    ) -> Prediction:
        """Evaluates one role.

        Args:
            x_t: `(B, C, H, W)` noisy latents.
            t: `(B,)` schedule times.
            cond, null: conditioning with `B` rows; `null` may have one row.
            role: a role of this run.
            guidance: w, a float or `(B,)`; None or 1.0 evaluates the conditional rows only.
            taps: features to collect on the way (conditional rows after unconditional ones).
            inputs: extra network inputs, e.g. a guidance embedding.
        """
        ask = Ask(role, cond, null, guidance)
        native = self._forward(x_t, t, [ask], taps, inputs)
        return self._predictions(native, x_t, t, [ask])[0]

    def together(self, x_t: Tensor, t: Tensor, asks: Sequence[Ask]) -> list[Prediction]:
        """Evaluates several roles at the same (x_t, t) without gradient, in as few network calls as possible."""
        with torch.no_grad():
            predictions: dict[int, Prediction] = {}
            for indices in self._groups(asks):
                group = [asks[index] for index in indices]
                native = self._forward(x_t, t, group, None, {})
                predictions.update(zip(indices, self._predictions(native, x_t, t, group)))
        return [predictions[index] for index in range(len(asks))]

    def features(self, x_t: Tensor, t: Tensor, cond: Conditioning, role: str, names: tuple[str, ...]) -> list[Tensor]:
        """Activations of a role at the named modules; the network stops after the last of them."""
        taps = Taps(names)
        with contextlib.suppress(_AllCollected):
            self._forward(x_t, t, [Ask(role, cond)], taps, {}, stop=True)
        return [taps.features[name] for name in names]

    def _groups(self, asks: Sequence[Ask]) -> list[list[int]]:
        on_base = [index for index, ask in enumerate(asks) if self.roles.is_adapter(ask.role)]
        alone = [[index] for index, ask in enumerate(asks) if not self.roles.is_adapter(ask.role)]
        if self.one_call and on_base:
            return [on_base, *alone]
        return [[index] for index in on_base] + alone

    def _forward(
        self,
        x_t: Tensor,
        t: Tensor,
        asks: Sequence[Ask],
        taps: Taps | None,
        inputs: dict[str, Any],
        stop: bool = False,
    ) -> Tensor:
        conds: list[Conditioning] = []
        parts: list[Part] = []
        batch = len(x_t)
        sizes = [batch * (2 if self._asks_null(ask) else 1) for ask in asks]
        for ask, rows in zip(asks, row_blocks(sizes)):
            conds += [ask.null.expand(batch), ask.cond] if self._asks_null(ask) else [ask.cond]
            parts += self.roles.parts(ask.role, rows if len(asks) > 1 else None)
        copies = sum(sizes) // batch
        network = self.roles.network(asks[0].role)
        times = self.schedule.network_time(t).expand(batch)
        x = x_t.to(self.compute_dtype).repeat(copies, *[1] * (x_t.dim() - 1))
        cond = Conditioning.cat(conds).to(dtype=self.compute_dtype)
        if self.family.embeds_guidance(network):
            inputs = {"guidance": self._told_guidance(asks, times)} | inputs
        self.cost.count(len(x), asks[0].role, self.roles, x_t)
        tapped = _exposed(network, taps) if self.expose_features else contextlib.nullcontext()

        def read(output: Any) -> Tensor:
            return self.family.feature(network, output, x)

        with (
            self.roles.active.use(tuple(parts)),
            self._precision(network),
            _tapped(network, taps, read, stop),
            tapped,
        ):
            return self.family.call(network, x, times.repeat(copies), cond, **inputs)

    def _asks_null(self, ask: Ask) -> bool:
        """Whether guidance is made from a second, unconditional row."""
        return not self.family.embeds_guidance(self.roles.network(ask.role)) and ask.guided

    def _told_guidance(self, asks: Sequence[Ask], times: Tensor) -> Tensor:
        strengths = [self.family.own_guidance if ask.guidance is None else ask.guidance for ask in asks]
        rows = [w if isinstance(w, Tensor) else torch.full_like(times, w) for w in strengths]
        return torch.cat([w.to(times).expand(len(times)) for w in rows])

    def _predictions(self, native: Tensor, x_t: Tensor, t: Tensor, asks: Sequence[Ask]) -> list[Prediction]:
        blocks = iter(native.chunk(len(native) // len(x_t)))
        outputs = []
        for ask in asks:
            output = next(blocks)
            if self._asks_null(ask):
                output = guide(output, next(blocks), ask.guidance)
            outputs.append(Prediction(output, self.kind, x_t, t, self.schedule))
        return outputs

    def _precision(self, network: nn.Module) -> contextlib.AbstractContextManager:
        weight = anchor(network)
        # Autocast lowers precision only; where float32 is wanted of half weights, `models.tangents` widens them.
        if self.compute_dtype in (weight.dtype, torch.float32) or weight.dtype == torch.float64:
            return contextlib.nullcontext()
        # Entered anew for every call, so that autocast's weight cache never outlives a no_grad call.
        return torch.autocast(weight.device.type, dtype=self.compute_dtype)


class _AllCollected(Exception):
    """Raised by the last tap to leave a forward whose output nobody needs."""


@contextlib.contextmanager
def _tapped(network: nn.Module, taps: Taps | None, read: Callable[[Any], Tensor], stop: bool) -> Iterator[None]:
    if taps is None:
        yield
        return

    def collect(name: str):
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            taps.features[name] = read(output)
            if stop and len(taps.features) == len(taps.names):
                raise _AllCollected

        return hook

    handles = [network.get_submodule(name).register_forward_hook(collect(name)) for name in taps.names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _exposed(network: nn.Module, taps: Taps | None) -> Iterator[None]:
    """Inside, the network returns its features after its own output, and alone when it stops at them."""
    if taps is None:
        yield
        return
    forward = network.forward

    def exposing(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        try:
            output = forward(*args, **kwargs)
        except _AllCollected:
            output = ()
        return (*output, *taps.features.values())

    network.forward = exposing
    try:
        yield
    finally:
        del network.forward  # the class's own again
