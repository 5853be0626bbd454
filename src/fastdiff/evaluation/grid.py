"""Picture grids: the same prompts and noise, one row of images a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastdiff.evaluation.generation import generate_routed, sample_seeds
from fastdiff.evaluation.resizing import to_pil

if TYPE_CHECKING:
    from PIL import Image

MARGIN, LABEL, LINE = 4, 150, 13


def grid_images(
    pipeline: Any,
    prompts: Sequence[str],
    steps: int,
    guidance_scale: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    extra: dict[str, Any] | None = None,
    route: Callable[[Sequence[str]], Sequence[Any]] | None = None,
) -> Tensor:
    """One image a prompt, uint8 (N, 3, H, W); the noise depends on ``seed`` only, so rows of a grid share it.

    ``route`` is as ``evaluate`` takes it.
    """
    seeds = sample_seeds(seed, "grid", len(prompts))
    served_by = route(prompts) if route else [pipeline] * len(prompts)
    call = prompts, seeds, steps, guidance_scale, batch_size, extra
    return generate_routed(served_by, *call, progress=False).images


def draw_grid(rows: Sequence[tuple[str, Tensor]], prompts: Sequence[str] = (), cell: int = 96) -> Image.Image:
    """A picture with one labelled row for each (label, uint8 (N, 3, H, W)), and the prompts above the columns.

    Images smaller than ``cell`` pixels are enlarged by whole pixels so that they can be judged by eye.

    Raises:
        ValueError: no rows, or rows of different lengths.
    """
    from PIL import Image, ImageDraw

    if not rows or len({len(images) for _, images in rows}) != 1:
        raise ValueError(f"a grid needs rows of one length, got {[len(images) for _, images in rows]}")
    count, side = len(rows[0][1]), _shown_side(rows[0][1].shape[-1], cell)
    header = 4 * LINE + MARGIN if prompts else 0
    size = (LABEL + count * (side + MARGIN) + MARGIN, header + len(rows) * (side + MARGIN) + MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, prompt in enumerate(prompts):
        draw.multiline_text(
            (LABEL + column * (side + MARGIN), 2), _wrap(prompt, side // 6, 4), fill="black", spacing=2
        )
    for index, (label, images) in enumerate(rows):
        top = header + index * (side + MARGIN)
        draw.multiline_text((MARGIN, top + side // 2 - LINE), _wrap(label, LABEL // 7, 4), fill="black", spacing=2)
        for column, image in enumerate(images):
            picture = to_pil(image).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(picture, (LABEL + column * (side + MARGIN), top))
    return canvas


def save_picture(picture: Image.Image, path: str | Path) -> Path:
    """Writes a PNG aside and renames it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    picture.save(aside, format="PNG")
    aside.replace(path)
    return path


def _shown_side(side: int, cell: int) -> int:
    return side * max(1, cell // side) if side < cell else cell


def _wrap(text: str, width: int, lines: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text.encode("latin-1", "replace").decode("latin-1"), max(width, 4))[:lines])
