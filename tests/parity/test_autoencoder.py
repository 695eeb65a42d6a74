"""Our KL first stage against diffusers' AutoencoderKL with the same weights: outputs and gradients."""

import pytest
import torch

from ldm.first_stage.autoencoder import FirstStage
from ldm.first_stage.bottleneck import KLBottleneck
from ldm.networks.autoencoder import Decoder, Encoder

from .names import AUTOENCODER, copy_weights, relative

diffusers = pytest.importorskip("diffusers")


def test_latents_images_kl_and_gradients_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    # 8 groups: with a channel per group the bias before a norm would have a gradient of exactly 0
    encoder = Encoder(3, 32, (1, 2, 4, 4), 2, 8, groups=8)
    decoder = Decoder(4, 32, (1, 2, 4, 4), 2, groups=8)
    ours = FirstStage(encoder, KLBottleneck(), decoder, latent_channels=4, latent_std=1 / 0.18215)
    peer = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    )
    names = copy_weights(ours, peer, AUTOENCODER)
    images, noise = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 4, 4, 6)

    posterior = peer.encode(images).latent_dist
    scaled = posterior.mean * peer.config.scaling_factor
    assert relative(ours.encode(images), scaled) < 1e-5
    assert relative(ours.decode(scaled), peer.decode(scaled / peer.config.scaling_factor).sample) < 1e-5

    reconstruction, bottlenecked = ours(images, noise)
    wanted = peer.decode(posterior.mean + posterior.std * noise).sample
    assert relative(reconstruction, wanted) < 1e-5
    assert relative(bottlenecked.loss, posterior.kl()) < 1e-5

    ((reconstruction - images).square().sum() + bottlenecked.loss.sum()).backward()
    ((wanted - images).square().sum() + posterior.kl().sum()).backward()
    gradients = {name: p.grad for name, p in peer.named_parameters()}
    for name, parameter in ours.named_parameters():
        wanted_gradient = gradients[names[name]]
        assert parameter.grad is not None and wanted_gradient is not None
        if not name.endswith("to_k.bias"):  # exactly 0: a constant on every key leaves the softmax as it is
            assert relative(parameter.grad, wanted_gradient) < 2e-5, name
