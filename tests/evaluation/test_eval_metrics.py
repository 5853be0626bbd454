"""Metrics against closed forms and against torch-fidelity called directly."""

from __future__ import annotations

import pytest
import torch

from fastdiff.evaluation import metrics


def gaussian(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_to_itself_is_zero():
    features = gaussian(200, 8, 0)
    assert metrics.frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_a_shift_is_its_squared_length():
    features, shift = gaussian(300, 6, 1), torch.linspace(-1, 2, 6, dtype=torch.float64)
    expected = shift.square().sum().item()
    assert metrics.frechet_distance(features + shift, features) == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_of_a_scale():
    features = gaussian(300, 4, 2) - gaussian(300, 4, 2).mean(0)
    expected = features.T.cov().trace().item()  # (2 - 1)^2 times the trace of the covariance
    assert metrics.frechet_distance(2 * features, features) == pytest.approx(expected, abs=1e-9)


def test_kernel_distance_is_torch_fidelitys(tmp_path):
    from torch_fidelity.metric_kid import kid_features_to_metric

    first, second = gaussian(100, 5, 3) + 0.5, gaussian(120, 5, 4)
    expected = kid_features_to_metric(first, second, kid_subsets=7, kid_subset_size=50, rng_seed=1, verbose=False)
    value, error = metrics.kernel_distance(first, second, subsets=7, seed=1)
    assert value == expected["kernel_inception_distance_mean"] > 0
    assert error == expected["kernel_inception_distance_std"] > 0


def test_precision_and_recall_tell_a_collapse_from_a_spray():
    spread = gaussian(200, 2, 5)
    point = 0.01 * gaussian(200, 2, 6)
    precision, recall = metrics.precision_recall(point, spread)
    assert precision > 0.9 and recall < 0.1
    precision, recall = metrics.precision_recall(spread, point)
    assert precision < 0.1 and recall > 0.9


def test_retrieval_is_one_for_perfect_features_and_needs_the_right_order():
    texts = torch.eye(10)
    assert metrics.retrieval_hits(3 * texts, texts, [0] * 10).mean() == 1
    assert metrics.retrieval_hits(texts.roll(1, 0), texts, [0] * 10).mean() == 0


def test_retrieval_looks_only_at_candidates_of_the_same_block():
    texts = torch.eye(4)
    images = texts[[1, 0, 2, 3]]  # the first two are swapped
    assert metrics.retrieval_hits(images, texts, [0, 0, 1, 1]).tolist() == [0, 0, 1, 1]
    assert metrics.retrieval_hits(images, texts, [0, 1, 0, 1]).mean() == 1


def test_diversity_is_zero_for_equal_images_and_one_for_orthogonal_ones():
    features = torch.cat([torch.ones(4, 4), torch.eye(4)])
    values = metrics.group_diversity(features, [0] * 4 + [1] * 4)
    assert values.tolist() == pytest.approx([0, 1], abs=1e-6)


def test_diversity_is_the_mean_over_pairs():
    features = gaussian(6, 3, 7)
    unit = torch.nn.functional.normalize(features, dim=-1)
    pairs = [1 - (unit[i] @ unit[j]).item() for i in range(6) for j in range(6) if i != j]
    assert metrics.group_diversity(features, [0] * 6).item() == pytest.approx(sum(pairs) / 30, abs=1e-6)


def test_gradient_energy_of_stripes_and_of_a_flat_image():
    flat = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    stripes = (torch.arange(8) % 2 * 255).to(torch.uint8).expand(1, 3, 8, 8)
    assert metrics.gradient_energy(flat).item() == 0
    assert metrics.gradient_energy(stripes).item() == pytest.approx(0.5)  # 1 across, 0 down, as many of each


def test_half_sample_error_is_that_of_the_mean():
    values = gaussian(400, 1, 8).squeeze()
    error = metrics.half_sample_error(lambda half: values[half].mean().item(), 400, draws=400)
    assert error == pytest.approx(values.std().item() / 20, rel=0.1)


def test_intervals_are_seeded_and_hold_the_mean():
    values = gaussian(400, 1, 9).squeeze()
    low, high = metrics.bootstrap_interval(values, seed=3)
    assert (low, high) == metrics.bootstrap_interval(values, seed=3) != metrics.bootstrap_interval(values, seed=4)
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.1)
    assert low < values.mean() < high
