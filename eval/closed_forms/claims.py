"""Papers' claims as two ways to train whose difference has a predicted sign, in the world where it shows at least cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from closed_forms.plans import EFFORTS, ONE, PHASED, SHORT, START, Effort, Stage, path_stage, plan, score_stage
from closed_forms.worlds import WORLDS, World, equal_rings, far_rings, small_rings

MIXTURE, KERNEL = EFFORTS["mixture"], EFFORTS["kernel"]
KERNEL_MOMENTS = {"moments_weight": 1.0, "moments_mean": -0.006, "moments_variance": 0.88}  # of its law's samples
FEW_SAMPLES = replace(WORLDS["mixture"], samples=500)  # where the law is compared often
SMALL_RINGS = replace(WORLDS["mixture"], build=small_rings, pretrain_steps=0)
FAR_RINGS = replace(WORLDS["mixture"], name="far rings", build=far_rings)
EQUAL_RINGS = replace(WORLDS["mixture"], name="equal rings", build=equal_rings)


@dataclass(frozen=True)
class Counted:
    """An arm of `modes_picture.py`: a divergence, and the last index at which scores are compared."""

    divergence: str
    last: int


@dataclass(frozen=True)
class Scored:
    """An arm of the leaderboard: a recipe of the embedded teacher, at its own steps."""

    recipe: str


Arm = Sequence[Stage] | Counted | Scored


@dataclass(frozen=True)
class Claim:
    """One falsifiable direction.

    Args:
        name: short, in the results.
        arxiv: of the paper.
        text: what is predicted of the first arm.
        figure: what is compared, less is better: one of `figures`, or of the headline over a run `swing` (mean change
            between two previews in the second half) or `area` (mean over all previews), or `spread` (largest less
            smallest headline over all worlds), or of the leaderboard `fid`.
        arms: by name, what is trained; the first is predicted to be better than each other.
        margin: by how much, as a share, the first may be worse; for claims of equality.
        world: where.
        more_worlds: where else each arm is trained.
        limits: what the test does not cover.
    """

    name: str
    arxiv: str
    text: str
    figure: str = "sliced_wasserstein"
    arms: Mapping[str, Arm] = field(default_factory=dict)
    margin: float = 0.0
    world: World = WORLDS["mixture"]
    more_worlds: tuple[World, ...] = ()
    limits: str = ""


def _watched(stage: Stage, every: int) -> Stage:
    """With neither an average of the weights nor a falling learning rate, which would hide what the weights do."""
    own = {"ema_decay": None, "lr_scheduler": "constant", "validation_steps": every}
    return replace(stage, settings={**stage.settings, **own})


def _dmd2(**config) -> Stage:
    return score_stage("dmd2", ONE | {"student_update_every": 2} | config, MIXTURE)


def _divergence(name: str) -> list[Stage]:
    (stage,) = plan("f_distill", "kernel")
    return [replace(stage, config={**stage.config, "divergence": name})]


def _guided(effort: Effort = MIXTURE, **config) -> list[Stage]:
    """Equal moves of the student, whether a fake score steps between them or there is none."""
    alone = config.get("matching_weight") == 0 and "gan_weight" not in config
    common = {"guidance_scale": 3.0, "timesteps": (START,), "student_update_every": 1 if alone else 2}
    return [score_stage("decoupled_dmd", common | config, effort, 0.5 if alone else 1.0)]


def _shared_guidance(method: str, **config) -> list[Stage]:
    return [score_stage(method, {"timesteps": (START,)} | config, MIXTURE)]


def _students(count: int) -> list[Stage]:
    config = ONE | {"student_update_every": 2, "students": count}
    return [score_stage("msd", config | {"student_number": number}, KERNEL) for number in range(count)]


def _straight(times: str, share: float = 1.0) -> list[Stage]:
    config = {"start_timestep": START, "perceptual_weight": 0.0, "times": times}
    return [path_stage("rfpp", config, MIXTURE, share)]


def _small(method: str) -> list[Stage]:
    start = {"start_timestep": START}
    anneal = {"flip_pairs": False, "anneal_steps": MIXTURE.path_steps} if method == "slimflow" else {}
    return [
        path_stage(method, start | anneal, MIXTURE, 1.5),
        path_stage("rectified_flow", start | {"objective": "distill"}, MIXTURE, 0.5),
    ]


def _segmented() -> list[Stage]:
    common = SHORT | {"adversarial_weight": 0.0, "num_ddim_timesteps": 40}
    steps = {8: 8, 4: 4, 2: 2, 1: 2}  # a stage's steps must visit its segments' edges
    return [
        path_stage("tscd", common | {"num_segments": count, "num_inference_steps": steps[count]}, MIXTURE, 0.4)
        for count in steps
    ]


def _consistent(method: str, share: float = 1.0, **config) -> list[Stage]:
    return [path_stage(method, SHORT | {"num_ddim_timesteps": 40} | config, MIXTURE, share)]


def _phases(count: int) -> dict[str, list[Stage]]:
    return {
        "pcm": _consistent("pcm", num_phases=count, adversarial_weight=0.0),
        "lcm": _consistent("lcm", num_inference_steps=count),
    }


CLAIMS = (
    Claim(
        "two_time_scale",
        "2405.14867",
        "five fake-score steps a student step are steadier than one",
        "swing",
        {
            "5:1": [_watched(_dmd2(student_update_every=5), 10)],
            "1:1": [_watched(_dmd2(student_update_every=1), 10)],
        },
        world=FEW_SAMPLES,
        limits="equal steps of the fake score, so that the student of 5:1 makes a fifth of the moves",
    ),
    Claim(
        "backward_simulation",
        "2405.14867",
        "a two-step student trained on its own first step is better than one trained on noised data",
        arms={
            "simulate": [_dmd2(timesteps=(999, 499), multi_step_input="simulate")],
            "noised data": [_dmd2(timesteps=(999, 499), multi_step_input="noised_data")],
        },
    ),
    Claim(
        "augmentation_collapses",
        "2511.22677",
        "without its matching term, guidance augmentation alone leaves the law",
        arms={"both terms": _guided(), "augmentation alone": _guided(matching_weight=0.0)},
        limits="distance to the unguided law, at w = 3",
    ),
    Claim(
        "augmentation_loses_modes",
        "2511.22677",
        "without its matching term, guidance augmentation alone loses modes",
        "total_variation",
        {"both terms": _guided(), "augmentation alone": _guided(matching_weight=0.0)},
        limits="at w = 3",
    ),
    Claim(
        "moments_for_matching",
        "2511.22677",
        "a regulariser of moments can stand for the matching term: it keeps modes that augmentation alone loses",
        "total_variation",
        {
            "moments instead": _guided(KERNEL, matching_weight=0.0, **KERNEL_MOMENTS),
            "augmentation alone": _guided(KERNEL, matching_weight=0.0),
        },
        world=WORLDS["kernel"],
        limits="at w = 3",
    ),
    Claim(
        "gan_for_matching",
        "2511.22677",
        "a GAN can stand for the matching term",
        arms={
            "GAN instead": _guided(matching_weight=0.0, gan_weight=0.1, gan_discriminator_weight=1.0),
            "augmentation alone": _guided(matching_weight=0.0),
        },
        limits="distance to the unguided law, at w = 3",
    ),
    Claim(
        "js_covers",
        "2502.15681",
        "js keeps more modes than the reverse KL, where scores are compared at little noise (up to index 200)",
        "modes_lost",
        {"js": Counted("js", 200), "rkl": Counted("rkl", 200)},
        limits="exact scores and ratio in f-distill's loss, a student of six numbers, four modes: the picture",
    ),
    Claim(
        "js_covers_all_noise",
        "2502.15681",
        "the same where they are compared at all noise levels, as published",
        "modes_lost",
        {"js": Counted("js", 980), "rkl": Counted("rkl", 980)},
        limits="as above",
    ),
    Claim(
        "js_covers_kernel",
        "2502.15681",
        "js keeps the shares of 375 modes better than the reverse KL, with a learned ratio",
        "total_variation",
        {"js": _divergence("js"), "rkl": _divergence("rkl")},
        world=WORLDS["kernel"],
    ),
    Claim(
        "fkl_covers_kernel",
        "2502.15681",
        "so does the forward KL",
        "total_variation",
        {"fkl": _divergence("fkl"), "rkl": _divergence("rkl")},
        world=WORLDS["kernel"],
    ),
    Claim(
        "disback_faster",
        "2408.15991",
        "over a run of equal steps, backtracking is nearer to the law than DMD2",
        "area",
        {
            "disback": [_watched(stage, 20) for stage in plan("disback", "mixture")],
            "dmd2": [_watched(score_stage("dmd2", ONE | {"student_update_every": 2}, MIXTURE, 7 / 6), 20)],
        },
        world=FEW_SAMPLES,
        limits="the steps that record the path are counted",
    ),
    Claim(
        "four_students",
        "2410.23274",
        "four students of two captions each are better than one of eight",
        "total_variation",
        {"four": _students(4), "one": _students(1)},
        world=WORLDS["kernel"],
        limits="equal steps for each student, so that four have four times the compute",
    ),
    Claim(
        "phased_diversity",
        "2510.27684",
        "phased experts keep the modes' shares better than stochastic truncation alone, at four steps",
        "total_variation",
        {
            "phased": plan("phased_dmd", "mixture"),
            "truncation": [score_stage("phased_dmd", PHASED | {"phase_steps": (4,)}, MIXTURE)],
        },
    ),
    Claim(
        "annealed_reflow",
        "2407.12718",
        "annealed reflow is better than plain reflow for a small student that starts untrained",
        arms={"annealed": _small("slimflow"), "plain": _small("rectified_flow")},
        world=SMALL_RINGS,
    ),
    Claim(
        "u_shaped_times",
        "2405.20320",
        "U-shaped times are better than uniform ones, at one step",
        arms={"u-shaped": _straight("u_shaped"), "uniform": _straight("uniform")},
    ),
    Claim(
        "segments",
        "2404.13686",
        "TSCD's segments 8-4-2-1 are better than TCD at two steps",
        arms={
            "tscd": _segmented(),
            "tcd": _consistent("tcd", 1.6, num_inference_steps=2, eta=0.0),
        },
        limits="without TSCD's adversarial term",
    ),
    Claim(
        "scott_adversarial",
        "2403.01505",
        "SCott keeps the modes' shares only with its adversarial term",
        "total_variation",
        {
            "adversarial": _consistent(
                "scott", num_inference_steps=2, adversarial_weight=0.4, discriminator_learning_rate=1e-3
            ),
            "without": _consistent("scott", num_inference_steps=2, adversarial_weight=0.0),
        },
    ),
    Claim(
        "phases_many_steps",
        "2405.18407",
        "eight phases are better than plain consistency at eight steps",
        arms=_phases(8),
        limits="without PCM's adversarial term",
    ),
    Claim(
        "phases_ten_steps",
        "2405.18407",
        "ten phases are better than plain consistency at ten steps",
        arms=_phases(10),
        limits="without PCM's adversarial term",
    ),
    Claim(
        "phases_twenty_steps",
        "2405.18407",
        "twenty phases are better than plain consistency at twenty steps",
        arms=_phases(20),
        limits="without PCM's adversarial term; a phase is two of the solver's steps",
    ),
    Claim(
        "data_free_maps",
        "2511.19428",
        "flow maps without data (FreeFlow) equal those with data (MeanFlow), within a tenth",
        arms={"freeflow": plan("freeflow", "mixture"), "meanflow": plan("meanflow", "mixture")},
        margin=0.1,
    ),
    Claim(
        "decoupled_schedules",
        "2511.22677",
        "guidance at noise levels below the student's input is better than guidance at all of them, as matching has",
        "fid",
        {"decoupled": Scored("decoupled_dmd"), "coupled": Scored("decoupled_dmd_coupled")},
        limits="four steps at w = 1.5",
    ),
    Claim(
        "random_guidance",
        "2412.02687",
        "guidance drawn from (0.5, 4) is steadier across teachers than its mean for all",
        "spread",
        {
            "random": _shared_guidance("pg_sb", guidance_range=(0.5, 4.0)),
            "fixed": _shared_guidance("swiftbrush", guidance_scale=2.25),
        },
        more_worlds=(FAR_RINGS, EQUAL_RINGS),
        limits="over three pairs of rings: one in the other, far apart, and of one size half overlapping",
    ),
)
