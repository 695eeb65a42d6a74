"""What a model is conditioned on, and what makes it from captions."""

from ldm.conditioning.compose import Compose
from ldm.conditioning.condition import Condition
from ldm.conditioning.text import (
    Conditioner,
    TextConditioner,
    clip_text_for,
    clip_text_from_config,
    clip_text_from_pretrained,
    dropped,
    tokenizer_from_pretrained,
)
from ldm.conditioning.tokenizer import captions_tokenizer

__all__ = [
    "Compose",
    "Condition",
    "Conditioner",
    "TextConditioner",
    "captions_tokenizer",
    "clip_text_for",
    "clip_text_from_config",
    "clip_text_from_pretrained",
    "dropped",
    "tokenizer_from_pretrained",
]
