"""How fast a network's prediction changes along its own trajectory, by the width over which that is asked.

    python eval/time_ripples.py --model embedded [--output eval/results/time_ripples.json]

Prints the root mean square of d(velocity) / d ln(sigma / alpha) at several times, exact and over chords of indices
(`fastdiff.models.tangents`). Where the exact one is much larger than those over a few indices, continuous-time methods
need `tangent_chord`: most of it is ripples of the time embedding, which training on it makes grow.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.diffusion import solve
from fastdiff.methods.scm import log_kappa_rate, root_mean_square, trig_velocity
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import TEACHER, Roles
from fastdiff.models.tangents import Point, Tangents, ode_direction
from fastdiff.models.teacher import Teacher

ROOT = Path(__file__).resolve().parents[1]
INDICES = (979, 899, 799, 699, 599, 499, 399, 299, 199, 99)
CHORDS = (0.0, 2.0, 8.0, 16.0, 40.0)
STEPS = 50  # DDIM steps of the trajectory


@torch.no_grad()
def states(denoiser: Denoiser, z: Tensor, cond: Conditioning) -> dict[int, Tensor]:
    """The teacher's own samples on their way, by index."""
    stops = sorted({999, *INDICES, *range(19, 999, 1000 // STEPS)}, reverse=True)
    times = [denoiser.schedule.time_of_index(torch.full((len(z),), float(index))) for index in stops]
    found, x = {stops[0]: z}, z
    for stop, pair in zip(stops[1:], itertools.pairwise(times), strict=True):
        x = found[stop] = solve(lambda x, t: denoiser(x, t, cond, TEACHER), x, list(pair))
    return found


@torch.no_grad()
def speeds(denoiser: Denoiser, cond: Conditioning, x: Tensor, index: int) -> list[float]:
    """Root mean square of the velocity's change, one number a chord."""
    t = denoiser.schedule.time_of_index(torch.full((len(x),), float(index)))
    teacher = denoiser(x, t, cond, TEACHER)
    along = ode_direction(teacher, log_kappa_rate(denoiser.schedule, t))
    changes = (
        Tangents(chord=chord)(denoiser, cond, TEACHER, Point(x, t), along, trig_velocity).derivative
        for chord in CHORDS
    )
    return [root_mean_square(change).mean().item() for change in changes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="pipeline folder, Hub id, or a teacher shipped here")
    parser.add_argument("--prompts", type=Path, default=ROOT / "eval/prompts/emoji_train.txt")
    parser.add_argument("--count", type=int, default=64, help="prompts that are used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    teacher = Teacher.from_pretrained(arguments.model)
    prompts = arguments.prompts.read_text().splitlines()[: arguments.count]
    resolution = teacher.default_resolution
    cond = teacher.encode(prompts, resolution)
    generator = torch.Generator().manual_seed(arguments.seed)
    z = torch.randn(len(prompts), *teacher.latent_shape(resolution), generator=generator)
    denoiser = Denoiser(Roles(teacher.network, {}), teacher.family, teacher.schedule, teacher.prediction_type)
    on_the_way = states(denoiser, z, cond)
    print("index   " + "".join(f"{f'{chord:g} indices' if chord else 'exact':>12}" for chord in CHORDS))
    rows = []
    for index in INDICES:
        rows.append({"index": index, **dict(zip(map(str, CHORDS), speeds(denoiser, cond, on_the_way[index], index)))})
        print(f"{index:<8}" + "".join(f"{rows[-1][str(chord)]:12.3f}" for chord in CHORDS), flush=True)
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"model": arguments.model, "seed": arguments.seed, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
