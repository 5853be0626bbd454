import pytest
import torch

from fastdiff.diffusion import InjectedRandomness, Randomness
from fastdiff.diffusion.randomness import philox4x32

# Known answers published with the Random123 library: counter, key, output of Philox4x32-10
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert philox4x32(words(counter), words(key)) == words(expected)
    tensors = philox4x32([torch.tensor([word]) for word in words(counter)], words(key))
    assert tuple(int(word) for word in tensors) == words(expected)


def draws(indices, seed=5, step=3, site="here"):
    r = Randomness(seed, step, torch.as_tensor(indices))
    return (
        r.normal(site, (3, 5)),
        r.normal(site, (7,), torch.float64),
        r.uniform(site),
        r.uniform(site, (2, 3)),
        r.integers(site, 10, 1000),
        r.bernoulli(site, 0.3),
    )


def test_a_sample_draws_the_same_in_any_batch():
    whole = draws(range(8))
    for split in ([range(3), range(3, 8)], [[i] for i in range(8)]):
        parts = [draws(list(part)) for part in split]
        for kind, value in enumerate(whole):
            assert torch.equal(torch.cat([part[kind] for part in parts]), value)
    for kind, value in enumerate(draws([6, 1, 1])):
        assert torch.equal(value, whole[kind][[6, 1, 1]])


def test_shapes_and_dtypes():
    shapes = [tuple(value.shape) for value in draws(range(4))]
    assert shapes == [(4, 3, 5), (4, 7), (4,), (4, 2, 3), (4,), (4,)]
    kinds = [value.dtype for value in draws(range(4))]
    assert kinds == [torch.float32, torch.float64, torch.float32, torch.float32, torch.int64, torch.bool]
    assert Randomness(0, 0, torch.arange(2)).normal("a", (3,), torch.bfloat16).dtype == torch.bfloat16


def test_precisions_agree():
    r = Randomness(1, 2, torch.arange(50))
    torch.testing.assert_close(
        r.normal("a", (100,)).double(), r.normal("a", (100,), torch.float64), rtol=1e-4, atol=1e-4
    )


def test_golden_draw():
    """Box and Muller over the block of counter (0, 11, 7, crc32) and key (3, 1), by the definition."""
    import math
    import zlib

    block = philox4x32((0, 11, 7, zlib.crc32(b"normal:z")), (3, 1))
    unit = [(word + 0.5) / 2**32 for word in block]
    first = math.sqrt(-2 * math.log(unit[0])) * math.cos(2 * math.pi * unit[1])
    last = math.sqrt(-2 * math.log(unit[2])) * math.sin(2 * math.pi * unit[3])
    value = Randomness(3 + 2**32, 7, torch.tensor([11])).normal("z", (4,), torch.float64)[0]
    torch.testing.assert_close(value[[0, 3]], torch.tensor([first, last], dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_moments():
    r = Randomness(0, 0, torch.arange(200))
    normal = r.normal("n", (1000,)).double()
    n = normal.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((normal**power).mean().item() - expected) < 4 * (variance / n) ** 0.5
    uniform = r.uniform("u", (1000,)).double()
    assert 0 < uniform.min() < 1e-4 and 1 - 1e-4 < uniform.max() < 1
    assert abs(uniform.mean().item() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(uniform.var().item() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_extreme_words_stay_inside(monkeypatch, word):
    monkeypatch.setattr(Randomness, "_words", lambda self, site, count: torch.full((2, -(-count // 4), 4), word))
    r = Randomness(0, 0, torch.arange(2))
    assert (r.uniform("u") > 0).all() and (r.uniform("u") < 1).all()
    assert r.normal("n", (4,)).isfinite().all() and r.normal("n", (4,), torch.float64).isfinite().all()
    assert (r.integers("k", 3, 8) == (3 if word == 0 else 7)).all()


@pytest.mark.parametrize("change", ["site", "step", "seed", "high seed", "indices", "lag"])
def test_independence(change):
    n, size = 100, 1000

    def draw(seed=1, step=1, first=0, site="a"):
        return Randomness(seed, step, torch.arange(first, first + n)).normal(site, (size,)).double()

    base = draw()
    other = {
        "site": lambda: draw(site="b"),
        "step": lambda: draw(step=2),
        "seed": lambda: draw(seed=2),
        "high seed": lambda: draw(seed=1 + 2**32),
        "indices": lambda: draw(first=n),
        "lag": lambda: base.roll(1, dims=1),
    }[change]()
    assert not torch.equal(base, other)
    for a, b in ((base, other), (base**2 - 1, other**2 - 1)):
        correlation = (a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()
        assert abs(correlation.item()) < 4 / (n * size) ** 0.5


def test_kinds_at_one_site_are_independent():
    r = Randomness(1, 1, torch.arange(20000))
    uniform, integer = r.uniform("a").double(), r.integers("a", 0, 1000).double()
    assert abs(torch.corrcoef(torch.stack([uniform, integer]))[0, 1].item()) < 4 / 20000**0.5


def test_integers_are_even_and_inside():
    values, counts = Randomness(0, 0, torch.arange(40000)).integers("k", -1, 3).unique(return_counts=True)
    assert values.tolist() == [-1, 0, 1, 2]
    assert (counts - 10000).abs().max() < 4 * (40000 * 0.25 * 0.75) ** 0.5


def test_bernoulli():
    r = Randomness(0, 0, torch.arange(40000))
    assert not r.bernoulli("drop", 0.0).any() and r.bernoulli("drop", 1.0).all()
    assert abs(r.bernoulli("drop", 0.1).double().mean().item() - 0.1) < 4 * (0.09 / 40000) ** 0.5


def test_shared_draws_are_host_numbers_that_ignore_the_batch():
    a, b = Randomness(1, 2, torch.arange(4)), Randomness(1, 2, torch.arange(4, 6).to("meta"))
    assert a.shared_integer("k", 0, 1000) == b.shared_integer("k", 0, 1000)
    assert a.shared_uniform("k") == b.shared_uniform("k") and 0 < a.shared_uniform("k") < 1
    assert isinstance(a.shared_integer("k", 0, 4), int)
    steps = [Randomness(1, step, torch.arange(1)) for step in range(4000)]
    counts = torch.bincount(torch.tensor([r.shared_integer("k", 0, 4) for r in steps]))
    assert len(counts) == 4 and (counts - 1000).abs().max() < 4 * 750**0.5
    assert abs(sum(r.shared_uniform("u") for r in steps) / 4000 - 0.5) < 4 * (1 / 12 / 4000) ** 0.5


def test_draws_wait_for_no_device_and_touch_no_global_state():
    r = Randomness(1, 2, torch.arange(4, device="meta"))  # reading a value from meta would raise
    assert r.normal("a", (2,)).is_meta and r.uniform("a").is_meta
    assert r.integers("a", 0, 9).is_meta and r.bernoulli("a", 0.5).is_meta
    before = torch.get_rng_state()
    draws(range(3))
    assert torch.equal(before, torch.get_rng_state())


def test_negative_and_huge_seeds():
    for seed in (-1, 2**63, 2**70 + 3):
        assert draws([0], seed=seed)[0].isfinite().all()


def test_injection():
    given = torch.ones(2, 3)
    fallback = Randomness(1, 1, torch.arange(2))
    r = InjectedRandomness({"noise": given, "k": 2, "drop": torch.tensor([True, False]), "u": 0.25}, fallback)
    assert torch.equal(r.normal("noise", (3,)), given)
    assert r.normal("noise", (3,), torch.float64).dtype == torch.float64
    assert torch.equal(r.normal("other", (3,)), fallback.normal("other", (3,)))
    assert torch.equal(r.uniform("other"), fallback.uniform("other"))
    assert torch.equal(r.integers("other", 0, 5), fallback.integers("other", 0, 5))
    assert r.bernoulli("drop", 0.0).tolist() == [True, False]
    assert r.shared_integer("k", 0, 4) == 2 and r.shared_integer("j", 0, 4) == fallback.shared_integer("j", 0, 4)
    assert r.shared_uniform("u") == 0.25 and r.shared_uniform("w") == fallback.shared_uniform("w")
    with pytest.raises(ValueError, match="noise"):
        r.normal("noise", (4,))


@pytest.mark.parametrize(
    "bad",
    [
        lambda r: r.integers("a", 3, 3),
        lambda r: r.shared_integer("a", 0, 2**31),
        lambda r: r.bernoulli("a", 1.5),
        lambda r: Randomness(0, 0, torch.zeros(2)),
        lambda r: Randomness(0, 0, torch.zeros(2, 2, dtype=torch.int64)),
    ],
)
def test_errors(bad):
    with pytest.raises(ValueError, match="give"):
        bad(Randomness(0, 0, torch.arange(2)))
