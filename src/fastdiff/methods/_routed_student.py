"""One of several students, each for a part of the conditions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.methods._small_student import SmallStudent, SmallStudentConfig
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.routing import Router, features_of

logger = logging.getLogger(__name__)

_ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class RoutedStudentConfig(SmallStudentConfig):
    """One of several students, and its size.

    Args:
        students: how many parts the conditions are split into, each for one student; 1 splits nothing.
        student_number: the part that this run trains a student for, from 0.
    """

    students: int = 1
    student_number: int = 0

    def check_students(self) -> None:
        """Refuses students that do not exist and sizes out of range.

        Raises:
            ValueError: naming the setting.
        """
        self.shape()
        if self.students < 1:
            raise ValueError(f"students must be at least 1, got {self.students}")
        if not 0 <= self.student_number < self.students:
            raise ValueError(
                f"student_number must be from 0 to {self.students - 1}, since there are {self.students} students, "
                f"got {self.student_number}"
            )


class RoutedStudent(SmallStudent):
    """Student number k of K: trains on the conditions that a router gives it.

    The router is fitted to the different prompts of the data, the same for every k; it is kept in checkpoints and stored
    beside the student.
    """

    config: RoutedStudentConfig

    def __init__(self, config: RoutedStudentConfig) -> None:
        super().__init__(config)
        self._router: Router | None = None

    def random_stream(self) -> int:
        return self.config.student_number

    def choose(self, prompts: Sequence[str], encode: Callable[[Sequence[str]], Conditioning]) -> list[int] | None:
        if self.config.students == 1:
            return None
        captions = list(prompts)
        distinct = sorted(set(captions))
        blocks = (distinct[start : start + _ENCODED_AT_ONCE] for start in range(0, len(distinct), _ENCODED_AT_ONCE))
        features = torch.cat([features_of(encode(block)) for block in blocks])
        self._router = Router.fit(features, self.config.students)
        part = dict(zip(distinct, self._router(features).tolist(), strict=True))
        chosen = [item for item, caption in enumerate(captions) if part[caption] == self.config.student_number]
        logger.info("student %d of %d trains on %d of %d samples", *self._numbers, len(chosen), len(captions))
        return chosen

    @property
    def _numbers(self) -> tuple[int, int]:
        return self.config.student_number, self.config.students

    def check_ready(self) -> None:
        if self.config.students > 1 and self._router is None:
            raise ValueError(
                f"student {self._numbers[0]} of {self._numbers[1]} trains on its own part of the conditions, which "
                "nobody has chosen: open the data with fastdiff.engine.chosen_data"
            )

    def export_files(self) -> dict[str, dict[str, Tensor]]:
        files = super().export_files()
        return files if self._router is None else files | {"router": self._router.state_dict()}

    def state_dict(self) -> dict[str, Tensor]:
        own = {} if self._router is None else self._router.state_dict()
        return super().state_dict() | {f"router.{name}": tensor for name, tensor in own.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict()`.

        Raises:
            ValueError: if the data have been split differently meanwhile.
        """
        super().load_state_dict({name: t for name, t in state.items() if not name.startswith("router.")})
        own = {name.removeprefix("router."): t for name, t in state.items() if name.startswith("router.")}
        if not own:
            return
        router = Router.from_state(own)
        if self._router is not None and not self._router.agrees(router):
            raise ValueError(
                "the checkpoint's router splits the conditions differently from the one fitted to this data: resume "
                "with the data, teacher and number of students that the run began with"
            )
        self._router = router
