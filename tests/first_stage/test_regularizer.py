"""The regularizers: closed forms, clamping, sampling; the nearest entries of a codebook."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.errors import UserError
from ldm.first_stage.regularizer import KLRegularizer, VQRegularizer


def test_kl_is_the_closed_form_summed_over_each_image() -> None:
    torch.manual_seed(0)
    mean, log_var = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    expected = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    out = KLRegularizer(kl_weight=0.25)(torch.cat([mean, log_var], dim=1))
    torch.testing.assert_close(out.loss, 0.25 * expected.mean())
    for name in ("kl", "regularizer"):  # unweighted
        torch.testing.assert_close(out.logs[name], expected.mean())


def test_a_standard_normal_posterior_costs_nothing() -> None:
    assert KLRegularizer(1.0)(torch.zeros(2, 4, 3, 3)).loss.item() == 0.0


def test_latents_are_the_mean_or_a_sample() -> None:
    mean, log_var = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), math.log(4.0))
    h = torch.cat([mean, log_var], dim=1)
    regularizer, noise = KLRegularizer(), torch.randn(1, 1, 2, 2)
    torch.testing.assert_close(regularizer.sample(h), mean)
    torch.testing.assert_close(regularizer.sample(h, noise), 3.0 + 2.0 * noise)
    torch.testing.assert_close(regularizer(h, noise).sample, 3.0 + 2.0 * noise)
    assert regularizer.quantize(mean) is mean


@pytest.mark.parametrize(("log_var", "std"), [(1e4, math.exp(10.0)), (-1e4, math.exp(-15.0))])
def test_log_variance_is_clamped(log_var: float, std: float) -> None:
    h = torch.cat([torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), log_var)], dim=1)
    torch.testing.assert_close(KLRegularizer().sample(h, torch.ones(1, 1, 1, 1)), torch.tensor([[[[std]]]]))


def test_half_precision_features_are_computed_in_float32() -> None:
    out = KLRegularizer()(torch.randn(1, 4, 2, 2).bfloat16())
    assert out.sample.dtype == out.loss.dtype == torch.float32


def book() -> VQRegularizer:
    regularizer = VQRegularizer(4, 2, commitment_weight=0.25, codebook_weight=1.0)
    regularizer.codebook.weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    return regularizer


def test_a_codebook_gives_the_nearest_entry() -> None:
    z = torch.tensor([[0.9, 0.2], [0.1, 0.6]]).T.view(1, 2, 1, 2)  # two pixels
    regularizer = book()
    assert regularizer.indices(z).flatten().tolist() == [1, 2]
    assert torch.equal(regularizer.sample(z), z)
    assert regularizer.quantize(z)[0, :, 0].T.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert torch.equal(regularizer.quantize(z.double()), regularizer.quantize(z))  # a sampler's, in float64


def test_autocast_finds_the_same_entries() -> None:
    torch.manual_seed(0)
    regularizer = VQRegularizer(512, 3)
    torch.nn.init.normal_(regularizer.codebook.weight)
    z = torch.randn(2, 3, 16, 16)
    plain = regularizer.indices(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(regularizer.indices(z), plain)
    # No entry is nearer in float64 by more than float32 rounds sums of up to 60, 4e-6 each; with bfloat16 it is 0.05.
    squares = torch.cdist(z.double().movedim(1, -1).flatten(0, 2), regularizer.codebook.weight.double()).square()
    taken = squares.gather(1, plain.flatten()[:, None])[:, 0]
    assert (taken - squares.min(dim=1).values).max() < 3e-5


def test_the_codebook_loss_moves_features_and_entries_together() -> None:
    regularizer = book()
    z = torch.tensor([0.9, 0.2]).view(1, 2, 1, 1).requires_grad_()
    out = regularizer(z)
    torch.testing.assert_close(out.loss, torch.tensor(1.25 * (0.01 + 0.04) / 2))
    assert out.logs["regularizer"] == out.loss
    assert out.logs["codebook_used"] == 1.0
    (10.0 * out.sample.sum() + out.loss).backward()
    assert z.grad is not None and regularizer.codebook.weight.grad is not None
    torch.testing.assert_close(z.grad.flatten(), 10.0 + 0.25 * torch.tensor([-0.1, 0.2]))
    wanted = torch.zeros(4, 2)
    wanted[1] = torch.tensor([0.1, -0.2])
    torch.testing.assert_close(regularizer.codebook.weight.grad, wanted)


def test_a_codebook_without_entries_is_refused() -> None:
    with pytest.raises(UserError, match="entries=0"):
        VQRegularizer(0, 2)
