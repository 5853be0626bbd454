"""DisBack: distribution backtracking distillation (Zhang et al. 2024, arXiv 2408.15991)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, MethodInfo, Update, check_not_negative, check_positive
from fastdiff.methods.dmd2 import DMD2, DMD2Config
from fastdiff.models.denoiser import Ask
from fastdiff.models.roles import TEACHER

RECORDED = "recorded_score"


@dataclass(frozen=True)
class DisBackConfig(DMD2Config):
    """Defaults of both stages are those of the official SDXL script; the rest is DMD2's.

    Args:
        degradation_steps: steps of the first stage, in which the student rests.
        path_nodes: scores on the path from the teacher to the untrained student; 0 leaves both stages out, which is
            DMD2. Nodes 1 to path_nodes - 1 are kept in host memory and checkpoints: small as adapters, whole networks
            with a full fake score.
        backtracking_interval: steps spent against each recorded score, before the next nearer to the teacher.
    """

    degradation_steps: int = 1000
    path_nodes: int = 10
    backtracking_interval: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("its path leads from the teacher to a student of the same network")
        check_not_negative(path_nodes=self.path_nodes)
        check_positive(backtracking_interval=self.backtracking_interval)
        if self.degradation_steps < self.path_nodes:
            raise ValueError(
                f"degradation_steps ({self.degradation_steps}) must not be below path_nodes ({self.path_nodes}): "
                "each node is recorded at a step of its own"
            )
        if self.path_nodes < 2:
            unread = ("backtracking_interval",) + (() if self.path_nodes else ("degradation_steps",))
            refuse_unread(self, unread, f"with path_nodes {self.path_nodes}")


class DisBack(DMD2):
    r"""Records how the teacher degrades to the score of the untrained student, then distils along that path backwards.

    Stage 1 fits s', a copy of the teacher, to samples of the untrained student G_0 by the fake score's own loss, and
    keeps it N - 1 times on the way: s'_0 = teacher, s'_1, ..., s'_N (the score of G_0). In stage 2 the fake score goes
    on from s'_N, and the target of DMD2's gap is not the teacher but s'_j (guided as the teacher would be),

        g = (D_fake(x_t) - D^w_{s'_j}(x_t)) / mean|x - D^w_{s'_j}(x_t)|,   j = N - 1, N - 2, ..., 0,

    one node earlier after every `backtracking_interval` steps; j = 0 is the teacher itself, asked as such, for the rest
    of the run. j = N is left out, since there g is 0. Recorded scores are detached and never trained.

    Both stages are one run, told apart by the step: the second goes on with the very network that the first has
    trained, so two runs would only hand weights from folder to folder. The path is part of `state_dict()`, so that a run
    resumes in either stage. `init_from` gives the student alone: the path must begin at the teacher.
    """

    info = MethodInfo(
        name="disback",
        title="DisBack",
        family="distribution matching",
        paper="Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation",
        arxiv="2408.15991",
        needs="prompts",
        student_kinds=("lora", "full"),
        steps="1-8",
    )
    Config = DisBackConfig
    config: DisBackConfig

    def __init__(self, config: DisBackConfig) -> None:
        super().__init__(config)
        self._path: dict[int, dict[str, Tensor]] = {}
        self._held: int | None = None
        """The node whose weights the role holds now; unknown after loading."""

    @property
    def recording_steps(self) -> int:
        """Steps of stage 1."""
        return self.config.degradation_steps if self.config.path_nodes else 0

    def node(self, step: int) -> int:
        """The node that is the target at a step of stage 2; 0 is the teacher."""
        switches = (step - self.recording_steps) // self.config.backtracking_interval
        return max(self.config.path_nodes - 1 - switches, 0)

    def frozen(self) -> dict[str, str]:
        return {RECORDED: "fake_score"} if self.config.path_nodes > 1 else {}

    def inherits(self) -> dict[str, tuple[str, ...]] | None:
        return {"student": ("student",)} if self.config.path_nodes else None

    def updates(self, step: int) -> Iterable[Update]:
        if step < self.recording_steps:
            yield Update("fake_score", self.recording_loss, tuple(n for n in self.groups() if n != "student"))
        else:
            yield from super().updates(step - self.recording_steps)

    def recording_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The fake score's loss on samples of the resting student; due nodes are kept before it changes them."""
        node, rest = divmod(ctx.step * self.config.path_nodes, self.config.degradation_steps)
        due = rest < self.config.path_nodes and node > 0  # the first step at or after node * steps / nodes
        if due and node not in self._path:
            self._path[node] = self._copy_of_fake_score(ctx)
        return self.critic_loss(batch, ctx)

    def asks(self, batch: Batch, ctx: Context) -> list[Ask]:
        """DMD2's questions, with the recorded score in the teacher's place."""
        target = self._target(ctx)
        return [replace(ask, role=target) if ask.role == TEACHER else ask for ask in super().asks(batch, ctx)]

    def _target(self, ctx: Context) -> str:
        """The role that is asked for the target; it is filled where the node has changed."""
        node = self.node(ctx.step)
        if node == 0:
            self._path.clear()
            return TEACHER
        if node != self._held:
            if node not in self._path:
                raise ValueError(
                    f"step {ctx.step} backtracks to node {node}, which is not recorded (there are "
                    f"{sorted(self._path) or 'none'}): resume with the degradation_steps, path_nodes and "
                    "backtracking_interval that the run began with"
                )
            ctx.denoiser.roles.load_state_dict(RECORDED, self._path[node])
            self._held = node
            self._path = {kept: weights for kept, weights in self._path.items() if kept <= node}
        return RECORDED

    @staticmethod
    def _copy_of_fake_score(ctx: Context) -> dict[str, Tensor]:
        """Weights of the fake score on the host, under the names of the role that will take them."""
        roles = ctx.denoiser.roles
        names = [name for name, _ in roles.named_parameters(RECORDED)]
        weights = (weight.detach().to("cpu", copy=True) for weight in roles.parameters("fake_score"))
        return dict(zip(names, weights, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        path = {
            f"path/{node}/{name}": weight for node, weights in self._path.items() for name, weight in weights.items()
        }
        return super().state_dict() | path

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = {key for key in state if key.startswith("path/")}
        super().load_state_dict({key: state[key] for key in state.keys() - own})
        self._path, self._held = {}, None
        for key in own:
            _, node, name = key.split("/", 2)
            self._path.setdefault(int(node), {})[name] = state[key]
