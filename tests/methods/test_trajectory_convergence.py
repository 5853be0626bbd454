"""Descent on trajectory losses: one wrong number in an exact map, which training must bring back to zero."""

from __future__ import annotations

import pytest
import torch
from flow_map_helpers import LAW, ConsistencyNetwork, MapNetwork, OwnScore, teacher_network
from method_helpers import batch_of, context, denoiser_of, f64
from torch import nn
from trajectory_helpers import FLOW

from fastdiff.methods import (
    APEX,
    RCM,
    SCM,
    APEXConfig,
    FreeFlow,
    FreeFlowConfig,
    MeanFlow,
    MeanFlowConfig,
    RCMConfig,
    SCMConfig,
)

NEARLY_LINEAR = {"guidance_scale": 1.0, "tangent_warmup": 0, "tangent_constant": 1.0}
METHODS = {
    "scm": (SCM(SCMConfig(**NEARLY_LINEAR)), ConsistencyNetwork),
    "rcm": (RCM(RCMConfig(timesteps=(999,), **NEARLY_LINEAR)), ConsistencyNetwork),
    "meanflow": (MeanFlow(MeanFlowConfig(norm_power=0.0)), MapNetwork),
    "freeflow": (FreeFlow(FreeFlowConfig(norm_power=0.0)), MapNetwork),
    "apex": (APEX(APEXConfig(guidance_strength=0.0, adversarial_weight=0.0)), MapNetwork),
}


def slopes(name: str, tilt: float, step: int = 0) -> dict[str, float]:
    """Of the student's terms in the tilt of an exact map; the fake score is the exact one of the student's samples."""
    (method, network), rows = METHODS[name], 64
    wrong = nn.Parameter(f64(tilt))
    student = network(FLOW, "flow", wrong)
    roles = {"student": student, "fake_score": OwnScore(student, tells_end=network is MapNetwork)}
    denoiser = denoiser_of(teacher_network("flow"), FLOW, "flow", **roles)
    z = torch.randn(rows, 2, 1, 1, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    terms = method.student_loss(batch_of(rows, 2, LAW.sample(z)), context(denoiser, rows, step=step))
    return {term: torch.autograd.grad(loss, wrong, retain_graph=True)[0].item() for term, loss in terms.items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_term_pulls_towards_the_exact_map_from_either_side(name):
    down, up = slopes(name, -0.1), slopes(name, 0.1)
    assert all(down[term] < 0 < up[term] for term in up), (down, up)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"apex"}))
def test_descent_ends_at_the_exact_map(name):
    """Not of APEX, which regresses velocities of single samples: their noise stays."""
    tilt, rate = 0.1, 0.05 / abs(sum(slopes(name, 0.1).values()))  # where slopes are linear, a step halves the tilt
    for step in range(20):
        tilt -= rate * sum(slopes(name, tilt, step).values())
    assert abs(tilt) < 1e-3
