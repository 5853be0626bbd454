import pickle

import pytest
import torch

from fastdiff.data import EpochPermutation, StepBatches, Visit, global_positions


def test_every_epoch_sees_every_item_once_in_an_order_of_its_own():
    order = EpochPermutation(37, seed=5)
    epochs = [[order[e * 37 + i] for i in range(37)] for e in range(4)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_position_means_the_same_whatever_was_asked_before():
    straight = [EpochPermutation(11, 3)[p] for p in range(66)]
    jumping = EpochPermutation(11, 3)
    places = torch.randperm(66, generator=torch.Generator().manual_seed(0)).tolist()
    assert {p: jumping[p] for p in places} == dict(enumerate(straight))
    assert len(jumping._drawn) <= 2
    assert pickle.loads(pickle.dumps(jumping))[40] == straight[40]


def test_neighbouring_seeds_share_no_epoch():
    orders = {tuple(EpochPermutation(50, seed).permutation(epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_first_items_are_evenly_spread():
    counts = torch.bincount(torch.tensor([EpochPermutation(5, seed)[0] for seed in range(1000)]), minlength=5)
    assert ((counts - 200).abs() < 5 * 200**0.5).all()


def test_visits_carry_the_epoch():
    order = EpochPermutation(3, 0)
    assert [order.visit(p).epoch for p in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert order.visit(4) == Visit(order[4], 1)


@pytest.mark.parametrize("batch, accumulation, world", [(8, 1, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2), (1, 2, 4)])
def test_any_split_of_a_global_batch_of_8_covers_the_same_positions(batch, accumulation, world):
    for step in (0, 1, 7):
        seen = [
            p
            for micro in range(accumulation)
            for rank in range(world)
            for p in global_positions(step, micro, batch, accumulation, rank, world)
        ]
        assert seen == list(range(8 * step, 8 * step + 8))


def _run(order, batch, accumulation, world, first, last):
    """Per step, the visits of all processes and micro-steps, in the order of positions."""
    splits = {"batch_size": batch, "accumulation": accumulation, "world": world}
    ranks = [list(StepBatches(order, first_step=first, last_step=last, rank=rank, **splits)) for rank in range(world)]
    assert all(len(rank) == (last - first) * accumulation for rank in ranks)
    return [
        [v for micro in range(accumulation) for rank in ranks for v in rank[s * accumulation + micro]]
        for s in range(last - first)
    ]


def test_two_processes_and_accumulation_see_what_one_process_sees():
    order = EpochPermutation(11, 1)  # batches straddle epochs
    one = _run(order, 8, 1, 1, 0, 9)
    assert _run(order, 4, 1, 2, 0, 9) == one
    assert _run(order, 2, 4, 1, 0, 9) == one
    assert _run(order, 2, 2, 2, 0, 9) == one
    assert [v.item for step in one for v in step] == [order[p] for p in range(72)]


@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_resuming_at_step_k_goes_on_exactly(k):
    straight = _run(EpochPermutation(11, 1), 2, 2, 2, 0, 9)
    assert _run(EpochPermutation(11, 1), 2, 2, 2, 0, k) + _run(EpochPermutation(11, 1), 2, 2, 2, k, 9) == straight


def test_resuming_on_other_hardware_goes_on_exactly():
    straight = _run(EpochPermutation(11, 1), 8, 1, 1, 0, 9)
    assert _run(EpochPermutation(11, 1), 2, 1, 4, 5, 9) == straight[5:]


@pytest.mark.parametrize("bad", [(-1, 0, 1, 1, 0, 1), (0, 1, 1, 1, 0, 1), (0, 0, 1, 1, 1, 1), (0, 0, 0, 1, 0, 1)])
def test_senseless_splits(bad):
    with pytest.raises(ValueError):
        global_positions(*bad)


def test_senseless_permutations():
    with pytest.raises(ValueError, match="0 items"):
        EpochPermutation(0, 0)
    with pytest.raises(IndexError):
        EpochPermutation(3, 0)[-1]
