"""Conditioners joined along the features, as SDXL's two text encoders, and along the sequence, as SD 3's."""

import pytest
import torch

from ldm.conditioning import Compose, MicroConditioner, TextConditioner
from ldm.errors import UserError
from ldm.randomness import keys

FIELDS = {"caption": ["a red circle", "a blue square"]}


def test_tokens_and_vectors_stand_side_by_side(make_encoder, tokenizer):
    small = TextConditioner(make_encoder(0, 16), tokenizer, layer=-2, final_norm=False, mask=True)
    large = TextConditioner(make_encoder(1, 24), tokenizer, layer=-2, final_norm=False, mask=True, pooled=True)
    both = Compose([small, large])(FIELDS)
    assert torch.equal(both.tokens, torch.cat([small(FIELDS).tokens, large(FIELDS).tokens], dim=2))
    assert torch.equal(both.vector, large(FIELDS).vector)
    assert torch.equal(both.mask, small(FIELDS).mask)
    assert Compose([small, large]).widths(4) == (40, 24, 0)


def test_vectors_stand_in_the_parts_order(make_encoder, tokenizer):
    """SDXL's: pooled text, original size, crop, target size."""
    parts = [
        TextConditioner(make_encoder(), tokenizer, pooled=True),
        MicroConditioner("original_size", [48, 64], channels=4),
        MicroConditioner("crop", [0, 5], channels=4),
        MicroConditioner("target_size", [32, 32], channels=4),
    ]
    found = Compose(parts)(FIELDS).vector
    assert torch.equal(found, torch.cat([part(FIELDS).vector for part in parts], dim=1))


def test_an_encoder_that_attends_to_padding_decides_the_mask(make_encoder, tokenizer):
    masked = TextConditioner(make_encoder(), tokenizer, mask=True)
    assert Compose([masked, TextConditioner(make_encoder(), tokenizer)])(FIELDS).mask is None


def test_one_field_is_dropped_in_all_parts_together(make_encoder, tokenizer):
    parts = [TextConditioner(make_encoder(seed), tokenizer, dropout=0.5) for seed in (0, 1)]
    fields = {"caption": ["a red circle"] * 12}
    tokens = Compose(parts)(fields, keys(3, count=12)).tokens
    empty = Compose(parts)({"caption": [""] * 12}).tokens
    first, second = torch.isclose(tokens, empty, atol=1e-5).all(dim=1).split(16, dim=1)
    assert torch.equal(first.all(dim=1), second.all(dim=1))
    assert 0 < first.all(dim=1).sum() < 12


def test_parts_that_do_not_fit_are_refused(make_encoder, tokenizer):
    parts = [TextConditioner(make_encoder(), tokenizer, max_length=length) for length in (8, 77)]
    with pytest.raises(UserError, match=r"\[8, 77\]"):
        Compose(parts)(FIELDS)
    with pytest.raises(UserError, match="at least one"):
        Compose([])
