"""What a model is conditioned on, and what makes it from captions, classes, sizes and pictures."""

from ldm.conditioning.classes import ClassConditioner
from ldm.conditioning.compose import Compose
from ldm.conditioning.condition import Condition
from ldm.conditioning.image import LowResolution, MaskedImage
from ldm.conditioning.micro import MicroConditioner
from ldm.conditioning.text import (
    Conditioner,
    TextConditioner,
    clip_projection,
    clip_projection_from_pretrained,
    clip_text_for,
    clip_text_from_config,
    clip_text_from_pretrained,
    dropped,
    tokenizer_from_pretrained,
)
from ldm.conditioning.tokenizer import captions_tokenizer

__all__ = [
    "ClassConditioner",
    "Compose",
    "Condition",
    "Conditioner",
    "LowResolution",
    "MaskedImage",
    "MicroConditioner",
    "TextConditioner",
    "captions_tokenizer",
    "clip_projection",
    "clip_projection_from_pretrained",
    "clip_text_for",
    "clip_text_from_config",
    "clip_text_from_pretrained",
    "dropped",
    "tokenizer_from_pretrained",
]
