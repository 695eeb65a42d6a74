"""Numbers depend on their address alone, and have the distribution that they claim."""

import math

import pytest
import torch

from ldm.randomness import fold, key, keys, normal, uniform

N = 20_000


def test_the_stream_is_splitmix64():
    """Reference: Vigna's splitmix64.c, written here with Python's integers."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    assert mix(1234567 + 0x9E3779B97F4A7C15) == 6457827717110365317  # splitmix64.c's published first output
    for start in (0, 1234567, -5, 2**63 - 1):
        state = mix(start % 2**64)
        words = [mix((state + n * 0x9E3779B97F4A7C15) % 2**64) for n in (1, 2, 3)]
        drawn = uniform(torch.tensor([start]), (3,))[0]
        assert drawn.tolist() == [(word >> 40) * 2.0**-24 for word in words]


def test_a_key_never_changes():
    """Resuming an old run, or comparing with a published one, needs the same numbers for ever."""
    assert key(0, "crop", 3, 17) == KEY
    assert keys(0, "crop", 3, count=2, start=17).tolist()[0] == KEY
    assert uniform(torch.tensor([KEY]))[0].item() == pytest.approx(UNIFORM, abs=1e-7)
    assert normal(torch.tensor([KEY]))[0].item() == pytest.approx(NORMAL, abs=1e-6)


KEY = 848038461903872774
UNIFORM = 0.2178558111190796
NORMAL = -1.3219832181930542


def test_a_key_depends_on_every_part_of_the_address_and_its_type():
    addresses = [(1, 2), (2, 1), (12,), ("1", 2), (1, 2, 0), (1, "2"), ("1:2",), ()]
    assert len({key(*address) for address in addresses}) == len(addresses)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_row_depends_on_its_own_key_alone(draw):
    batch = keys(7, count=6)
    together = draw(batch, (3, 5))
    assert together.shape == (6, 3, 5) and together.dtype == torch.float32
    assert torch.equal(draw(batch[[4]], (3, 5))[0], together[4])
    assert torch.equal(draw(batch.flip(0), (3, 5)).flip(0), together)
    assert torch.equal(draw(batch, (15,)).view(6, 3, 5), together)


def test_a_longer_draw_begins_with_the_shorter():
    batch = keys(7, count=4)
    assert torch.equal(uniform(batch, (9,))[:, :4], uniform(batch, (4,)))
    assert torch.equal(normal(batch, (9,))[:, :5], normal(batch, (5,)))


def test_uniform_is_uniform_across_keys_and_within_one():
    for sample in (uniform(keys(1, count=N)), uniform(keys(1, count=1), (N,))[0]):
        assert sample.min() >= 0 and sample.max() < 1
        counts = torch.histc(sample, bins=20, min=0, max=1)
        chi_squared = ((counts - N / 20) ** 2 / (N / 20)).sum().item()
        assert chi_squared < 43.8, chi_squared  # the 0.999 quantile with 19 degrees of freedom


def test_normal_has_the_normal_distribution_function():
    for sample in (normal(keys(2, count=N)), normal(keys(2, count=1), (N,))[0]):
        ordered = sample.double().sort().values
        theory = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
        distance = (theory - torch.arange(1, N + 1) / N).abs().max().item()
        assert distance < 1.95 / math.sqrt(N), distance  # Kolmogorov's 0.999 quantile


def test_neighbours_are_uncorrelated():
    pairs = normal(keys(3, count=N), (2,))
    streams = torch.stack([normal(keys(3, count=N)), normal(fold(keys(3, count=N), "drop"))], dim=1)
    rows = torch.stack([pairs[:-1, 0], pairs[1:, 0]], dim=1)
    for sample in (pairs, streams, rows):
        assert abs(torch.corrcoef(sample.T)[0, 1].item()) < 4 / math.sqrt(N)


def test_fold_gives_other_keys_and_leaves_its_input():
    batch = keys(4, count=100)
    before = batch.clone()
    folded = torch.cat([batch, fold(batch, "noise"), fold(batch, "drop")])
    assert len(set(folded.tolist())) == 300
    assert torch.equal(batch, before)


@pytest.mark.parametrize("shape", [(0,), (), (1, 1)])
def test_shapes_at_the_edge(shape):
    for draw in (uniform, normal):
        assert draw(keys(0, count=2), shape).shape == (2, *shape)
        assert draw(torch.zeros(0, dtype=torch.int64), (3,)).shape == (0, 3)
