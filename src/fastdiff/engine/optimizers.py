"""One optimizer and one learning-rate schedule for each trainable group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.engine.distributed import average_gradients
from fastdiff.engine.low_precision import LowPrecisionAdamW
from fastdiff.engine.settings import Settings
from fastdiff.methods import Group


class GroupOptimizer:
    """AdamW, clipping and learning-rate schedule of one group of parameters.

    A step whose gradients are not finite is skipped on the device (fused Adam's `found_inf`), so that the weights
    survive until the deferred metrics read reports it.

    Args:
        name: of the group.
        parameters: what it trains; bfloat16 ones get `LowPrecisionAdamW`.
        group: learning rate and betas, where they are not the run's.
        settings: the run's.
        in_backward: step each parameter inside backward, as soon as its gradient is whole, and drop the gradient. The
            norm of all gradients is not known then, so each tensor's own norm is clipped to `max_grad_norm` instead,
            and every micro-batch is a step.
        whole_norm: the norm of whole gradients from that of the part this process holds.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[nn.Parameter],
        group: Group,
        settings: Settings,
        in_backward: bool = False,
        whole_norm: Callable[[Tensor], Tensor] = lambda own: own,
    ) -> None:
        self.name = name
        self.whole_norm = whole_norm
        self.parameters = list(parameters)
        self.max_grad_norm = settings.max_grad_norm
        self.optimizer = _adam(name, self.parameters, group, settings, in_backward)
        self.schedule = _schedule(self.optimizer, settings)
        self.in_backward = in_backward
        self._norms: list[Tensor] = []
        if in_backward:
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._step_one)

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps between steps, once it has stepped."""
        if isinstance(self.optimizer, LowPrecisionAdamW):
            return 2 * sum(parameter.numel() for parameter in self.parameters)
        return 2 * sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)

    def step(self) -> Tensor:
        """Clips, steps and clears the gradients; returns the norm before clipping."""
        if self.in_backward:
            norm = torch.nn.utils.get_total_norm(self._norms)
            self._norms.clear()
            return norm
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = self.whole_norm(torch.nn.utils.get_total_norm(gradients))
        self.optimizer.found_inf = (~norm.isfinite()).float()
        if isinstance(self.optimizer, torch.optim.AdamW):
            # Clipped where the fused kernel reads the gradients anyway, by what `clip_grads_with_norm_` divides by.
            self.optimizer.grad_scale = ((norm.float() + 1e-6) / self.max_grad_norm).clamp_min(1)
        else:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _step_one(self, parameter: nn.Parameter) -> None:
        average_gradients([parameter])
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        torch.nn.utils.clip_grads_with_norm_([parameter], self.max_grad_norm, norm)
        self.optimizer.step_one(parameter, (~norm.isfinite()).float())
        parameter.grad = None
        self._norms.append(norm)

    def make_state(self) -> None:
        """Takes a step with zero gradients, so that states exist; for planning, not for training."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
            if self.in_backward:
                self._step_one(parameter)
        self.step()

    def end_step(self) -> None:
        """Advances the learning rate; schedules count the run's steps, also those in which the group rests."""
        self._seek(self.schedule.last_epoch + 1)

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `index.key`, in the order of the parameters."""
        state = self.optimizer.state_dict()["state"]
        return {
            f"{index}.{key}": value
            for index, values in state.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }

    def state_json(self) -> dict[str, Any]:
        """What is not a tensor: the schedule's position, and the optimizer's kind and counts."""
        state = {"schedule": {"last_epoch": self.schedule.last_epoch}, "optimizer": type(self.optimizer).__name__}
        return state | ({"counts": self.optimizer.counts} if isinstance(self.optimizer, LowPrecisionAdamW) else {})

    def load_state(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        """Restores `state_tensors` and `state_json`.

        Raises:
            ValueError: if they are of another kind of optimizer.
        """
        if values["optimizer"] != type(self.optimizer).__name__:
            raise ValueError(
                f"the checkpoint's {self.name} was trained with {values['optimizer']}, this run has "
                f"{type(self.optimizer).__name__}: their states differ. Resume with the recipe.yaml beside the "
                "checkpoint (and the same packages), or start a new run with --init_from."
            )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if isinstance(self.optimizer, LowPrecisionAdamW):
            self.optimizer.counts = list(values["counts"])
        self._seek(values["schedule"]["last_epoch"])

    def _seek(self, step: int) -> None:
        """Sets the rate of a step; `schedule.step()` would warn in groups that rest in the first step."""
        rates = [base * factor(step) for base, factor in zip(self.schedule.base_lrs, self.schedule.lr_lambdas)]
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        self.schedule.last_epoch, self.schedule._last_lr = step, rates


def _schedule(optimizer: torch.optim.Optimizer, settings: Settings) -> torch.optim.lr_scheduler.LambdaLR:
    from diffusers.optimization import SchedulerType, get_scheduler

    names = [kind.value for kind in SchedulerType]
    if settings.lr_scheduler not in names:
        raise ValueError(f"lr_scheduler {settings.lr_scheduler!r} is unknown; choose from {', '.join(names)}")
    return get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )


def _adam(
    name: str, parameters: list[nn.Parameter], group: Group, settings: Settings, in_backward: bool
) -> torch.optim.Optimizer:
    options = {
        "lr": settings.learning_rate if group.learning_rate is None else group.learning_rate,
        "betas": group.betas or (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }
    low = in_backward or any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    if not low and not settings.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **options)
    # Not bitsandbytes' 8-bit Adam: it rounds bfloat16 weights to nearest, which loses small updates, steps on gradients
    # that are not finite, and keeps its state in a form that safetensors does not hold.
    return LowPrecisionAdamW(parameters, seed=settings.seed, name=name, **options)
