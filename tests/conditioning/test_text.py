"""Text conditions: which states, which captions are dropped, what is frozen, what is cut."""

import logging

import pytest
import torch

from ldm.conditioning import (
    TextConditioner,
    clip_text_from_config,
    dropout_mask,
    text_encoder_from_pretrained,
    tokenizer_from_pretrained,
)
from ldm.errors import UserError
from ldm.randomness import keys

CAPTIONS = ["a red circle", "a blue square above a green triangle", ""]
FIELDS = {"caption": CAPTIONS}


def test_clip_vit_l_has_its_published_parameter_count():
    with torch.device("meta"):
        encoder = clip_text_from_config()
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480


def test_states_are_the_encoders_own(make_encoder, tokenizer):
    encoder = make_encoder().eval()
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    output = encoder(input_ids=ids, output_hidden_states=True)
    condition = TextConditioner(encoder, tokenizer)(FIELDS)
    assert torch.equal(condition.tokens, output.last_hidden_state)
    assert list(condition.inputs()) == ["tokens"]
    bare = TextConditioner(encoder, tokenizer, layer=-2, final_norm=False)(FIELDS)
    assert torch.equal(bare.tokens, output.hidden_states[-2])
    normed = TextConditioner(encoder, tokenizer, layer=-2)(FIELDS)
    assert torch.equal(normed.tokens, encoder.final_layer_norm(output.hidden_states[-2]))
    assert not torch.allclose(bare.tokens, normed.tokens)
    assert not torch.allclose(normed.tokens, condition.tokens)


def test_pooled_is_the_state_at_the_first_end_token(make_encoder, tokenizer):
    encoder = make_encoder()
    condition = TextConditioner(encoder, tokenizer, pooled=True, layer=-2, mask=True)(FIELDS)
    last = TextConditioner(encoder, tokenizer)(FIELDS).tokens
    lengths = [len(tokenizer(caption)["input_ids"]) for caption in CAPTIONS]
    for row, length in enumerate(lengths):
        assert torch.equal(condition.vector[row], last[row, length - 1])
        assert condition.mask[row].tolist() == [position < length for position in range(77)]
    ids, _ = TextConditioner(encoder, tokenizer).tokenize(CAPTIONS)
    assert torch.equal(condition.vector, encoder(input_ids=ids).pooler_output)


def test_no_keys_no_dropout_and_empty_is_the_empty_caption(make_encoder, tokenizer):
    conditioner = TextConditioner(make_encoder(), tokenizer, dropout=1.0)
    empty = conditioner({"caption": [""] * 3})
    plain = conditioner(FIELDS)
    assert torch.equal(empty.tokens[2], plain.tokens[2])
    assert not torch.allclose(empty.tokens[0], plain.tokens[0])
    assert torch.allclose(conditioner(FIELDS, keys(0, count=3)).tokens, empty.tokens, atol=1e-6)


def test_a_row_is_dropped_exactly_where_its_key_says(make_encoder, tokenizer):
    conditioner = TextConditioner(make_encoder(), tokenizer, dropout=0.5)
    visit = keys(0, 1, count=16)
    fields = {"caption": ["a red circle"] * 16}
    drop = dropout_mask(visit, "caption", 0.5)
    assert 0 < drop.sum() < 16
    expected = conditioner(fields).where(drop, conditioner({"caption": [""]}))
    assert torch.allclose(conditioner(fields, visit).tokens, expected.tokens, atol=1e-6)


def test_dropout_has_its_rate_and_is_redrawn_at_each_visit():
    first, second = (dropout_mask(keys(0, step, count=4000), "caption", 0.1) for step in (0, 1))
    rates = [drop.float().mean().item() for drop in (first, second)]
    assert all(abs(rate - 0.1) < 4 * (0.09 / 4000) ** 0.5 for rate in rates), rates
    assert not torch.equal(first, second)
    assert abs((first & second).float().mean().item() - 0.01) < 0.007
    other = dropout_mask(keys(0, 0, count=4000), "title", 0.1)
    assert not torch.equal(first, other)


def test_frozen_stays_in_eval_without_gradients_and_trained_has_them(make_encoder, tokenizer):
    frozen = TextConditioner(make_encoder(), tokenizer).train()
    assert frozen.training and not any(module.training for module in frozen.encoder.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen(FIELDS).tokens.requires_grad
    trained = TextConditioner(make_encoder(), tokenizer, frozen=False).train()
    assert trained.encoder.training
    trained(FIELDS).tokens.square().sum().backward()
    assert all(p.grad is not None for p in trained.encoder.parameters())
    with torch.no_grad():
        assert not trained(FIELDS).tokens.requires_grad
    assert trained.eval().encoder.training is False


def test_a_long_caption_keeps_its_end_token_and_is_counted(make_encoder, tokenizer, caplog):
    conditioner = TextConditioner(make_encoder(), tokenizer, max_length=8, pooled=True)
    long = "a red circle above a blue square " * 3
    with caplog.at_level(logging.WARNING):
        ids, _ = conditioner.tokenize([long, "a red circle", long])
    assert ids.shape == (3, 8)
    assert ids[0, 0] == tokenizer.bos_token_id and ids[0, -1] == tokenizer.eos_token_id
    assert ids[0, :-1].tolist() == tokenizer(long)["input_ids"][:7]
    assert ids[1].tolist().index(tokenizer.eos_token_id) == 4
    assert conditioner.truncated == 2
    assert len([r for r in caplog.records if r.name == "ldm.conditioning.text"]) == 1


def test_tokens_are_what_diffusers_pipelines_feed(make_encoder, tokenizer):
    """Its call, from StableDiffusionPipeline.encode_prompt."""
    captions = [*CAPTIONS, "a red circle above a blue square " * 20]
    theirs = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(TextConditioner(make_encoder(), tokenizer).tokenize(captions)[0], theirs.input_ids)


def test_another_padding_leaves_the_words_as_they_are(make_encoder, tokenizer_folder, tokenizer):
    """OpenCLIP's: "!" (0) pads, and in a caption "!" is the word it always was."""
    padded = tokenizer_from_pretrained(str(tokenizer_folder), pad_token="!")
    captions = ["a red circle!", ""]
    theirs = tokenizer(captions)["input_ids"]
    found = TextConditioner(make_encoder(), padded).tokenize(captions)[0].tolist()
    assert found == [row + [0] * (77 - len(row)) for row in theirs]
    assert TextConditioner(make_encoder(), tokenizer).name != TextConditioner(make_encoder(), padded).name
    with pytest.raises(UserError, match="pad_token='<pad>': the tokenizer has no such token"):
        tokenizer_from_pretrained(str(tokenizer_folder), pad_token="<pad>")


def test_an_empty_caption_that_is_zero_still_has_tokens_to_attend_to(make_encoder, tokenizer):
    condition = TextConditioner(make_encoder(), tokenizer, mask=True, zero_empty_embedding=True)(FIELDS)
    assert condition.mask[2].tolist() == [True, True] + [False] * 75
    assert condition.tokens[2].abs().max() == 0


def test_an_empty_batch_has_no_tokens(make_encoder, tokenizer):
    assert TextConditioner(make_encoder(), tokenizer).tokenize([])[0].shape == (0, 77)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.5}, "not a probability"),
        ({"layer": 0}, "layers -3 to -1"),
        ({"layer": -4}, "layers -3 to -1"),
        ({"max_length": 78}, "2 to 77 tokens"),
        ({"projection": torch.nn.Linear(16, 4)}, "pooled=true"),
    ],
)
def test_options_that_do_not_fit_are_refused(make_encoder, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        TextConditioner(make_encoder(), tokenizer, **options)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(UserError, match="not of one model"):
        TextConditioner(clip_text_from_config(16, 1, 2, 32, vocab=100, bos=98, eos=99, pad=99), tokenizer)


def test_a_missing_field_names_the_nearest(make_encoder, tokenizer):
    with pytest.raises(UserError, match="did you mean captions"):
        TextConditioner(make_encoder(), tokenizer)({"captions": CAPTIONS})


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="hidden_size=16 is not a multiple of heads=3"):
        clip_text_from_config(16, 1, 3, 32)


def test_saved_parts_load_from_their_folders(make_encoder, tokenizer, tmp_path):
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = TextConditioner(
        text_encoder_from_pretrained(str(tmp_path), subfolder="text_encoder"),
        tokenizer_from_pretrained(str(tmp_path), subfolder="tokenizer"),
    )
    assert torch.equal(loaded(FIELDS).tokens, TextConditioner(encoder, tokenizer)(FIELDS).tokens)


def test_what_cannot_be_downloaded_says_what_to_do(tmp_path):
    for load in (text_encoder_from_pretrained, tokenizer_from_pretrained):
        with pytest.raises(UserError, match="hf download nobody/nothing --local-dir"):
            load("nobody/nothing")
        with pytest.raises(UserError, match="config"):
            load(str(tmp_path))


@pytest.mark.parametrize("options", [{}, {"pooled": True, "mask": True, "zero_empty_embedding": True}])
def test_states_made_beforehand_are_what_encoding_gives(make_encoder, tokenizer, options):
    conditioner = TextConditioner(make_encoder(), tokenizer, dropout=0.5, **options)
    captions = [f"a {color} circle" for color in ("red", "blue", "green", "yellow")] * 4
    made = conditioner.states(captions)
    assert all(name.startswith(f"{conditioner.name}.") for name in made)
    for visit in (None, keys(0, "visit", count=16)):
        encoded = conditioner({"caption": captions}, visit).inputs()
        kept = conditioner({"caption": ["unread"] * 16, **made}, visit).inputs()
        assert list(kept) == list(encoded)
        for name, value in encoded.items():
            assert torch.allclose(kept[name].float(), value.float(), atol=1e-5)
    assert not torch.allclose(encoded["tokens"], conditioner({"caption": captions}).tokens)


def test_states_of_another_encoder_are_refused(make_encoder, tokenizer):
    own = TextConditioner(make_encoder(0), tokenizer)
    names = {own.name}
    for other in (
        TextConditioner(make_encoder(1), tokenizer),
        TextConditioner(make_encoder(0), tokenizer, layer=-2),
        TextConditioner(make_encoder(0), tokenizer, max_length=20),
    ):
        names.add(other.name)
        with pytest.raises(UserError, match=f"this text encoder is {own.name}"):
            own({"caption": CAPTIONS, **other.states(CAPTIONS)})
    assert len(names) == 4
    assert TextConditioner(make_encoder(0), tokenizer, frozen=False).encoders() == {}
