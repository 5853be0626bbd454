"""Several students of one teacher as one model: each prompt is drawn by the student it is routed to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.models.routing import Router, features_of
from fastdiff.models.teacher import Teacher
from fastdiff.recipes.student import Student

ROUTER_FILE = "router.safetensors"


class StudentMixture:
    """The students of a multi-student distillation (Song et al. 2024, arXiv 2410.23274).

    Pipelines are loaded when first needed and stay in memory; a sample costs what one student costs.

    Args:
        folders: the student folders, one for every part, in any order.
        dtype, device: of the pipelines, as `Student.pipeline` takes them.

    Attributes:
        students: in the order of their numbers.
        router: tells a condition's number.

    Raises:
        FileNotFoundError: if a folder is no student, or holds no router.
        ValueError: if the folders are not all the students of one split.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        found = [(Student(folder), _router(Path(folder))) for folder in folders]
        if not found:
            raise ValueError("no student folders were given")
        self.router = found[0][1]
        numbers = [student.record.recipe["student_number"] for student, _ in found]
        if sorted(numbers) != list(range(self.router.parts)):
            raise ValueError(
                f"these are students {sorted(numbers)}; give every one of 0 to {self.router.parts - 1} once"
            )
        if not all(self.router.agrees(router) for _, router in found):
            raise ValueError("these students split the conditions differently: they are not of one distillation")
        self.students = [student for _, (student, _) in sorted(zip(numbers, found, strict=True), key=lambda p: p[0])]
        self.dtype, self.device = dtype, device
        self._pipelines: dict[int, Any] = {}

    def route(self, prompts: Sequence[str]) -> list[int]:
        """The number of the student that serves each prompt."""
        encoder = Teacher(self.pipeline(next(iter(self._pipelines), 0)))
        cond = encoder.encode(list(prompts), encoder.default_resolution)
        return self.router(features_of(cond)).tolist()

    def pipelines(self, prompts: Sequence[str]) -> list[Any]:
        """The pipeline that serves each prompt, as `evaluate` takes them for its `route`."""
        return [self.pipeline(number) for number in self.route(prompts)]

    def pipeline(self, number: int) -> Any:
        """The stock pipeline of a student."""
        if number not in self._pipelines:
            self._pipelines[number] = self.students[number].pipeline(self.dtype, self.device)
        return self._pipelines[number]

    def __call__(self, prompts: Sequence[str], **call: Any) -> list[Any]:
        """An image for each prompt, in their order.

        Args:
            prompts: what to draw.
            call: further arguments of the pipelines; a generator is used by the students in the order of their numbers.
        """
        served_by = self.route(prompts)
        images: dict[int, Any] = {}
        for number in sorted(set(served_by)):
            places = [place for place, served in enumerate(served_by) if served == number]
            own = self.students[number].call | call
            drawn = self.pipeline(number)([prompts[place] for place in places], **own).images
            images |= dict(zip(places, drawn, strict=True))
        return [images[place] for place in range(len(served_by))]


def _router(folder: Path) -> Router:
    from safetensors.torch import load_file

    path = folder / ROUTER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {ROUTER_FILE}: it is not one of several students")
    return Router.from_state(load_file(path))
