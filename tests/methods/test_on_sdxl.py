"""Methods that match distributions or scores, or have an adversary, on Stable Diffusion XL with every kind of network."""

from __future__ import annotations

import pytest
import torch
from adversarial_cases import Pictures, frozen_weights, same, tiny_trainer

from fastdiff.methods import METHODS
from fastdiff.planning.measure_methods import combinations

CONFIGS = {  # where two steps of the defaults would not train everything, or would look at pixels
    "disback": {"degradation_steps": 1, "path_nodes": 1},
    "dmd": {"regression_loss": "latent_l2"},
}
CASES = [
    pytest.param(method, kinds, id="-".join([method.info.name, *filter(None, kinds)]))
    for method in METHODS
    if method.info.family != "trajectory"
    for kinds in combinations(method)
]


class Pairs(Pictures):
    """Pictures that come with the noise they are taken to be made of."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item | {"noise": item["latents"].flip(0)}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kinds"), CASES)
def test_two_steps_move_what_is_trained_and_leave_the_teacher_alone(method, kinds, tiny_sdxl, tmp_path):
    """SDXL's pooled embeddings and time ids go with every call, guided, unguided or on features."""
    settings = {name: kind for name, kind in zip(("student", "fake_score"), kinds, strict=True) if kind}
    config = method.Config(**CONFIGS.get(method.info.name, {}))
    before = frozen_weights(tiny_sdxl)
    trainer = tiny_trainer(method(config), tiny_sdxl, tmp_path, data=Pairs, max_train_steps=2, **settings)
    names = set()
    trainer.metrics.add, add = (
        lambda name, *rest, **how: (names.add(name), add(name, *rest, **how)),
        trainer.metrics.add,
    )
    old = {name: [p.detach().clone() for p in trainer.networks.parameters(name)] for name in trainer.optimizers}
    assert {"student", *method.critics} <= old.keys()
    assert trainer.train() == "done"  # each step's losses are read, which refuses any that is not finite
    assert same(before, frozen_weights(tiny_sdxl))
    for name, parameters in old.items():
        assert any(not torch.equal(a, b) for a, b in zip(parameters, trainer.networks.parameters(name))), name
    assert {"student", *method.critics} <= {name.split("/")[1] for name in names if name.startswith("loss/")}
