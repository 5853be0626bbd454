"""What checkpointed blocks keep can wait on the host: the same numbers, and the planner sees it leave."""

import copy
from unittest import mock

import pytest
import torch
from engine_helpers import PROMPTS, Latents, assert_equal, weights

from fastdiff.engine import Settings, Trainer
from fastdiff.methods import DMD2, LCM, DMD2Config, LCMConfig
from fastdiff.models import roles
from fastdiff.models.teacher import Teacher
from fastdiff.planning.blueprint import blueprint_of
from fastdiff.planning.tracker import ACTIVATIONS
from fastdiff.planning.walk import batch_of, walk


def settings(folder, **changes):
    values = {"output_dir": str(folder), "train_batch_size": 2, "lora_rank": 2, "report_to": "none"}
    return Settings(**(values | {"gradient_checkpointing": True} | changes))


def test_training_is_the_same_to_the_bit(tiny_sd, tmp_path):
    found = []
    for offload in (False, True):
        run = Trainer(
            DMD2(DMD2Config(student_update_every=1)),
            Teacher(copy.deepcopy(tiny_sd), "tiny"),
            Latents(PROMPTS),
            settings(tmp_path / str(offload), activation_offload=offload),
        )
        work = batch_of(run, run.method)
        work = type(work)(**{**vars(work), "latents": torch.ones(2, *run.batches.latent_shape)})
        for _ in range(2):
            run.train_step([work])
        found.append(weights(run))
    assert_equal(*found)


def test_what_blocks_keep_passes_through_the_host(tiny_sd):
    """Every checkpointed block hands its inputs over; a forward without gradient hands over nothing."""
    moved = []

    def watched(network):
        return torch.autograd.graph.saved_tensors_hooks(lambda x: moved.append(x.shape) or x.clone(), lambda x: x)

    spec = roles.AdapterSpec(2, 2, ("to_q", "conv1"))
    with mock.patch.object(roles, "on_host", watched):
        own = roles.Roles(tiny_sd.unet, {"student": spec}, gradient_checkpointing=True, activation_offload=True)
        x = torch.randn(1, 4, 16, 16), torch.tensor([9.0]), torch.randn(1, 16, 16)
        with torch.no_grad():
            own.base(*x)
        assert not moved
        with own.active.use(own.parts("student")):
            own.base(*x).sample.sum().backward()
    blocks = [one for one in own.base.modules() if type(one).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
    assert len(moved) >= len(blocks)
    assert any(parameter.grad.abs().sum() > 0 for parameter in own.parameters("student") if parameter.grad is not None)


@pytest.mark.slow
def test_the_planner_sees_activations_leave(tiny_sd_folder, tmp_path):
    def activations(**changes):
        plan = walk(
            LCM(LCMConfig(target_decay=0.0)),
            blueprint_of(str(tiny_sd_folder)),
            settings(tmp_path, train_batch_size=16, **changes),
        )
        return plan.phases["student"][ACTIVATIONS]

    kept, offloaded = activations(), activations(activation_offload=True)
    assert offloaded < 0.95 * kept


def test_it_needs_checkpointing():
    with pytest.raises(ValueError, match="give gradient_checkpointing"):
        Settings(activation_offload=True)
