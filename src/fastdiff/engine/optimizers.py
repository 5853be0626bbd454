"""One optimizer and one learning-rate schedule for each trainable group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.engine.settings import Settings
from fastdiff.methods import Group


class GroupOptimizer:
    """AdamW, clipping and learning-rate schedule of one group of parameters.

    A step whose gradients are not finite is skipped on the device (fused Adam's `found_inf`), so that the weights
    survive until the deferred metrics read reports it.
    """

    def __init__(self, name: str, parameters: Sequence[nn.Parameter], group: Group, settings: Settings) -> None:
        self.name = name
        self.parameters = list(parameters)
        self.max_grad_norm = settings.max_grad_norm
        self.optimizer = _adam(self.parameters, group, settings)
        self.schedule = _schedule(self.optimizer, settings)

    def step(self) -> Tensor:
        """Clips, steps and clears the gradients; returns the norm before clipping."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

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
        """What is not a tensor: the schedule's position."""
        return {"schedule": {"last_epoch": self.schedule.last_epoch}}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores `state_tensors` and `state_json`."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
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


def _adam(parameters: list[nn.Parameter], group: Group, settings: Settings) -> torch.optim.Optimizer:
    options = {
        "lr": settings.learning_rate if group.learning_rate is None else group.learning_rate,
        "betas": group.betas or (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }
    if not settings.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError("use_8bit_adam needs bitsandbytes: pip install 'fastdiff-diffusers[8bit]'") from error
    return bitsandbytes.optim.AdamW8bit(parameters, **options)
