"""bfloat16 critics: rounding that keeps small updates, 8-bit moments, and steps inside backward."""

import pytest
import torch
from engine_helpers import PROMPTS, Latents, assert_equal, weights
from torch import nn

from fastdiff.engine import Settings, Trainer
from fastdiff.engine.low_precision import FIRST, SECOND, LowPrecisionAdamW, round_stochastically
from fastdiff.engine.memory import state_memory
from fastdiff.engine.optimizers import GroupOptimizer
from fastdiff.methods import DMD2, DMD2Config, Group
from fastdiff.models.teacher import Teacher

OPTIONS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "seed": 0, "name": "fake_score"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159e-5, -7.7e8, 0.49999])
def test_rounding_is_unbiased_and_to_a_neighbour(value):
    rounded = round_stochastically(torch.full((200_000,), value), generator()).double()
    low, high = rounded.min(), rounded.max()
    step = (high - low).item()
    exact = float(torch.tensor(value))
    assert low <= exact <= high and 0 < step <= 2**-7 * abs(exact)
    # The mean of 200,000 draws of a two-valued law: five standard errors.
    assert abs(rounded.mean().item() - exact) < 5 * step / 2 / 200_000**0.5


def test_rounding_leaves_what_is_exact_or_not_finite():
    values = torch.tensor([0.0, 1.0, -2.5, 3e38, torch.inf, -torch.inf])
    exact = values.bfloat16().float()
    assert torch.equal(round_stochastically(exact, generator()).float(), exact)
    assert round_stochastically(torch.tensor([torch.nan])).isnan().all()


def run(dtype, rate, steps, optimizer, weight=1.0, count=4096):
    parameter = nn.Parameter(torch.full((count,), weight).to(dtype))
    built = optimizer(parameter, rate)
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        built.step()
    return parameter.detach().double()


def test_plain_bfloat16_loses_every_update_and_stochastic_rounding_none():
    rate, steps = 5e-7, 50
    plain = run(torch.bfloat16, rate, steps, lambda p, lr: torch.optim.AdamW([p], lr=lr, weight_decay=0.0, eps=1e-8))
    assert torch.equal(plain, torch.ones_like(plain))
    exact = run(torch.float32, rate, steps, lambda p, lr: torch.optim.AdamW([p], lr=lr, weight_decay=0.0, eps=1e-8))
    moved = run(torch.bfloat16, rate, steps, lambda p, lr: LowPrecisionAdamW([p], lr=lr, **OPTIONS), count=2**20)
    wanted, got = 1 - exact.mean().item(), 1 - moved.mean().item()
    assert wanted == pytest.approx(rate * steps, rel=0.06)  # float32 itself rounds 5e-7 below 1 to 4.8e-7
    # Each step moves a weight down by 2^-8 with probability rate * 2^8, so the standard error of the mean is known.
    error = 2**-8 * (steps * rate * 2**8) ** 0.5 / 2**10
    assert abs(got - wanted) < 5 * error and got > wanted / 2


@pytest.mark.parametrize("codes", [FIRST, SECOND])
def test_codes_read_back_within_their_resolution_and_without_bias(codes):
    values = torch.randn(3, 700, generator=generator())
    values = values if codes.signed else values.square()
    kept, scales = codes.zeros(values)
    assert (
        kept.numel() == 2304
        and kept.element_size() == 1
        and torch.equal(codes.read(kept, scales, values), torch.zeros_like(values))
    )
    codes.write(values, kept, scales, generator())
    read = codes.read(kept, scales, values)
    large = values.abs() > 0.1 * values.abs().max()
    assert ((read - values).abs() / values.abs())[large].max() < 0.1
    assert (read[large] / values[large]).mean() == pytest.approx(1, abs=5e-3)
    if not codes.signed:
        assert (read[values > 0] > 0).all()  # a vanished second moment would make a huge step


def test_slow_second_moments_are_followed():
    """Its steps are far below one code, so rounding to nearest would stand still."""
    value = torch.full((256,), 1.0)
    kept, scales = SECOND.zeros(value)
    SECOND.write(torch.cat([value[:1], torch.full((255,), 0.5)]), kept, scales, generator())
    random = generator(1)
    for _ in range(500):
        now = SECOND.read(kept, scales, value)
        now[1:].lerp_(torch.full((255,), 0.3), 1e-3)
        SECOND.write(now, kept, scales, random)
    expected = 0.3 + 0.2 * 0.999**500
    assert SECOND.read(kept, scales, value)[1:].mean() == pytest.approx(expected, rel=0.02)


def test_eight_bit_moments_train_like_exact_ones():
    """Least squares with noisy gradients: the same distance covered, within a few per cent."""
    torch.manual_seed(0)
    features, truth = torch.randn(256, 64), torch.randn(64)

    def trained(make):
        weight = nn.Parameter(torch.zeros(64))
        optimizer = make([weight])
        for step in range(200):
            rows = slice(32 * (step % 8), 32 * (step % 8) + 32)
            loss = (features[rows] @ (weight - truth)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (weight.detach() - truth).norm().item()

    exact = trained(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, eps=1e-8))
    assert exact < 0.5 * truth.norm()
    assert trained(lambda p: LowPrecisionAdamW(p, lr=1e-2, **OPTIONS)) == pytest.approx(exact, rel=0.1)


def test_a_step_that_is_not_finite_changes_no_weight():
    weight = nn.Parameter(torch.ones(8))
    optimizer = GroupOptimizer("fake_score", [weight], Group(), settings(), in_backward=True)
    (weight * torch.tensor([1.0, torch.nan] * 4)).sum().backward()
    assert torch.equal(weight.detach(), torch.ones(8)) and weight.grad is None
    assert optimizer.step().isnan()


def test_steps_inside_backward_are_the_optimizers_own():
    """Without clipping, a step inside backward is the step after it; no gradient is left behind."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    inside = GroupOptimizer("fake_score", networks[0].parameters(), Group(), settings(), in_backward=True)
    after = LowPrecisionAdamW(networks[1].parameters(), lr=1e-3, **(OPTIONS | {"weight_decay": 1e-2}))
    x = torch.randn(4, 8)
    for _ in range(3):
        for network in networks:
            network(x).square().mean().backward(inputs=list(network.parameters()))
        assert all(parameter.grad is None for parameter in networks[0].parameters())
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in networks[1].parameters()])
        after.step()
        after.zero_grad()
        torch.testing.assert_close(inside.step(), norm)
        assert_equal(networks[0].state_dict(), networks[1].state_dict())


def test_each_tensor_is_clipped_by_its_own_norm(monkeypatch):
    weight = nn.Parameter(torch.zeros(4))
    optimizer = GroupOptimizer("fake_score", [weight], Group(), settings(max_grad_norm=1.0), in_backward=True)
    seen = []
    monkeypatch.setattr(optimizer.optimizer, "step_one", lambda p, _: seen.append(p.grad.clone()))
    (100 * weight).sum().backward()
    torch.testing.assert_close(seen[0].norm(), torch.tensor(1.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(optimizer.step(), torch.tensor(200.0))


def settings(**changes):
    return Settings(**({"learning_rate": 1e-3, "max_grad_norm": 1e6, "report_to": "none"} | changes))


FULL_CRITIC = {
    "fake_score": "full",
    "fake_score_dtype": "bf16",
    "fake_score_in_backward": True,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "lora_rank": 4,
    "lora_target_modules": ("to_q", "to_v"),
    "train_batch_size": 2,
    "report_to": "none",
    "validation_steps": 100,
}


def trainer(pipeline, folder, steps, **changes):
    values = FULL_CRITIC | {"output_dir": str(folder), "max_train_steps": steps} | changes
    teacher = Teacher(pipeline, "tiny")
    teacher.network.to(torch.bfloat16)
    return Trainer(DMD2(DMD2Config(student_update_every=2)), teacher, Latents(PROMPTS), Settings(**values))


def test_a_full_bf16_critic_trains_and_resumes_to_the_bit(tiny_sd, tmp_path):
    import copy

    straight = trainer(copy.deepcopy(tiny_sd), tmp_path / "straight", 4)
    start = {name: value.clone() for name, value in straight.networks.roles.state_dict("fake_score").items()}
    straight.train()
    critic = straight.networks.roles.state_dict("fake_score")
    assert {value.dtype for value in critic.values()} == {torch.bfloat16}
    changed = sum(not torch.equal(critic[name], start[name]) for name in start)
    assert changed > 0.9 * len(start)

    trainer(copy.deepcopy(tiny_sd), tmp_path / "halves", 2).train()
    resumed = trainer(copy.deepcopy(tiny_sd), tmp_path / "halves", 4, resume_from_checkpoint="latest")
    resumed.train()
    assert_equal(weights(resumed), weights(straight))
    assert resumed.json_state()["optimizers"] == straight.json_state()["optimizers"]


def test_memory_counts_two_bytes_of_weight_two_of_moments_and_no_gradient(tiny_sd, tmp_path):
    run = trainer(tiny_sd, tmp_path, 1)
    critic = sum(parameter.numel() for parameter in run.networks.parameters("fake_score"))
    student = sum(parameter.numel() for parameter in run.networks.parameters("student"))
    memory = state_memory(run.networks, run.optimizers)
    assert memory.trained == 2 * critic + 4 * student
    assert memory.gradients == 4 * student
    assert memory.optimizer == 2 * critic + 8 * student


def test_a_checkpoint_of_another_optimizer_is_refused(tiny_sd, tmp_path):
    import copy

    trainer(copy.deepcopy(tiny_sd), tmp_path, 1).train()
    other = trainer(
        tiny_sd,
        tmp_path,
        2,
        fake_score_dtype="fp32",
        fake_score_in_backward=False,
        resume_from_checkpoint="latest",
    )
    with pytest.raises(ValueError, match=r"trained with LowPrecisionAdamW.*init_from"):
        other.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fake_score": "lora"}, "for full critics"),
        ({"fake_score_in_backward": True}, "for full critics"),
        ({"fake_score": "full", "mixed_precision": "no"}, "mixed_precision bf16"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**({"fake_score_dtype": "bf16", "mixed_precision": "bf16"} | changes))
