"""fastdiff turns any diffusers text-to-image pipeline into a 1-8 step one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.recipes.run import distill
    from fastdiff.recipes.student import Student

__version__ = "0.1.0"
__all__ = ["Student", "distill"]


def __getattr__(name: str) -> Any:
    # Torch and diffusers take seconds to import; `fastdiff --help` must not.
    if name == "distill":
        from fastdiff.recipes.run import distill

        return distill
    if name == "Student":
        from fastdiff.recipes.student import Student

        return Student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
