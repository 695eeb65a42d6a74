"""The KL bottleneck: closed forms, clamping, sampling."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.first_stage.bottleneck import KLBottleneck


def test_kl_is_the_closed_form_summed_over_each_image() -> None:
    torch.manual_seed(0)
    mean, log_var = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    expected = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    out = KLBottleneck()(torch.cat([mean, log_var], dim=1))
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.logs["kl"], expected.mean())


def test_a_standard_normal_posterior_costs_nothing() -> None:
    assert KLBottleneck()(torch.zeros(2, 4, 3, 3)).loss.tolist() == [0.0, 0.0]


def test_latents_are_the_mean_or_a_sample() -> None:
    mean, log_var = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), math.log(4.0))
    h = torch.cat([mean, log_var], dim=1)
    bottleneck, noise = KLBottleneck(), torch.randn(1, 1, 2, 2)
    torch.testing.assert_close(bottleneck.latents(h), mean)
    torch.testing.assert_close(bottleneck.latents(h, noise), 3.0 + 2.0 * noise)
    torch.testing.assert_close(bottleneck(h, noise).z, 3.0 + 2.0 * noise)
    assert bottleneck.finish(mean) is mean


@pytest.mark.parametrize(("log_var", "std"), [(1e4, math.exp(10.0)), (-1e4, math.exp(-15.0))])
def test_log_variance_is_clamped(log_var: float, std: float) -> None:
    h = torch.cat([torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), log_var)], dim=1)
    torch.testing.assert_close(KLBottleneck().latents(h, torch.ones(1, 1, 1, 1)), torch.tensor([[[[std]]]]))


def test_half_precision_features_are_computed_in_float32() -> None:
    out = KLBottleneck()(torch.randn(1, 4, 2, 2).bfloat16())
    assert out.z.dtype == out.loss.dtype == torch.float32
