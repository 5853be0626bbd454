"""What the tiny flow teacher is trained on: lines from pictures to noise, and the velocities along them."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from fastdiff.models.embedded import SHIPPED

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "tiny_teacher"


@pytest.fixture(scope="module")
def flow():
    sys.path.insert(0, str(SCRIPTS))
    from flow import Flow

    yield Flow(Namespace(flow=SHIPPED["embedded"], init_from=None))
    sys.path.remove(str(SCRIPTS))


def test_pairs_lie_on_straight_lines(flow):
    clean = torch.randn(64, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    noisy, steps, velocity, weight = flow.pairs(clean, {}, torch.Generator().manual_seed(2))
    share = (steps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - share * velocity, clean, rtol=1e-4, atol=1e-4)
    ends = noisy + (1 - share) * velocity
    assert abs(ends.std() - 1) < 0.02 and abs((ends * clean).mean()) < 0.02
    assert weight.eq(1).all()


def test_times_are_logit_normal(flow):
    _, steps, _, _ = flow.pairs(torch.zeros(1000, 1, 1, 1), {}, torch.Generator().manual_seed(3))
    logits = (steps / 1000).logit()
    assert abs(logits.mean()) < 0.01 and abs(logits.std() - 1) < 0.02


def test_a_fresh_network_says_zero_and_sees_one_row_for_t5(flow):
    text, network = flow.embed(["red apple", "a dog"]), flow.build(8)
    assert {name: tuple(value.shape) for name, value in text.items()} == {
        "encoder_hidden_states": (2, 25, 256),
        "pooled_projections": (2, 256),
    }
    assert not text["encoder_hidden_states"][:, -1].any()
    x, steps = torch.randn(2, 8, 8, 8), torch.tensor([100.0, 900.0])
    assert not network(x, timestep=steps, **text, return_dict=False)[0].any()
