"""The router: total, disjoint, balanced, the same every time."""

from __future__ import annotations

import pytest
import torch

from fastdiff.models.conditioning import Conditioning
from fastdiff.models.routing import Router, features_of


def cloud(count, dim=5, seed=0):
    spread = torch.linspace(3, 0.5, dim, dtype=torch.float64)
    return spread * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("count", "parts"), [(100, 4), (101, 4), (103, 4), (50, 7), (8, 8), (5, 1), (64, 3)])
def test_parts_are_disjoint_cover_everything_and_differ_by_one_at_most(count, parts):
    rows = cloud(count)
    chosen = Router.fit(rows, parts)(rows)
    sizes = torch.bincount(chosen, minlength=parts)
    assert len(sizes) == parts and sizes.sum() == count
    assert sizes.max() - sizes.min() <= 1
    unseen = Router.fit(rows, parts)(cloud(500, seed=9))
    assert unseen.shape == (500,) and unseen.min() >= 0 and unseen.max() < parts


def test_it_depends_on_nothing_but_the_condition():
    rows = cloud(60)
    router, again = Router.fit(rows, 4), Router.fit(rows.clone(), 4)
    assert router.agrees(again)
    whole = router(rows)
    assert all(router(rows[i : i + 1]) == whole[i] for i in range(60))  # not on the batch
    assert torch.equal(router(rows.flip(0)).flip(0), whole)
    stored = Router.from_state({name: tensor.clone() for name, tensor in router.state_dict().items()})
    assert torch.equal(stored(rows), whole) and stored.parts == 4
    assert not router.agrees(Router.fit(cloud(60, seed=1), 4)) and not router.agrees(Router.fit(rows, 3))


def test_four_parts_are_quadrants():
    """A spread of 10 along the first axis and of 1 along the second: cut by the first, then each half by the second."""
    grid = torch.cartesian_prod(torch.linspace(-10, 10, 10), torch.linspace(-1, 1, 10)).double()
    chosen = Router.fit(grid, 4)(grid)
    sides = torch.stack([grid[chosen == part].sign().mean(0) for part in range(4)])
    assert sides.abs().min() == 1  # no part has points on both sides of an axis
    assert {tuple(side) for side in sides.tolist()} == {(-1, -1), (-1, 1), (1, -1), (1, 1)}


def test_classes_fall_into_blocks_of_consecutive_ones():
    labels = features_of(Conditioning({"labels": torch.arange(1000)}))
    chosen = Router.fit(labels, 4)(labels)
    assert torch.equal(chosen, torch.arange(1000) // 250)
    assert torch.equal(Router.fit(labels.flip(0), 4)(labels), chosen)


def test_features_average_over_tokens():
    embeds = torch.randn(3, 7, 5)
    features = features_of(Conditioning({"prompt_embeds": embeds}))
    torch.testing.assert_close(features, embeds.double().mean(1))
    assert features.dtype == torch.float64


def test_features_are_the_pooled_embedding_where_there_is_one():
    pooled = torch.randn(3, 2)
    features = features_of(Conditioning({"prompt_embeds": torch.randn(3, 7, 5), "pooled_prompt_embeds": pooled}))
    assert torch.equal(features, pooled.double())


def test_too_few_conditions():
    with pytest.raises(ValueError, match="3 different conditions cannot be split among 4 students"):
        Router.fit(cloud(3), 4)
