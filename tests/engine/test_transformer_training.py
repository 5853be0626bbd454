"""Transformer families through the same trainer as UNets: a step of many methods, gradients in every adapter."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny_transformers import BUILDERS, build

from fastdiff.data import PromptData
from fastdiff.engine import Settings, Trainer
from fastdiff.engine.previews import sample_role
from fastdiff.engine.validation import FeatureMoments
from fastdiff.methods import (
    APEX,
    BOOT,
    CTM,
    DMD2,
    KD,
    LCM,
    PCM,
    RCM,
    RFPP,
    SCM,
    TCD,
    TCM,
    TSCD,
    APEXConfig,
    BOOTConfig,
    CTMConfig,
    DecoupledDMD,
    DecoupledDMDConfig,
    DMD2Config,
    FDistill,
    FDistillConfig,
    FreeFlow,
    FreeFlowConfig,
    GuidanceDistillation,
    GuidanceDistillationConfig,
    KDConfig,
    LCMConfig,
    Lightning,
    LightningConfig,
    MeanFlow,
    MeanFlowConfig,
    PCMConfig,
    PeRFlow,
    PeRFlowConfig,
    Progressive,
    ProgressiveConfig,
    RCMConfig,
    RectifiedFlow,
    RectifiedFlowConfig,
    RFPPConfig,
    SCMConfig,
    SCott,
    SCottConfig,
    SlimFlow,
    SlimFlowConfig,
    TCDConfig,
    TCMConfig,
    TSCDConfig,
)
from fastdiff.methods.lightning import CRITIC
from fastdiff.models.teacher import Teacher

METHODS = {
    "dmd2": lambda: DMD2(DMD2Config(timesteps=(999, 499), student_update_every=1, gan_weight=0.1, guidance_scale=3.0)),
    "lcm": lambda: LCM(LCMConfig(target_decay=0.0, guidance_scale=4.0)),
    "pcm": lambda: PCM(PCMConfig()),
    "rectified_flow": lambda: RectifiedFlow(RectifiedFlowConfig()),
    "f_distill": lambda: FDistill(FDistillConfig(update_rule="every", student_update_every=1)),
    "tscd": lambda: TSCD(TSCDConfig()),
    "scott": lambda: SCott(SCottConfig(target_decay=0.0)),
    "scm": lambda: SCM(SCMConfig(tangent_warmup=0)),
    "rcm": lambda: RCM(RCMConfig(tangent_warmup=0, update_rule="every", student_update_every=1)),
    "perflow": lambda: PeRFlow(PeRFlowConfig(solver_steps=2)),
    "lightning": lambda: Lightning(LightningConfig()),
    "kd": lambda: KD(KDConfig()),
    "rfpp": lambda: RFPP(RFPPConfig(perceptual_weight=0.0)),
    "slimflow": lambda: SlimFlow(SlimFlowConfig(objective="distill")),
    "progressive": lambda: Progressive(ProgressiveConfig()),
    "tcd": lambda: TCD(TCDConfig()),
    "tcm": lambda: TCM(TCMConfig()),
}
TOLD = {
    "meanflow": lambda: MeanFlow(MeanFlowConfig(guidance_scale=2.0)),
    "boot": lambda: BOOT(BOOTConfig()),
    "ctm": lambda: CTM(CTMConfig(target_decay=0.9)),
    "freeflow": lambda: FreeFlow(FreeFlowConfig(correct_every=2)),
    "apex": lambda: APEX(APEXConfig()),
    # A student of one pass with guidance 1 is what stock pipelines sample when they are told nothing.
    "guidance_distillation": lambda: GuidanceDistillation(GuidanceDistillationConfig(guidance_range=(0.5, 1.5))),
}
ONE_FAMILY = ("tscd", "scott", "scm", "rcm", "perflow", "lightning")
"""Methods whose step is tested quickly on one family only."""
SD3_ALONE = ("kd", "rfpp", "slimflow", "progressive", "tcd", "tcm")
"""Methods that ask a network nothing which the others do not."""
NAMES = [builder.__name__ for builder in BUILDERS if builder.__name__ != "flux_schnell"]
# In the last block of these the text stream ends: what only serves it has no gradient.
UNUSED = {
    "stable_diffusion_3": ("transformer_blocks.1.attn.add_q_proj",),
    "qwen_image": tuple(
        f"transformer_blocks.1.{end}"
        for end in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    ),
}


class Pairs(PromptData):
    """Prompts with random latents and noise, as a cache of pairs would give them."""

    def __getitem__(self, index):
        item = index if isinstance(index, int) else index.item
        latents, noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(item))
        return super().__getitem__(index) | {"latents": latents, "noise": noise}


@pytest.fixture(scope="module")
def originals():
    return {}


@pytest.fixture
def make(originals, tmp_path):
    def make(name: str, method, dtype=torch.float32, **settings) -> Trainer:
        if name not in originals:
            originals[name] = build(name)
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "resolution": 32,
            "train_batch_size": 2,
            "max_train_steps": 1,
            "lora_rank": 2,
            "learning_rate": 1e-3,
            "gradient_checkpointing": True,
            "report_to": "none",
        }
        teacher = Teacher(copy.deepcopy(originals[name]))
        teacher.network.to(dtype)
        return Trainer(method, teacher, Pairs(["a red apple", "b"]), Settings(**(defaults | settings)))

    return make


def step(trainer: Trainer) -> dict[str, float]:
    for batches in trainer.batches.steps(0):
        trainer.train_step(batches)
    return trainer.metrics.read()  # raises on a number that is not finite


def cases():
    for name in NAMES:
        for method in METHODS:
            if method in SD3_ALONE and name != "stable_diffusion_3":
                continue
            slow = method in ONE_FAMILY and name != "stable_diffusion_3"
            yield pytest.param(name, method, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("name", "method"), cases())
def test_a_step_moves_every_adapter(make, name, method):
    trainer = make(name, METHODS[method]())
    values = step(trainer)
    assert any(key.startswith("loss/") for key in values)
    trained = [role for role in trainer.optimizers if role in trainer.networks.roles]
    assert "student" in trained
    for role in trained:
        still = [
            key.split(".lora_B")[0]
            for key, parameter in trainer.networks.roles.named_parameters(role)
            if "lora_B" in key and not parameter.any()
        ]
        if role == CRITIC:  # judged by its middle features, so that adapters behind them rest
            assert any(p.any() for key, p in trainer.networks.roles.named_parameters(role) if "lora_B" in key)
            continue
        assert sorted(still) == sorted(UNUSED.get(name, ())), role
    assert set(trainer.networks.roles) >= {"teacher", "student"}


@pytest.mark.parametrize("method", TOLD)
def test_students_that_are_told_more_are_trained(make, method):
    """A full student with one input more, in forward mode where the method differentiates; all of its weights learn."""
    rows = {"train_batch_size": 4, "fake_score": "full", "gradient_checkpointing": method != "meanflow"}
    trainer = make("stable_diffusion_3", TOLD[method](), student="full", **rows)
    slot = "timestep_slot.cond_proj.weight"
    before = {name: weight.clone() for name, weight in trainer.networks.roles.named_parameters("student")}
    assert not before[slot].any()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*central differences")
        step(trainer)
    after = dict(trainer.networks.roles.named_parameters("student"))
    assert after[slot].any()
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    still = {name.rpartition(".")[0] for name in before.keys() - moved}
    assert still <= {f"transformer_blocks.1.attn.{name}" for name in ("add_q_proj", "norm_added_q")}


@pytest.mark.parametrize("method", ["lcm", "guidance_distillation"])
def test_a_guidance_that_no_stock_pipeline_passes_on_is_refused(make, method):
    cls, config = {
        "lcm": (LCM, LCMConfig),
        "guidance_distillation": (GuidanceDistillation, GuidanceDistillationConfig),
    }[method]
    with pytest.raises(ValueError, match="SD3Transformer2DModel have no argument for that: fix guidance_scale"):
        make("stable_diffusion_3", cls(config(guidance_range=(2.0, 8.0))), student="full")


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_half_precision(make, name, stored):
    """Frozen weights under autocast, and stored in bfloat16."""
    trainer = make(name, METHODS["dmd2"](), stored, mixed_precision="bf16")
    step(trainer)
    assert any(parameter.any() for parameter in trainer.networks.parameters("student"))
    assert {parameter.dtype for parameter in trainer.networks.parameters("student")} == {torch.float32}


def test_a_teacher_that_embeds_guidance_is_asked_once(make):
    """DMD2's three roles in one call of B rows each, and no unconditional rows."""
    trainer = make("flux", DMD2(DMD2Config(student_update_every=1, guidance_scale=3.0)), gradient_checkpointing=False)
    guided = make("flux_schnell", DMD2(DMD2Config(student_update_every=1, guidance_scale=3.0)))
    for one in (trainer, guided):
        step(one)
    # Student, and teacher and fake score together; then the critic's own. Without an embedding the teacher is doubled.
    assert trainer.networks.denoiser.calls + 2 == guided.networks.denoiser.calls


def test_methods_that_need_an_unconditional_branch_are_refused_where_there_is_none(make):
    method = DecoupledDMD(DecoupledDMDConfig(guidance_scale=4.0))
    with pytest.raises(ValueError, match="embeds guidance"):
        make("flux", method)
    make("flux_schnell", method)


def test_the_schedule_is_that_of_the_trained_resolution(make):
    small, large = (make("flux", METHODS["lcm"](), resolution=pixels) for pixels in (32, 64))
    shifts = [one.networks.denoiser.schedule.shift for one in (small, large)]
    assert shifts[0] < shifts[1] < small.teacher.schedule.shift


@pytest.mark.parametrize("name", ["stable_diffusion_3", "z_image"])
def test_previews_and_validation_run(make, name):
    trainer = make(name, METHODS["dmd2"]())
    cond = trainer.teacher.encode(["a", "red"], 32)
    latents = sample_role(trainer, cond, trainer.method.sampler())
    assert trainer.teacher.decode(latents).shape == (2, 3, 32, 32)
    assert FeatureMoments(["a", "b"], teacher_steps=2)(trainer) >= 0
