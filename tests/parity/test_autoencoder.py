"""Our first stages against diffusers' AutoencoderKL and VQModel with the same weights: outputs and gradients."""

import pytest
import torch

from ldm.first_stage.autoencoder import FirstStage
from ldm.first_stage.regularizer import KLRegularizer, VQRegularizer
from ldm.interop.names import first_stage_to_diffusers
from ldm.networks.autoencoder import Decoder, Encoder

from .names import copy_weights, gradients_of, relative, worst_gradient

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-5  # ||difference|| / ||value||, float32
ZERO = "to_k.bias"  # its gradient is exactly 0: a constant on every key leaves the softmax as it is


def test_kl_moments_images_and_gradients_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    # 8 groups: with a channel per group the bias before a norm would have a gradient of exactly 0
    encoder = Encoder(3, 32, (1, 2, 4, 4), 2, 8, groups=8)
    decoder = Decoder(4, 32, (1, 2, 4, 4), 2, groups=8)
    ours = FirstStage(encoder, KLRegularizer(1.0), decoder, latent_channels=4, latent_std=1 / 0.18215)
    peer = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    )
    pieces = first_stage_to_diffusers(dict(ours.named_parameters()))
    copy_weights(ours, peer, pieces)
    images, noise = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 4, 4, 6)

    posterior = peer.encode(images).latent_dist
    mean, log_var = KLRegularizer.moments(ours.quant_conv(ours.encoder(images)))
    assert relative(mean, posterior.mean) < TOLERANCE and relative(log_var, posterior.logvar) < TOLERANCE
    scaled = posterior.mean * peer.config.scaling_factor
    assert relative(ours.encode(images), scaled) < TOLERANCE
    assert relative(ours.decode(scaled), peer.decode(scaled / peer.config.scaling_factor).sample) < TOLERANCE

    reconstruction, regularized = ours(images, noise)
    wanted = peer.decode(posterior.mean + posterior.std * noise).sample
    assert relative(reconstruction, wanted) < TOLERANCE
    assert relative(regularized.loss, posterior.kl().mean()) < TOLERANCE

    ((reconstruction - images).square().sum() + regularized.loss).backward()
    ((wanted - images).square().sum() + posterior.kl().mean()).backward()
    worst, name = worst_gradient(ours, gradients_of(peer, ours, pieces), ZERO)
    assert worst < TOLERANCE, (name, worst)


def test_vq_indices_images_and_gradients_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    levels = (False, False, True)  # attention at the lowest resolution, as VQ-f8 and f16 have it
    encoder = Encoder(3, 32, (1, 2, 4), 2, 3, attention_levels=levels, groups=8)
    decoder = Decoder(3, 32, (1, 2, 4), 2, attention_levels=levels, groups=8)
    ours = FirstStage(encoder, VQRegularizer(64, 3), decoder, latent_channels=3)
    torch.nn.init.normal_(ours.regularizer.codebook.weight, std=0.5)
    peer = diffusers.VQModel(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=3,
        num_vq_embeddings=64,
        norm_num_groups=8,
    )
    pieces = first_stage_to_diffusers(dict(ours.named_parameters()))
    copy_weights(ours, peer, pieces)
    images = torch.rand(2, 3, 32, 48) * 2 - 1

    h = peer.encode(images).latents
    quantised, loss, (_, _, indices) = peer.quantize(h)
    assert relative(ours.encode(images), h) < TOLERANCE
    assert torch.equal(ours.regularizer.indices(ours.encode(images)).flatten(), indices)
    assert indices.unique().numel() > 10
    assert relative(ours.decode(h), peer.decode(h).sample) < TOLERANCE

    reconstruction, regularized = ours(images)
    wanted = peer.decoder(peer.post_quant_conv(quantised), None)
    assert relative(reconstruction, wanted) < TOLERANCE
    assert relative(regularized.loss.mean(), loss) < TOLERANCE
    ((reconstruction - images).square().mean() + regularized.loss.mean()).backward()
    ((wanted - images).square().mean() + loss).backward()
    worst, name = worst_gradient(ours, gradients_of(peer, ours, pieces), ZERO)
    assert worst < TOLERANCE, (name, worst)
