"""The first stage: parameter count, statistics, casts, sizes, fingerprint."""

from typing import Any

import pytest
import torch

from ldm.errors import UserError
from ldm.first_stage.autoencoder import FirstStage
from ldm.first_stage.regularizer import KLRegularizer, VQRegularizer
from ldm.networks.autoencoder import Decoder, Encoder


def tiny(**changes: Any) -> FirstStage:
    torch.manual_seed(0)
    encoder, decoder = Encoder(3, 8, (1, 2), 1, 4, groups=4), Decoder(2, 8, (1, 2), 1, groups=4)
    return FirstStage(encoder, KLRegularizer(), decoder, **({"latent_channels": 2} | changes))


def test_published_parameter_count() -> None:
    with torch.device("meta"):
        encoder, decoder = Encoder(3, 128, (1, 2, 4, 4), 2, 8), Decoder(4, 128, (1, 2, 4, 4), 2)
        first_stage = FirstStage(encoder, KLRegularizer(), decoder, latent_channels=4)
    assert sum(p.numel() for p in first_stage.parameters()) == 83_653_863
    assert first_stage.factor == 8


@torch.no_grad()
def test_encode_normalises_and_decode_undoes_it() -> None:
    first_stage, images = tiny(), torch.rand(2, 3, 8, 12) * 2 - 1
    raw, decoded = first_stage.encode(images), first_stage.decode(first_stage.encode(images))
    first_stage.set_statistics([0.5, -1.0], [2.0, 4.0])
    z = first_stage.encode(images)
    expected = (raw - torch.tensor([0.5, -1.0]).view(1, 2, 1, 1)) / torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(first_stage.decode(z), decoded)
    torch.testing.assert_close(first_stage(images).images, decoded)


def test_statistics_travel_with_the_weights() -> None:
    source, target = tiny(latent_std=[5.0, 6.0], latent_mean=0.1), tiny()
    target.load_state_dict(source.state_dict())
    assert target.latent_std.tolist() == [5.0, 6.0]
    assert target.latent_mean.tolist() == pytest.approx([0.1, 0.1])
    assert not target.latent_std.requires_grad


@pytest.mark.parametrize(("mean", "std"), [([0.0] * 3, 1.0), (0.0, [1.0, 0.0]), (0.0, -1.0), (float("nan"), 1.0)])
def test_impossible_statistics_are_refused(mean: Any, std: Any) -> None:
    with pytest.raises(UserError, match="latent_"):
        tiny().set_statistics(mean, std)


@torch.no_grad()
def test_a_cast_keeps_the_statistics_in_float32() -> None:
    first_stage = tiny(latent_std=1 / 0.18215).bfloat16()
    assert first_stage.latent_std.dtype == torch.float32
    assert first_stage.latent_std.tolist() == pytest.approx([1 / 0.18215] * 2, rel=1e-7)
    z = first_stage.encode(torch.zeros(1, 3, 8, 8))
    assert z.dtype == torch.float32
    assert first_stage.decode(z).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("codebook", [False, True])
def test_half_precision_autocast_and_memory_layout_are_close(codebook: bool) -> None:
    torch.manual_seed(0)
    encoder, decoder = Encoder(3, 8, (1, 2), 1, 2 if codebook else 4, groups=4), Decoder(2, 8, (1, 2), 1, groups=4)
    regularizer = VQRegularizer(64, 2) if codebook else KLRegularizer()
    for entries in regularizer.parameters():
        torch.nn.init.normal_(entries)
    first_stage = FirstStage(encoder, regularizer, decoder, 2, latent_std=0.5)
    images = torch.rand(2, 3, 12, 20) * 2 - 1
    given = torch.randn(1, 2, 6, 10)
    wanted, decoded = first_stage.encode(images), first_stage.decode(given)
    with torch.autocast("cpu", torch.bfloat16):
        found = [first_stage.encode(images)]
        shown = [first_stage.decode(given)]
    first_stage.to(memory_format=torch.channels_last)
    torch.testing.assert_close(first_stage.encode(images), wanted, atol=1e-5, rtol=1e-4)
    first_stage.bfloat16()
    found.append(first_stage.encode(images))
    shown.append(first_stage.decode(given))
    for z, image in zip(found, shown, strict=True):
        assert z.dtype == torch.float32
        assert (z - wanted).norm() < 3e-2 * wanted.norm()
        # The decoder rounds to bfloat16, by up to 2^-9, 48 times in a row: the weights and outputs of 17 convolutions,
        # the outputs of 14 norms. Independent roundings add up to 48^0.5 2^-9 = 1.4e-2; up to 1.7e-2 is measured.
        assert (image.float() - decoded).norm() < 6e-2 * decoded.norm()


def test_it_can_be_built_without_memory_and_filled() -> None:
    with torch.device("meta"):
        first_stage = tiny()
    first_stage.to_empty(device="cpu").load_state_dict(tiny(latent_std=3.0).state_dict())
    assert first_stage.latent_std.tolist() == [3.0, 3.0]


def test_sizes_that_do_not_divide_are_refused() -> None:
    first_stage = tiny()
    first_stage.check_size(8, 12)
    with pytest.raises(UserError, match=r"9x12 do not divide by the first stage's factor 2; .* is 8x12"):
        first_stage.encode(torch.zeros(1, 3, 9, 12))


def test_the_fingerprint_changes_with_a_weight_and_with_a_statistic() -> None:
    first_stage = tiny()
    before = first_stage.fingerprint()
    assert len(before) == 16 and before == tiny().fingerprint()
    first_stage.set_statistics(0.0, 2.0)
    between = first_stage.fingerprint()
    with torch.no_grad():
        first_stage.last_layer[0, 0, 0, 0] += 1e-3
    assert len({before, between, first_stage.fingerprint()}) == 3


def test_parts_that_do_not_fit_are_refused() -> None:
    encoder, decoder = Encoder(3, 8, (1, 2), 1, 4, groups=4), Decoder(2, 8, (1, 2, 2), 1, groups=4)
    with pytest.raises(UserError, match="divides the size by 2, the decoder multiplies by 4"):
        FirstStage(encoder, KLRegularizer(), decoder, latent_channels=2)
    with pytest.raises(UserError, match="without quant_conv the encoder needs out_channels=6"):
        tiny(latent_channels=3, quant_conv=False)
    assert tiny(quant_conv=False)(torch.zeros(1, 3, 4, 4)).images.shape == (1, 3, 4, 4)
