"""Conditions and the conditioners that make them from captions, classes, sizes and pictures."""

from ldm.conditioning.classes import ClassConditioner
from ldm.conditioning.compose import Compose
from ldm.conditioning.condition import Condition
from ldm.conditioning.conditioner import Conditioner, dropout_mask
from ldm.conditioning.image import LowResolution, MaskedImage
from ldm.conditioning.micro import MicroConditioner
from ldm.conditioning.pretrained import (
    clip_projection_from_pretrained,
    text_encoder_from_pretrained,
    tokenizer_from_pretrained,
)
from ldm.conditioning.text import TextConditioner, clip_projection, clip_text_for, clip_text_from_config
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
    "dropout_mask",
    "text_encoder_from_pretrained",
    "tokenizer_from_pretrained",
]
