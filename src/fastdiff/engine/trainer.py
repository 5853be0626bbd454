"""The training loop. It knows losses, groups and steps, and no method by name."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.data.source import TrainingData
from fastdiff.diffusion.randomness import Randomness, stream_seed
from fastdiff.engine.batches import Batches
from fastdiff.engine.checkpoints import Checkpoints
from fastdiff.engine.distributed import Vote, global_mean, warn_if_alone
from fastdiff.engine.files import writable_folder
from fastdiff.engine.interrupts import Interrupts
from fastdiff.engine.memory import peak_memory, state_memory
from fastdiff.engine.metrics import DeferredMetrics
from fastdiff.engine.networks import Networks, build_networks
from fastdiff.engine.optimizers import GroupOptimizer
from fastdiff.engine.settings import Settings
from fastdiff.engine.sharding import read
from fastdiff.engine.student import StudentWeights
from fastdiff.engine.tracking import Tracker
from fastdiff.methods import Batch, Context, Method, Update
from fastdiff.models.scorers import Scorer, open_scorer
from fastdiff.models.teacher import TeacherLike

logger = logging.getLogger(__name__)

RunHook = Callable[["Trainer", str], None]
Validation = Callable[["Trainer"], float]


class Trainer:
    """One run: networks, optimizers, data and files.

    Args:
        method: what to compute.
        teacher: what to distil.
        data: what to read.
        settings: how to run.
        accelerator: process group, device and launcher; a new one if not given.
        on_preview: called with the trainer and a label at the start and every `validation_steps`.
        on_start: called once before the first step, e.g. to prove that an export of the untrained student works.
        validate: gives a number to minimise; the best checkpoint is kept as `checkpoints/best`.
        scorer: the frozen network of perceptual and image-text terms; the one that `settings.scorer` names if not given.
    """

    def __init__(
        self,
        method: Method,
        teacher: TeacherLike,
        data: TrainingData,
        settings: Settings,
        *,
        accelerator: Any = None,
        on_preview: RunHook | None = None,
        on_start: RunHook | None = None,
        validate: Validation | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        from accelerate import Accelerator

        _check_batch(method, settings)
        self.method, self.teacher, self.settings = method, teacher, settings
        self.accelerator = accelerator or Accelerator(mixed_precision="no")
        self.device = self.accelerator.device
        self.folder = writable_folder(Path(settings.output_dir))
        self.on_preview, self.on_start, self.validate = on_preview, on_start, validate
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.allow_tf32
        warn_if_alone(self.accelerator.num_processes)
        self.scorer = (scorer or open_scorer(settings.scorer, self.device)) if method.needs_scorer() else None
        self.identity = teacher.identity()
        self.networks: Networks = build_networks(method, teacher, settings, self.scorer)
        groups = method.groups()
        self.held = {name: self.networks.held(name) for name in groups}
        self.optimizers = {
            name: GroupOptimizer(
                name,
                self.held[name].parameters,
                group,
                settings,
                in_backward=settings.fake_score_in_backward and name in method.critics,
                whole_norm=self.held[name].norm,
            )
            for name, group in groups.items()
        }
        self.student = StudentWeights(self.networks, settings.ema_decay)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.batches = Batches(data, teacher, settings, self.device, rank, world)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", settings.checkpoints_total_limit)
        self.metrics = DeferredMetrics()
        self.vote = Vote(self.device)
        self.step = 0
        self.best: float | None = None
        self.seconds = 0.0
        self.network_passes = 0

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def train(self) -> str:
        """Trains to the last step or to a signal.

        Returns:
            `done`, or the name of the signal that stopped the run; it can then be resumed.

        Raises:
            NonFiniteError: naming the loss term and step.
            ValueError: if the method misses what must come before.
        """
        self._resume()
        self.method.check_ready()
        if self.is_main:
            logger.info("%s", state_memory(self.networks, self.optimizers))
        with Tracker(self.settings, self.folder, self.is_main) as tracker, Interrupts() as interrupts:
            if self.step == 0:
                self._prove_outputs()
            outcome = self._loop(tracker, interrupts)
        self.accelerator.wait_for_everyone()
        return outcome

    def _loop(self, tracker: Tracker, interrupts: Interrupts) -> str:
        last = self.settings.max_train_steps
        bar = tqdm(total=last, initial=self.step, disable=not self.is_main, desc=self.method.info.name, unit="step")
        saved = self.step
        if self.step and self._validates():  # a checkpoint is written before its step is validated, so it cannot know
            self._validate(tracker)
        for batches in self.batches.steps(self.step):
            began = time.perf_counter()
            self.train_step(batches)
            self.seconds += time.perf_counter() - began
            bar.update()
            if self.step % self.settings.log_every == 0 or self.step == last:
                self._read_metrics(tracker, bar)
            stop = self.vote(interrupts.requested is not None)
            if self.step % self.settings.checkpointing_steps == 0 or self.step == last or stop:
                self._read_metrics(tracker, bar)
                self.save()
                saved = self.step
            if stop:
                bar.close()
                return interrupts.requested or "another process"
            if self._validates():
                self._validate(tracker)
        bar.close()
        if saved != self.step:
            self.save()
        return "done"

    def train_step(self, batches: list[Batch]) -> None:
        """All updates of one step over its micro-batches, compiled if the settings say so."""
        with self.networks.roles.compilation.at_work():
            self._train_step(batches)

    def _train_step(self, batches: list[Batch]) -> None:
        cost = self.networks.denoiser.cost
        before = cost.passes  # previews and validation use the same networks and do not count
        stores: list[dict[str, Any]] = [{} for _ in batches]
        for update in self.method.updates(self.step):
            # Gradients of other groups are never computed: a loss may pass through a critic without training it.
            trained = [leaf for group in update.trains for leaf in self.held[group].leaves]
            cost.trained = update.trains
            for batch, store in zip(batches, stores):
                loss = self._loss(update, batch, store)
                (loss / len(batches)).backward(inputs=trained)
            for group in update.trains:
                self.held[group].collect_gradients()
                norm = self.optimizers[group].step()
                self.metrics.add(f"grad_norm/{group}", norm, self.step + 1)
                self._follow(group)
        for optimizer in self.optimizers.values():
            optimizer.end_step()
        self.networks.rest()
        self.network_passes += cost.passes - before
        self.step += 1

    def _loss(self, update: Update, batch: Batch, store: dict[str, Any]) -> Tensor:
        ctx = Context(
            denoiser=self.networks.denoiser,
            step=self.step,
            random=Randomness(stream_seed(self.settings.seed, self.method.random_stream()), self.step, batch.indices),
            modules=self.networks.modules,
            store=store,
            log=lambda name, value: self.metrics.add(f"{update.name}/{name}", value, self.step + 1),
            global_mean=global_mean,
            decode=self.teacher.decode,
            scorer=self.scorer,
        )
        terms = update.loss(batch, ctx)
        for name, term in terms.items():
            self.metrics.add(f"loss/{update.name}/{name}", term, self.step + 1, shared=True)
        # Sharded, they would need every gradient whole at once.
        if len(terms) > 1 and self.step % (10 * self.settings.log_every) == 0 and not self.networks.sharded:
            self._term_gradients(update, terms)
        return sum(terms.values())

    def _term_gradients(self, update: Update, terms: dict[str, Tensor]) -> None:
        parameters = [p for group in update.trains for p in self.optimizers[group].parameters]
        for name, term in terms.items():
            grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None])
            self.metrics.add(f"grad_norm/{update.name}/{name}", norm, self.step + 1)

    def _follow(self, group: str) -> None:
        """Moves what averages the group that has just stepped."""
        if group == "student":
            self.student.average()
        for target in self.method.targets():
            if (target.after or target.source) == group and target.role in self.networks.roles:
                with torch.no_grad():
                    torch._foreach_lerp_(
                        self.networks.parameters(target.role),
                        self.networks.parameters(target.source),
                        1 - target.decay,
                    )

    def _prove_outputs(self) -> None:
        """Everything the end of the run will need is done once with the untrained student."""
        self.save("untrained")
        self.checkpoints.load(self, self.checkpoints.folder / "untrained")
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.checkpoints.remove("untrained")
        if self.on_start:
            self.on_start(self, "untrained")
        if self.on_preview:
            self.on_preview(self, "step-0")

    def _validate(self, tracker: Tracker) -> None:
        if self.on_preview:
            self.on_preview(self, f"step-{self.step}")
        if self.validate is None:
            return
        with self.student.evaluated():
            # Averaged, so that all processes agree on which checkpoint is best.
            score = global_mean(torch.tensor(self.validate(self), device=self.device)).item()
        tracker.log({"validation": score}, self.step)
        if self.best is None or score < self.best:
            self.best = score
            self.save("best")

    def _read_metrics(self, tracker: Tracker, bar: tqdm) -> None:
        values = self.metrics.read()
        if not values:
            return
        rates = {f"lr/{name}": optimizer.schedule.get_last_lr()[0] for name, optimizer in self.optimizers.items()}
        tracker.log(values | rates, self.step)
        bar.set_postfix({name.split("/", 1)[1]: f"{value:.3g}" for name, value in values.items() if "loss/" in name})

    def _validates(self) -> bool:
        return self.step % self.settings.validation_steps == 0 or self.step == self.settings.max_train_steps

    # Checkpointing

    def save(self, name: str | None = None) -> None:
        """Writes a checkpoint from the main process; all processes help to gather what is sharded, and wait for it."""
        if self.is_main:
            self.checkpoints.save(self, name or f"step-{self.step}")
        elif self.networks.sharded:
            for tensors in self.tensor_groups().values():
                read(tensors)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        wanted = self.settings.resume_from_checkpoint
        folder = self.checkpoints.find(wanted) if wanted else None
        if folder is not None:
            self.checkpoints.load(self, folder)
            logger.info("resumed from %s at step %d", folder, self.step)

    def tensor_groups(self) -> dict[str, Mapping[str, Tensor]]:
        """Weights of every role and module, optimizer states, averages and the method's memory.

        What is sharded is gathered whole when it is read, by all processes in the same order.
        """
        networks, roles = self.networks, self.networks.roles
        groups = {name: networks.state_dict(name) for name in self.optimizers if name in roles}
        groups |= {t.role: networks.state_dict(t.role) for t in self.method.targets() if t.role in roles}
        groups |= {role: networks.state_dict(role) for role in self.method.frozen()}
        groups |= {name: module.state_dict() for name, module in networks.modules.items()}
        for name, optimizer in self.optimizers.items():
            states = optimizer.state_tensors()
            groups[f"optimizer_{name}"] = self.held[name].whole(states, _numbers(states))
        averages = self.student.average_tensors()
        groups["ema"] = self.held["student"].whole(averages, _numbers(averages))
        groups["method"] = self.method.state_dict()
        return {name: tensors for name, tensors in groups.items() if tensors}

    def effort(self) -> dict[str, float]:
        """What the run has cost: steps, seconds in them, network passes of this process (see `Cost`), peak memory."""
        return {
            "steps": self.step,
            "seconds": self.seconds,
            "network_passes": self.network_passes,
            "peak_memory_mib": peak_memory(self.device) / 2**20,
        }

    def json_state(self) -> dict[str, Any]:
        """Position, identity and everything that is not a tensor."""
        return {
            "method": self.method.info.name,
            "teacher": self.identity,
            "step": self.step,
            "seed": self.settings.seed,
            "best": self.best,
            "seconds": self.seconds,
            "network_passes": self.network_passes,
            "ema_steps": self.student.average_steps,
            "optimizers": {name: optimizer.state_json() for name, optimizer in self.optimizers.items()},
        }

    def load_state(self, tensors: dict[str, Mapping[str, Tensor]], values: dict[str, Any]) -> None:
        """Restores a checkpoint after checking that it is of this method, teacher and seed."""
        self._check_identity(values)
        roles = self.networks.roles
        for name in tensors.keys() & set(roles):
            roles.check_fit(name, tensors[name])
        for name, group in tensors.items():
            if name in roles:
                self.networks.load_state_dict(name, group)
            elif name in self.networks.modules:
                self.networks.modules[name].load_state_dict(group)
        for name, optimizer in self.optimizers.items():
            states = tensors.get(f"optimizer_{name}", {})
            optimizer.load_state(self.held[name].parts(states, _numbers(states)), values["optimizers"][name])
        averages = tensors.get("ema", {})
        self.student.load_average(self.held["student"].parts(averages, _numbers(averages)), values["ema_steps"])
        self.method.load_state_dict(tensors.get("method", {}))
        self.step, self.best, self.seconds = values["step"], values["best"], values["seconds"]
        self.network_passes = values["network_passes"]

    def _check_identity(self, values: dict[str, Any]) -> None:
        own = {
            "method": self.method.info.name,
            "seed": self.settings.seed,
            "teacher": self.identity["fingerprint"],
        }
        theirs = {
            "method": values["method"],
            "seed": values["seed"],
            "teacher": values["teacher"]["fingerprint"],
        }
        for key, value in own.items():
            if theirs[key] != value:
                raise ValueError(
                    f"the checkpoint was written with {key} {theirs[key]!r}, this run has {value!r}. "
                    f"Resume with the recipe.yaml beside the checkpoint, or start a new --output_dir."
                )


def _numbers(names: Iterable[str]) -> list[int]:
    """The numbers of parameters that names of optimizer states and averages begin with."""
    return [int(name.split(".", 1)[0]) for name in names]


def _check_batch(method: Method, settings: Settings) -> None:
    if settings.train_batch_size < method.least_batch:
        raise ValueError(
            f"{method.info.name} needs micro-batches of {method.least_batch} samples or more with these settings, got "
            f"train_batch_size {settings.train_batch_size}: raise it (gradient_accumulation_steps does not serve)"
        )
