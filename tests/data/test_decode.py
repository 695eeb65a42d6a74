from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ldm.data.loading.decode import DECODERS, cover_size, decoder, resize
from ldm.data.shards import picture as picture_module
from ldm.data.shards.picture import BadSample, decode
from ldm.errors import UserError
from tests.data.make import picture


def natural(seed: int, width: int, height: int) -> Image.Image:
    """A picture whose spectrum falls as photographs' do, amplitude about 1 / frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    shape = 1 / (frequency + 1 / max(width, height)) ** 1.2
    grey, *colours = (np.fft.ifft2(shape * np.fft.fft2(rng.normal(size=(height, width)))).real for _ in range(4))
    bands = [grey + 0.4 * colour for colour in colours]
    scaled = [(band - band.mean()) / band.std() * 45 + 128 for band in bands]
    return Image.fromarray(np.stack(scaled, -1).clip(0, 255).astype(np.uint8))


def stored(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-9)))


def lanczos(data: bytes, size: tuple[int, int]) -> np.ndarray:
    image = Image.open(BytesIO(data)).convert("RGB")
    return np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS))


@pytest.mark.parametrize(("width", "height"), [(768, 768), (1024, 680), (500, 900)])
def test_exact_is_within_37_db_of_pillows_lanczos_and_fast_within_30(width: int, height: int) -> None:
    data = stored(natural(0, width, height), quality=92)
    exact, original = decoder("exact")(data, (256, 256))
    assert original == (height, width) and exact.shape[:2] == cover_size(original, (256, 256))
    reference = lanczos(data, exact.shape[:2])
    assert psnr(exact, reference) > 37
    fast, _ = decoder("fast")(data, (256, 256))
    assert fast.shape == exact.shape and psnr(fast, reference) > 30
    assert (fast != exact).any()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("width", "height"), [(90, 60), (48, 32), (20, 31), (16, 300)])
def test_every_decoder_covers_the_size(name: str, kind: str, width: int, height: int) -> None:
    pixels, original = decoder(name)(stored(natural(1, width, height), kind, quality=95), (32, 48))
    assert original == (height, width) and pixels.shape == (*cover_size(original, (32, 48)), 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize("name", ["exact", "fast"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_orientations_are_pillows(name: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = stored(natural(2, 128, 96).resize((64, 48)), exif=exif, quality=95)
    size = (64, 48) if turn >= 5 else (48, 64)
    pixels, original = decoder(name)(data, size)
    expected, upright = decode(data, size)
    assert original == upright == size and pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() < 1


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpegs_become_rgb(mode: str) -> None:
    data = stored(natural(3, 64, 64).convert(mode), quality=95)
    pixels, _ = decoder("exact")(data, (64, 64))
    assert pixels.shape == (64, 64, 3) and psnr(pixels, decode(data, (64, 64))[0]) > 35


WHOLE = stored(natural(4, 200, 200))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty picture"),
        (b"no picture", "corrupt picture"),
        (b"\xff\xd8 no picture", "corrupt picture"),
        (WHOLE[: len(WHOLE) // 2], "corrupt picture"),
        (WHOLE[:100], "corrupt picture"),
        (picture(0)[:-100], "corrupt picture"),
    ],
)
def test_broken_pictures_have_a_reason(name: str, data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decoder(name)(data, (16, 16))


def gigapixel(data: bytes) -> bytes:
    """The same JPEG with 40,000 x 40,000 pixels in its header."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + (40_000).to_bytes(2, "big") * 2 + data[at + 4 :]


@pytest.mark.parametrize("name", DECODERS)
def test_bounds_hold_before_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadSample, match="too many pixels"):
        decoder(name)(gigapixel(WHOLE), (16, 16))
    monkeypatch.setattr(picture_module, "MAX_bytes", 100)
    with pytest.raises(BadSample, match="too many bytes"):
        decoder(name)(WHOLE, (16, 16))


def test_a_picture_that_fits_is_not_resampled() -> None:
    pixels = np.asarray(natural(5, 32, 24))
    assert resize(pixels, (24, 32)) is pixels


def test_an_unknown_decoder_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"decode=exakt.*did you mean exact"):
        decoder("exakt")
