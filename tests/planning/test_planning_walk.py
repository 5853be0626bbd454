"""The walk on tensors without values: exact where arithmetic is, and equal to the same steps on real tensors."""

import pytest
import torch
from torch import nn

from fastdiff.data import PromptData
from fastdiff.engine import Settings, Trainer
from fastdiff.methods import DMD2, KD, LCM, DMD2Config, KDConfig, LCMConfig
from fastdiff.models.families.stable_diffusion import UNET_LORA_TARGETS
from fastdiff.models.scorers import open_scorer
from fastdiff.models.teacher import Teacher
from fastdiff.planning.blueprint import blueprint_of
from fastdiff.planning.teacher import PlannedTeacher
from fastdiff.planning.tracker import ACTIVATIONS, MemoryTracker
from fastdiff.planning.walk import AVERAGE, BETWEEN, ENCODERS, FROZEN, GRADIENTS, OPTIMIZER, TRAINED, batch_of, walk

MIB = 2**20


def settings(folder=".", **changes):
    values = {"train_batch_size": 2, "lora_rank": 4, "report_to": "none", "output_dir": str(folder)}
    return Settings(**(values | changes))


def test_the_tracker_counts_what_is_alive():
    tracker = MemoryTracker()
    with tracker:
        tracker.start("one")
        x = torch.zeros(MIB // 4, requires_grad=True)
        y = (x * 2).exp()  # exp keeps its result
        assert tracker.alive[ACTIVATIONS] == 2 * MIB
        total = y.sum()
        del y
        assert tracker.alive[ACTIVATIONS] == 2 * MIB + 4
        total.backward()
        tracker.mark("gradients", [x.grad])
        del total
        assert dict(+tracker.alive) == {ACTIVATIONS: MIB, "gradients": MIB}
        tracker.start("two")
        view = x.detach()[:10]
        del x
        assert tracker.alive[ACTIVATIONS] == MIB  # a view keeps its storage
        del view
    assert +tracker.alive == {}
    assert tracker.peaks["one"].total() >= 3 * MIB
    assert tracker.peak[0] == "one"


def test_gradients_are_known_as_soon_as_they_exist():
    with MemoryTracker() as tracker:
        layer = nn.Linear(256, 256, bias=False)
        tracker.mark("weights", layer.parameters())
        tracker.mark_gradients("gradients", layer.parameters())
        tracker.start("step")
        layer(torch.zeros(1, 256)).sum().backward()
    assert tracker.alive["gradients"] == tracker.alive["weights"] == 256 * 256 * 4


@pytest.mark.parametrize(
    ("name", "network", "text"),
    [
        ("sd15", 859_520_964, 123_060_480),
        ("sd21", 865_910_724, 340_387_840),
        ("sdxl", 2_567_463_684, 123_060_480 + 694_659_840),
    ],
)
def test_public_configs_have_the_published_sizes(name, network, text):
    blueprint = blueprint_of(name)
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(dict(blueprint.network))
        vae = diffusers.AutoencoderKL.from_config(dict(blueprint.autoencoder))
    assert sum(p.numel() for p in unet.parameters()) == network
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    teacher = PlannedTeacher.__new__(PlannedTeacher)
    teacher.blueprint = blueprint
    assert teacher.text_encoder_bytes == 4 * text


@pytest.mark.parametrize(
    ("name", "network", "autoencoder", "text"),
    [
        ("sd35m", 2_243_171_520, 83_819_683, 123_650_304 + 694_659_840 + 4_762_310_656),
        ("flux1dev", 11_901_408_320, 83_819_683, 123_060_480 + 4_762_310_656),
        ("pixart_sigma", 610_856_096, 83_653_863, 4_762_310_656),
    ],
)
def test_configs_of_transformers_have_the_published_sizes(name, network, autoencoder, text):
    import diffusers

    blueprint = blueprint_of(name)
    with torch.device("meta"):
        parts = [
            getattr(diffusers, config["_class_name"]).from_config(dict(config))
            for config in (blueprint.network, blueprint.autoencoder)
        ]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [network, autoencoder]
    teacher = PlannedTeacher.__new__(PlannedTeacher)
    teacher.blueprint = blueprint
    assert teacher.text_encoder_bytes == 4 * text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "positions"),
    [
        ("sd35m", 2_243_171_520, 384 * 384 * 1536),
        ("flux1dev", 11_901_408_320, 0),
        ("pixart_sigma", 610_856_096, 64 * 64 * 1152),
    ],
)
def test_transformers_can_be_planned(name, parameters, positions):
    changes = {"resolution": 512, "train_batch_size": 1, "gradient_checkpointing": True, "mixed_precision": "bf16"}
    method = DMD2(DMD2Config(student_update_every=1))
    walked = walk(method, blueprint_of(name), settings(**changes), frozen_dtype=torch.bfloat16)
    assert walked.resolution == 512
    split = walked.phases["student"]
    assert split[FROZEN] == 2 * (parameters + positions)  # position tables are buffers
    assert split[TRAINED] > 0 and split[ACTIVATIONS] > 0


@pytest.mark.slow
def test_a_perceptual_distance_costs_its_scorer_and_a_decoder_at_work(tiny_sd_folder):
    blueprint = blueprint_of(str(tiny_sd_folder))
    plain, judged = (
        walk(KD(KDConfig(perceptual_weight=weight)), blueprint, settings()).phases["student"] for weight in (0, 1)
    )
    scorer = 4 * sum(p.numel() for p in open_scorer("loss_tower").tower.model.parameters())
    assert judged[FROZEN] - plain[FROZEN] == scorer
    assert judged[ACTIVATIONS] > plain[ACTIVATIONS]


def test_states_are_what_arithmetic_says(tiny_sd, tiny_sd_folder):
    phases = walk(DMD2(DMD2Config()), blueprint_of(str(tiny_sd_folder)), settings(ema_decay=0.9)).phases
    teacher = Teacher(tiny_sd)
    frozen = 4 * sum(p.numel() for p in teacher.network.parameters())
    from fastdiff.models.roles import AdapterSpec, Roles

    roles = Roles(teacher.network, {"student": AdapterSpec(4, 4, UNET_LORA_TARGETS)})
    adapter = 4 * sum(p.numel() for p in roles.parameters("student"))
    encoders = 4 * sum(p.numel() for part in (tiny_sd.vae, tiny_sd.text_encoder) for p in part.parameters())
    split = phases["fake_score"]
    assert set(phases) == {"student", "fake_score", "prompts", "sample", "decode"}
    assert split[FROZEN] == frozen
    assert split[TRAINED] == 2 * adapter
    assert split[AVERAGE] == adapter
    assert split[ENCODERS] == encoders
    assert 4 * adapter <= split[OPTIMIZER] < 4.2 * adapter  # and fused Adam's step counts
    assert split[GRADIENTS] <= adapter  # none yet where the end of the forward is the fullest moment


@pytest.mark.slow
def test_a_low_precision_critic_holds_four_bytes_a_weight_and_offloaded_encoders_none(tiny_sd, tiny_sd_folder):
    low = {"fake_score": "full", "fake_score_dtype": "bf16", "fake_score_in_backward": True, "mixed_precision": "bf16"}
    blueprint = blueprint_of(str(tiny_sd_folder))
    walked = walk(DMD2(DMD2Config()), blueprint, settings(**low), frozen_dtype=torch.bfloat16, offloaded=True)
    critic = sum(parameter.numel() for parameter in tiny_sd.unet.parameters())
    student, split = walked.sizes["student"], walked.phases["fake_score"]
    assert walked.sizes["fake_score"] == critic
    assert split[FROZEN] == 2 * critic
    assert split[TRAINED] == 2 * critic + 4 * student
    blocks = len(list(tiny_sd.unet.parameters()))  # each tensor's last block of moments may be partly empty
    assert (
        0 <= split[OPTIMIZER] - 8 * student - 2 * critic * (1 + 4 / 256) < blocks * 520 + 4 * len(walked.sizes) * 512
    )
    assert walked.buffer == 4 * student and walked.exchanged["fake_score"] == 2 * critic
    assert split[GRADIENTS] == 0 == split[ENCODERS] and walked.phases["decode"][ENCODERS] > 0


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (DMD2(DMD2Config()), {"gradient_checkpointing": True}),
        (LCM(LCMConfig()), {"student": "full"}),
    ],
    ids=["dmd2-lora", "lcm-full"],
)
def test_fake_tensors_predict_what_real_ones_take(tiny_sd, tiny_sd_folder, tmp_path, method, changes):
    """The same tracker over the same step with real values: the planner's only difference is that nothing is there."""
    phases = walk(method, blueprint_of(str(tiny_sd_folder)), settings(**changes)).phases
    planned = max(phases[name].total() - phases[name][ENCODERS] for name in phases if name not in BETWEEN)

    tracker = MemoryTracker()
    teacher = Teacher(tiny_sd)
    with tracker:
        run = Trainer(method, teacher, PromptData(["a prompt"]), settings(tmp_path, **changes))
        tracker.mark("base", teacher.network.parameters())
        for optimizer in run.optimizers.values():
            optimizer.make_state()
        tracker.start("step")
        run.train_step([batch_of(run, method)])
    assert planned == pytest.approx(tracker.peak[1].total(), rel=0.02)


@pytest.mark.slow
def test_levers_move_what_they_should(tiny_sd_folder):
    blueprint = blueprint_of(str(tiny_sd_folder))

    def split(**changes):
        return walk(LCM(LCMConfig(target_decay=0.0)), blueprint, settings(**changes)).phases["student"]

    plain, checkpointed = split(), split(gradient_checkpointing=True)
    doubled = split(train_batch_size=4, use_8bit_adam=True)
    assert checkpointed[ACTIVATIONS] < plain[ACTIVATIONS]
    assert 1.7 < doubled[ACTIVATIONS] / plain[ACTIVATIONS] < 2.1
    assert doubled[OPTIMIZER] < 0.5 * plain[OPTIMIZER]
