"""A pipeline through a whole protocol."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from fastdiff.evaluation import evaluate, floor_row, teacher_features
from fastdiff.evaluation.baselines import (
    Sampling,
    baseline_rows,
    candidates,
    load_rows,
    save_rows,
    scheduler_for,
    score_sampling,
    search,
    with_sampling,
)
from fastdiff.evaluation.evaluate import load_pipeline, score_images


@pytest.fixture(scope="module")
def bench(tower, tiny_benchmark):
    retrieval = (torch.tensor([0, 3, 5, 7]), torch.tensor([0, 0, 1, 1]))
    return tiny_benchmark(tower, retrieval=retrieval, diversity=("abc", "def"))


def test_a_row_has_every_number_and_setting(tiny_sd, bench):
    bench = replace(bench, teacher=teacher_features(tiny_sd, bench, steps=2))
    row = evaluate(tiny_sd, bench, 2, 2.0, name="it", progress=False)
    content = row.to_dict()
    assert not [key for key, value in content.items() if value is None]
    assert (row.name, row.steps, row.network_calls, row.solver) == ("it", 2, 4, "DDIMScheduler")
    assert row.settings["extractor_sha256"] == bench.extractor.sha256 and row.settings["n"] == 12
    assert row.protocol == "tiny/random-tower"
    measured = {"fid", "fid_to_teacher", "kid", "clip", "retrieval", "precision", "recall", "diversity", "sharpness"}
    assert set(row.interval) == measured
    assert all(low <= content[key] + 1e-6 and content[key] <= high + 1e-6 for key, (low, high) in row.interval.items())


def test_a_folder_gives_the_same_row(tiny_sd, tiny_sd_folder, bench, tmp_path):
    by_object, by_folder = (evaluate(p, bench, 1, progress=False) for p in (tiny_sd, tiny_sd_folder))
    assert by_folder.fid == pytest.approx(by_object.fid, rel=1e-4)
    halved = copy.deepcopy(tiny_sd).to(dtype=torch.float16)
    halved.save_pretrained(tmp_path / "half")
    assert load_pipeline(tmp_path / "half").text_encoder.dtype == torch.float32
    with pytest.raises(FileNotFoundError, match="model_index"):
        evaluate(tiny_sd_folder / "unet", bench, 1)


def test_reference_scored_against_itself(tower, tiny_benchmark):
    images = torch.randint(0, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    bench = tiny_benchmark(tower)
    from fastdiff.evaluation import ImageFeatures

    values, _ = score_images(replace(bench, reference=ImageFeatures.of(images, tower)), images)
    assert values["fid"] == pytest.approx(0, abs=1e-4)
    assert values["precision"] == values["recall"] == 1


def test_the_teachers_reference_shares_no_noise_with_its_samples(tiny_sd, bench):
    reference = teacher_features(tiny_sd, bench, steps=1)
    row = evaluate(tiny_sd, replace(bench, teacher=reference), 1, 1.0, progress=False)
    assert row.fid_to_teacher > 1e-4
    assert reference.manifest["steps"] == 1 and reference.manifest["n"] == 12


def test_floor_scores_the_real_images(bench):
    row = floor_row(replace(bench, diversity=("a", "b")))
    assert row.name == "floor" and row.fid > 0 and row.diversity > 0 and row.network_calls is None
    assert floor_row(replace(bench, floor=bench.reference)).fid == pytest.approx(0, abs=1e-4)


def test_wrong_resolution_is_refused(tiny_sd, bench):
    with pytest.raises(ValueError, match="16x16 images"):
        evaluate(tiny_sd, bench, 1, extra={"height": 16, "width": 16}, progress=False)


def test_candidates_cost_what_they_should():
    three, four, one = candidates(3), candidates(4), candidates(1)
    assert {s.network_calls for s in four} == {4} and {s.steps for s in four} == {4, 2}
    assert {s.guidance_scale for s in three} == {s.guidance_scale for s in one} == {1.0}


@pytest.mark.parametrize("solver", ["DDIM", "Euler", "DPM-Solver++ 2M", "UniPC"])
def test_solvers_start_where_told(tiny_sd, solver):
    config = dict(tiny_sd.scheduler.config)
    for start in (999, 399):
        scheduler = scheduler_for(config, Sampling(solver, 1, start=start))
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == [start]
        assert torch.allclose(scheduler.betas.double(), tiny_sd.scheduler.betas[: start + 1].double())


def test_flows_go_down_an_even_grid_from_noise():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
    scheduler = scheduler_for(config, Sampling("Euler", 4))
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-6)
    for other in (Sampling("DDIM", 4), Sampling("Euler", 4, start=499)):
        with pytest.raises(ValueError, match="Euler from index 999"):
            scheduler_for(config, other)


def test_all_solvers_agree_with_many_steps_and_with_ddim_at_one(tiny_sd, bench):
    from fastdiff.evaluation.generation import generate

    def run(solver, steps, start):
        sampling = Sampling(solver, steps, start=start)
        pipeline = with_sampling(tiny_sd, sampling)
        return generate(pipeline, ["a"], [1], steps, progress=False).images.float()

    one = run("DDIM", 1, 399)
    assert (run("DPM-Solver++ 2M", 1, 399) - one).abs().max() <= 1
    assert (run("UniPC", 1, 399) - one).abs().max() <= 1


def test_the_original_pipeline_keeps_its_scheduler(tiny_sd):
    before = tiny_sd.scheduler
    changed = with_sampling(tiny_sd, Sampling("Euler", 1))
    assert tiny_sd.scheduler is before and type(changed.scheduler).__name__ == "EulerDiscreteScheduler"
    assert changed.unet is tiny_sd.unet


def test_unknown_solver_and_start(tiny_sd):
    with pytest.raises(ValueError, match="there are DDIM"):
        scheduler_for(dict(tiny_sd.scheduler.config), Sampling("Heun", 1))
    with pytest.raises(ValueError, match="1 to 999"):
        scheduler_for(dict(tiny_sd.scheduler.config), Sampling("DDIM", 1, start=1000))


def test_the_chosen_baseline_is_the_best_tried(tiny_sd, bench):
    options = [Sampling("DDIM", 1, start=s) for s in (999, 399)]
    chosen, record = search(tiny_sd, bench, options, bench.reference, count=8, finalists=2, progress=False)
    few, final = ([line for line in record if line["n"] == n] for n in (8, 12))
    assert len(few) == 8 and len(final) == 2  # two starts with four solvers, then the best two on all prompts
    best = min(final, key=lambda line: line["distance"])
    assert (chosen.solver, chosen.start) == (best["solver"], best["start"])
    assert max(line["distance"] for line in record) > best["distance"]
    with pytest.raises(ValueError, match="no samplings"):
        search(tiny_sd, bench, [], bench.reference)


def test_baseline_rows(tiny_sd, bench, monkeypatch):
    import fastdiff.evaluation.baselines as baselines

    options = [Sampling("DDIM", 1, start=s) for s in (999, 399)]
    monkeypatch.setattr(baselines, "candidates", lambda calls, guidance=(): options)
    test = replace(bench, teacher=bench.floor)
    rows, record = baseline_rows(tiny_sd, test, bench, 1, count=8, progress=False)
    assert [row.name for row in rows] == ["undistilled-1", "undistilled-1-matched"]
    assert {line["row"] for line in record} == {row.name for row in rows}
    assert rows[0].settings["sampling"]["start"] in (999, 399) and rows[0].network_calls == 1


def test_stored_rows_come_back_and_belong_to_their_protocol(tiny_sd, bench, tmp_path):
    row = score_sampling(tiny_sd, bench, Sampling("DDIM", 1), "undistilled-1")
    path = save_rows(tmp_path / "rows.json", [row], "python eval/baselines.py")
    assert load_rows(path, bench) == [row]
    other = replace(bench, protocol=replace(bench.protocol, name="another"))
    with pytest.raises(ValueError, match="row undistilled-1 has protocol"):
        load_rows(path, other)
    with pytest.raises(FileNotFoundError, match="make them with"):
        load_rows(tmp_path / "none.json")
