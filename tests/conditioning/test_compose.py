"""Conditioners joined along the features, as SDXL's two text encoders, and along the sequence, as SD 3's."""

import pytest
import torch

from ldm.conditioning import Compose, Condition, Conditioner, MicroConditioner, TextConditioner
from ldm.conditioning.compose import Unconditional
from ldm.conditioning.condition import Widths
from ldm.errors import UserError
from ldm.randomness import keys


class Fixed(Conditioner):
    """A condition of given tensors, whatever the fields."""

    def __init__(self, **inputs):
        super().__init__()
        self.condition = Condition(**inputs)

    def widths(self, latent_channels):
        sizes = {"tokens": 2, "vector": 1, "concat": 1}
        inputs = self.condition.inputs()
        return Widths(*(inputs[name].shape[dim] if name in inputs else 0 for name, dim in sizes.items()))

    def forward(self, fields, rng_keys=None):
        return self.condition


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


ONE = [[[1.0, 2.0], [3.0, 4.0]]]  # [1, 2, 2]
TWO = [[[5.0, 6.0]]]  # [1, 1, 2]
NARROW = [[[7.0]]]  # [1, 1, 1]


def test_a_sequence_has_the_parts_tokens_one_after_the_other():
    first = Fixed(tokens=torch.tensor(ONE), vector=torch.tensor([[1.0]]), concat=torch.ones(1, 1, 2, 2))
    second = Fixed(tokens=torch.tensor(TWO), vector=torch.tensor([[2.0, 3.0]]), concat=torch.zeros(1, 2, 2, 2))
    both = Compose([first, Unconditional(), second], join="sequence")
    condition = both(FIELDS)
    assert condition.tokens.tolist() == [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]
    assert condition.mask is None
    assert condition.vector.tolist() == [[1.0, 2.0, 3.0]]
    assert condition.concat[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    assert both.widths(4) == (2, 3, 3)
    assert Compose([Unconditional()], join="sequence")(FIELDS).inputs() == {}


def test_masks_of_a_sequence_stand_one_after_the_other():
    first, second = torch.tensor([[True, False]]), torch.tensor([[False]])
    masked = Fixed(tokens=torch.tensor(ONE), mask=first), Fixed(tokens=torch.tensor(TWO), mask=second)
    assert Compose(masked, "sequence")(FIELDS).mask.tolist() == [[True, False, False]]
    plain = Fixed(tokens=torch.tensor(TWO))
    assert Compose([masked[0], plain], "sequence")(FIELDS).mask.tolist() == [[True, False, True]]
    assert Compose([plain, masked[0]], "sequence")(FIELDS).mask.tolist() == [[True, True, False]]


def test_narrower_parts_of_a_sequence_are_padded_with_zeros_where_asked():
    parts = Fixed(tokens=torch.tensor(NARROW)), Fixed(tokens=torch.tensor(ONE))
    with pytest.raises(UserError, match=r"\[1, 2\]: give pad_features=true"):
        Compose(parts, "sequence")
    padded = Compose(parts, "sequence", pad_features=True)
    assert padded(FIELDS).tokens.tolist() == [[[7.0, 0.0], [1.0, 2.0], [3.0, 4.0]]]
    assert padded.widths(4) == (2, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"), [({"join": "tokens"}, "join=tokens"), ({"pad_features": True}, "pad_features=true")]
)
def test_ways_to_join_that_do_not_exist_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Compose([Unconditional()], **options)
