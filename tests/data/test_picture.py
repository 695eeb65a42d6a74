from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from ldm.data.shards import picture as picture_module
from ldm.data.shards.picture import BadSample, decode
from tests.data.make import picture


def gradient(width: int, height: int) -> Image.Image:
    """A smooth picture: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], -1).astype(np.uint8))


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (96, 96), (20, 30)])
def test_every_kind_covers_the_size(kind: str, width: int, height: int) -> None:
    pixels, original = decode(stored(gradient(width, height), kind), (32, 48))
    scale = max(32 / height, 48 / width)
    assert original == (height, width)
    assert pixels.shape == (max(32, round(height * scale)), max(48, round(width * scale)), 3)
    right = np.asarray(gradient(pixels.shape[1], pixels.shape[0]))[4:-4, 4:-4]
    assert np.abs(pixels[4:-4, 4:-4].astype(int) - right).mean() < 4


def test_a_jpeg_decoded_at_reduced_scale_is_close_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = gradient(64, 64).resize((512, 512), Image.Resampling.BICUBIC)
    data = stored(smooth, "JPEG", quality=95)
    reduced, _ = decode(data, (64, 64))
    monkeypatch.setattr(picture_module, "DRAFT", 1000)
    whole, _ = decode(data, (64, 64))
    assert reduced.shape == whole.shape
    assert np.abs(reduced.astype(int) - whole).mean() < 1.5


def test_transparency_lies_on_white() -> None:
    layers = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    layers.paste((0, 0, 255, 255), (0, 0, 8, 16))
    for image in (layers, layers.convert("LA"), layers.quantize(8)):
        pixels, _ = decode(stored(image, "PNG"), (16, 16))
        assert (pixels[:, 8:] == 255).all() and not (pixels[:, :8] == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16"])
def test_other_colours_become_rgb(mode: str) -> None:
    grey = Image.new("L", (16, 16), 255) if mode != "I;16" else Image.fromarray(np.full((16, 16), 65535, np.uint16))
    image = grey if mode == "I;16" else grey.convert("RGB").convert(mode)
    pixels, _ = decode(stored(image, "JPEG" if mode == "CMYK" else "PNG"), (16, 16))
    assert pixels.shape == (16, 16, 3) and (pixels == 255).all()


def test_the_orientation_of_a_camera_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    data = stored(gradient(64, 32), "JPEG", exif=exif, quality=95)
    pixels, original = decode(data, (64, 32))
    assert original == (64, 32) and pixels.shape == (64, 32, 3)
    assert pixels[-1, 0, 0] > 200 > 50 > pixels[0, 0, 0]  # red now grows downwards


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty picture"), (b"no picture", "corrupt picture"), (picture(0)[:-100], "corrupt picture")],
)
def test_broken_pictures_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decode(data, (16, 16))


def test_bounds_hold_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_module, "MAX_pixels", 255)
    with pytest.raises(BadSample, match="too many pixels"):
        decode(picture(0)[:200], (16, 16))
    monkeypatch.setattr(picture_module, "MAX_bytes", 100)
    with pytest.raises(BadSample, match="too many bytes"):
        decode(picture(0), (16, 16))
