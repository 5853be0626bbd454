"""The tier of closed forms: every method has a plan, figures are right where the answer is known, verdicts follow."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "eval"))

import analytic
import claims as claims_command
import modes_picture
from closed_forms.claims import CLAIMS, Claim, Counted, Scored
from closed_forms.figures import exact_draws, figures, labels_of
from closed_forms.plans import Stage, plan
from closed_forms.runs import run
from closed_forms.worlds import WORLDS, draws

from fastdiff.methods import METHODS, method_named

RECIPES = Path(__file__).resolve().parents[2] / "training" / "recipes" / "embedded"
GAUSSIAN = replace(WORLDS["gaussian"], pretrain_steps=0, samples=64)


@pytest.mark.parametrize("method", [method.info.name for method in METHODS])
@pytest.mark.parametrize("world", WORLDS)
def test_every_method_has_a_plan_that_its_config_accepts_or_a_reason(method, world):
    stages = plan(method, world)
    if isinstance(stages, str):
        assert stages
        return
    for stage in stages:
        cls = method_named(stage.method)
        assert getattr(cls.Config(**stage.config), "guidance_scale", 1.0) == 1.0
        assert not cls(cls.Config(**stage.config)).needs_scorer()  # points are no pictures
    assert stages[-1].method == method


def test_figures_of_a_shifted_and_scaled_gaussian_are_the_closed_form():
    teacher = WORLDS["gaussian"].build()
    law = teacher.law
    z = torch.randn(20_000, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = law.sample(z)
    far = 2 * (exact - law.mean[:, None, None]) + law.mean[:, None, None] + 0.3
    found = figures(teacher, far, torch.zeros(len(far), dtype=torch.int64))
    assert found["mean_error"] == pytest.approx(0.3 * 2**0.5, rel=0.05)
    assert found["wasserstein"] == pytest.approx((2 * 0.3**2 + torch.trace(law.cov).item()) ** 0.5, rel=0.05)


def test_figures_tell_a_lost_mode_and_a_swapped_caption():
    world = WORLDS["mixture"]
    teacher = world.build()
    labels = labels_of(world, teacher)
    exact = exact_draws(teacher, labels)
    perfect = figures(teacher, exact, labels)
    assert perfect["coverage"] == 1 and perfect["total_variation"] < 0.03 and perfect["sliced_wasserstein"] < 0.03
    lost = torch.where(teacher.law.nearest_mode(exact)[:, None, None, None] == 0, teacher.law.modes(exact)[1], exact)
    assert figures(teacher, lost, labels)["coverage"] == pytest.approx(11 / 12)
    assert figures(teacher, lost, labels)["total_variation"] == pytest.approx(0.1, abs=0.03)  # a fifth of one caption
    swapped = figures(teacher, exact, 1 - labels)
    assert swapped["total_variation"] == pytest.approx(1) and swapped["coverage"] == 0


def test_pairs_are_the_teachers_own_and_data_come_in_whole_batches():
    data = draws(WORLDS["gaussian"], pairs=True)
    batch = data.collate([data[3], data[5]])
    assert batch["prompt"] == ["a sample"] * 2 and batch["latents"].shape == (2, 2, 1, 1)
    # DDIM takes noise to samples monotonically along each axis of a Gaussian.
    noise, latents = (data.tensors[name].flatten(1) for name in ("noise", "latents"))
    assert torch.corrcoef(torch.stack([noise[:, 0], latents[:, 0]]))[0, 1] > 0.9


def test_stages_go_on_from_each_other_and_are_watched(tmp_path):
    settings = {"max_train_steps": 2, "train_batch_size": 4, "validation_steps": 1}
    first = Stage("progressive", {"num_inference_steps": 2}, settings)
    second = Stage("progressive", {"num_inference_steps": 1, "stage_teacher": "previous"}, settings)
    seen = []
    outcome = run([first, second], GAUSSIAN, 0, tmp_path / "run", tmp_path, lambda x, _: seen.append(x.shape))
    assert outcome.calls == 1 and outcome.steps == 4 and outcome.samples.shape == (64, 2, 1, 1)
    assert seen == [torch.Size([64, 2, 1, 1])] * 6  # at the start and after each step, in both stages
    assert not (tmp_path / "run").exists()


def test_students_of_different_captions_share_the_samples(tmp_path):
    world = replace(WORLDS["mixture"], pretrain_steps=0, samples=16)
    config = {"guidance_scale": 1.0, "timesteps": (749,), "students": 2}
    settings = {"max_train_steps": 1, "train_batch_size": 4}
    stages = [Stage("msd", config | {"student_number": number}, settings) for number in (0, 1)]
    outcome = run(stages, world, 0, tmp_path / "run", tmp_path)
    assert outcome.samples.isfinite().all() and outcome.steps == 2


def test_a_world_without_what_a_method_needs_gives_a_reason(tmp_path):
    row = analytic.row_of("msd", WORLDS["gaussian"], 0, tmp_path)
    assert row["reason"] and "score" not in row


def test_the_table_has_means_ranges_and_holes():
    rows = [
        {"method": "a", "teacher": "gaussian", "seed": seed, "score": score, "network_calls": 1}
        for seed, score in enumerate((0.1, 0.3))
    ]
    rows.append({"method": "b", "teacher": "mixture", "seed": 0, "reason": "no captions"})
    text = analytic.table(rows)
    assert "| `a` | 0.20 (0.10-0.30), 1 calls | no run yet |" in text
    assert "| `b` | no run yet | not possible |" in text


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ((1, 1, 1), (2, 2, 2), "held"),
        ((3, 3, 3), (2, 2, 2), "did not hold"),
        ((1, 3, 1), (2, 2, 2), "not shown"),
        ((2, 2, 2), (2, 2, 2), "not shown"),
        ((1, 1), (2, 2), "not finished"),
    ],
)
def test_verdicts_ask_all_seeds(first, second, outcome):
    claim = Claim("x", "0000.00000", "a is better", arms={"a": [], "b": []})
    arms = {
        arm: {str(seed): {"value": value} for seed, value in enumerate(values)}
        for arm, values in (("a", first), ("b", second))
    }
    assert claims_command.verdict(claim, {"arms": arms}) == outcome


def test_an_equality_has_a_margin():
    arms = {arm: {str(seed): {"value": value} for seed in range(3)} for arm, value in (("a", 1.05), ("b", 1.0))}
    claim = Claim("x", "0000.00000", "a equals b", arms={"a": [], "b": []})
    assert claims_command.verdict(claim, {"arms": arms}) == "did not hold"
    assert claims_command.verdict(replace(claim, margin=0.1), {"arms": arms}) == "held"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_every_arm_of_a_claim_is_accepted_by_its_methods(claim):
    assert len(claim.arms) > 1
    for arm in claim.arms.values():
        if isinstance(arm, Scored):
            assert (RECIPES / f"{arm.recipe}.yaml").is_file()
            continue
        for stage in () if isinstance(arm, Counted) else arm:
            cls = method_named(stage.method)
            assert cls(cls.Config(**stage.config)).info.name == stage.method


def test_a_leaderboards_row_that_is_not_there_leaves_the_claim_open():
    claim = Claim("x", "0000.00000", "a is better", "fid", arms={"a": Scored("no such recipe"), "b": Scored("b")})
    assert claims_command.figure_of(claim, claim.arms["a"], 0, Path()) is None
    found = claims_command.figure_of(claim, Scored("dmd2_1step"), 0, Path())
    assert found["value"] == found["figures"]["fid"] > 0


def test_a_spread_is_the_range_over_all_worlds(monkeypatch):
    values = {"gaussian": 0.3, "mixture": 0.1, "kernel": 0.7}
    monkeypatch.setattr(claims_command, "trained", lambda claim, arm, world, *_: {"value": values[world.name]})
    others = (WORLDS["gaussian"], WORLDS["kernel"])
    claim = Claim("x", "0000.00000", "a is steadier", "spread", arms={"a": [], "b": []}, more_worlds=others)
    found = claims_command.figure_of(claim, [], 0, Path())
    assert found == {"value": pytest.approx(0.6), "figures": values}


def test_swing_is_of_the_second_half():
    assert claims_command.swing([9.0, 0.0, 1.0, 2.0, 1.0]) == pytest.approx(1.0)


def test_the_page_names_every_claim():
    page = claims_command.page({})
    assert all(claim.text in page for claim in CLAIMS)


def test_a_mode_counts_when_samples_land_in_it():
    means = torch.tensor(modes_picture.MEANS, dtype=torch.float64)
    found = modes_picture.counted(means[:3].repeat(40, 1))
    assert found["modes_kept"] == 3 and found["total_variation"] == pytest.approx(0.25)


@pytest.mark.slow
def test_reverse_kl_drops_modes_where_js_and_forward_kl_keep_them():
    names = ("rkl", "js", "fkl")
    kept = {name: modes_picture.counted(modes_picture.trained(name, 200, 0))["modes_kept"] for name in names}
    assert kept == {"rkl": 2, "js": 4, "fkl": 4}
