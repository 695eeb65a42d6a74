"""Text encoders other than CLIP: T5's encoder half, BERT and a decoder, from tiny random ones in folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from ldm.checkpoint import load_tensors, save_tensors
from ldm.conditioning import Compose, TextConditioner, text_encoder_from_pretrained, tokenizer_from_pretrained
from ldm.errors import UserError
from ldm.randomness import keys
from tests.unigram import save_unigram

CAPTIONS = ["a red circle", "a blue square above a green triangle", ""]
FIELDS = {"caption": CAPTIONS}
LENGTH = 100  # above CLIP's 77


CONFIGS: dict[str, Any] = {
    "t5": lambda v: T5ForConditionalGeneration(
        T5Config(vocab_size=v + 28, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    ),
    "umt5": lambda v: UMT5EncoderModel(
        UMT5Config(vocab_size=v, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    ),
    "bert": lambda v: BertModel(
        BertConfig(vocab_size=v, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    ),
    "llama": lambda v: LlamaForCausalLM(
        LlamaConfig(vocab_size=v, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    ),
    "gemma": lambda v: Gemma2Model(
        Gemma2Config(
            vocab_size=v,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each family, with its encoder and its tokenizer."""
    found = {}
    for name, make in CONFIGS.items():
        found[name] = path = tmp_path_factory.mktemp("text") / name
        vocabulary = save_unigram(path, CAPTIONS, "<s> $A" if name in ("llama", "gemma") else "$A </s>")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make(vocabulary)
            for parameter in model.parameters():  # initial weights are too small to tell layers and norms apart
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(path)
    return found


def conditioner(path: Path, **options: Any) -> TextConditioner:
    encoder, tokenizer = text_encoder_from_pretrained(str(path)), tokenizer_from_pretrained(str(path))
    final_norm = options.pop("final_norm", not isinstance(encoder, BertModel))
    return TextConditioner(encoder, tokenizer, final_norm=final_norm, **({"max_length": LENGTH} | options))


@pytest.mark.parametrize("family", CONFIGS)
def test_states_are_those_of_a_plain_call_of_transformers(folders: dict[str, Path], family: str) -> None:
    """Its tokenizer's padding and attention mask, its model's last states."""
    ours = conditioner(folders[family])
    tokenizer = AutoTokenizer.from_pretrained(folders[family], padding_side="right")
    tokens = tokenizer(CAPTIONS, padding="max_length", max_length=LENGTH, return_tensors="pt")
    ids, words = ours.tokenize(CAPTIONS)
    assert torch.equal(ids, tokens.input_ids) and torch.equal(words, tokens.attention_mask.bool())
    output = ours.encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
    condition = ours(FIELDS)
    assert condition.tokens is not None and condition.mask is not None and condition.vector is None
    assert torch.equal(condition.tokens, output.last_hidden_state)
    assert torch.equal(condition.mask, tokens.attention_mask.bool())
    assert ours.widths(4) == (16, 0, 0)
    names = {name.split(".")[0] for name, _ in ours.encoder.named_parameters()}
    assert not {"decoder", "lm_head"} & names


@pytest.mark.parametrize("family", CONFIGS)
def test_words_do_not_see_the_padding(folders: dict[str, Path], family: str) -> None:
    short, long = (conditioner(folders[family], max_length=length)(FIELDS) for length in (50, LENGTH))
    assert short.tokens is not None and long.tokens is not None and short.mask is not None and long.mask is not None
    torch.testing.assert_close(short.tokens[short.mask], long.tokens[long.mask])
    if family != "llama":  # a causal encoder's words do not see what follows
        return
    unmasked = conditioner(folders[family], mask=False)(FIELDS)
    assert unmasked.tokens is not None and unmasked.mask is None
    torch.testing.assert_close(unmasked.tokens[long.mask], long.tokens[long.mask])


def test_t5_without_a_mask_attends_to_the_padding(folders: dict[str, Path]) -> None:
    """As SD 3 and FLUX call it."""
    plain, masked = conditioner(folders["t5"], mask=False), conditioner(folders["t5"])
    ids, words = plain.tokenize(CAPTIONS)
    condition, other = plain(FIELDS), masked(FIELDS)
    assert condition.tokens is not None and condition.mask is None and other.tokens is not None
    assert torch.equal(condition.tokens, plain.encoder(ids).last_hidden_state)
    assert not torch.allclose(condition.tokens[words], other.tokens[words], atol=1e-3)
    assert plain.name != masked.name


@pytest.mark.parametrize(("family", "norm"), [("t5", "encoder.final_layer_norm"), ("gemma", "norm")])
def test_an_earlier_layer_with_and_without_the_final_norm(folders: dict[str, Path], family: str, norm: str) -> None:
    bare, normed = (conditioner(folders[family], layer=-2, final_norm=n) for n in (False, True))
    ids, words = bare.tokenize(CAPTIONS)
    hidden = bare.encoder(ids, attention_mask=words.long(), output_hidden_states=True).hidden_states[-2]
    first, second = bare(FIELDS).tokens, normed(FIELDS).tokens
    assert first is not None and second is not None
    assert torch.equal(first, hidden)
    assert torch.equal(second, bare.encoder.get_submodule(norm)(hidden))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("family", CONFIGS)
def test_clip_skip_leaves_out_the_last_layers(folders: dict[str, Path], family: str) -> None:
    path = str(folders[family])
    whole, two = text_encoder_from_pretrained(path), text_encoder_from_pretrained(path, clip_skip=1)
    ids = torch.tensor([[4, 5, 6, 1]])
    hidden = whole(ids, output_hidden_states=True).hidden_states[-2]
    if family != "bert":
        hidden = whole.get_submodule("encoder.final_layer_norm" if "t5" in family else "norm")(hidden)
    assert torch.equal(two(ids).last_hidden_state, hidden)
    with pytest.raises(UserError, match="clip_skip=3"):
        text_encoder_from_pretrained(path, clip_skip=3)


@pytest.mark.parametrize(("family", "end"), [("t5", 1), ("llama", None)])
def test_a_long_caption_keeps_the_end_token_that_the_tokenizer_adds(
    folders: dict[str, Path], family: str, end: int | None
) -> None:
    ours = conditioner(folders[family], max_length=8)
    long = "a red circle above a blue square"
    ids, words = ours.tokenize([long])
    whole = ours.tokenizer(long).input_ids
    assert ids[0].tolist() == (whole[:8] if end is None else [*whole[:7], end])
    assert words.all() and ours.truncated == 1


def test_an_empty_caption_without_tokens_still_has_one_to_attend_to(folders: dict[str, Path]) -> None:
    ours = conditioner(folders["gemma"])
    ours.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    ids, words = ours.tokenize([""])
    assert ids[0].tolist() == [0] * LENGTH and words[0].tolist() == [True] + [False] * (LENGTH - 1)
    tokens = ours({"caption": [""]}).tokens
    assert tokens is not None and tokens.isfinite().all()


def test_dropout_precomputed_states_and_training(folders: dict[str, Path]) -> None:
    ours = conditioner(folders["t5"], dropout=0.5)
    captions = ["a red circle", "a blue square"] * 8
    visit = keys(0, "visit", count=16)
    encoded = ours({"caption": captions}, visit)
    precomputed = ours({"caption": captions, **ours.states(captions)}, visit)
    for name, value in encoded.inputs().items():
        assert torch.allclose(value.float(), precomputed.inputs()[name].float(), atol=1e-5)
    lengths = encoded.inputs()["mask"].sum(1)
    assert 0 < int((lengths == 1).sum()) < 16  # "" is the end token alone
    trained = conditioner(folders["t5"], frozen=False).train()
    tokens = trained(FIELDS).tokens
    assert tokens is not None
    tokens.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


def test_shared_weights_are_saved_and_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    """T5's embedding has two names."""
    ours = conditioner(folders["t5"])
    save_tensors(tmp_path / "weights.safetensors", ours.state_dict())
    state, _ = load_tensors(tmp_path / "weights.safetensors")
    other = conditioner(folders["t5"])
    nn.init.zeros_(other.encoder.get_input_embeddings().weight)
    other.load_state_dict(state)
    assert torch.equal(other(FIELDS).inputs()["tokens"], ours(FIELDS).inputs()["tokens"])


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("t5", {"pooled": True}, "pooled=true: T5EncoderModel"),
        ("llama", {"pooled": True}, "pooled=true: LlamaModel"),
        ("bert", {"final_norm": True}, "final_norm=true: BertModel"),
        ("t5", {"final_norm": False}, "layer=-1 final_norm=false: T5EncoderModel"),
        ("gemma", {"layer": -4}, "layers -3 to -1"),
        ("bert", {"max_length": 513}, "2 to 512 tokens"),
        ("t5", {"max_length": 1}, "max_length=1"),
    ],
)
def test_options_that_a_family_does_not_have_are_refused(
    folders: dict[str, Path], family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        conditioner(folders[family], **options)


def test_a_tokenizer_without_padding_is_refused(folders: dict[str, Path]) -> None:
    tokenizer = tokenizer_from_pretrained(str(folders["llama"]))
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="pad_token"):
        TextConditioner(text_encoder_from_pretrained(str(folders["llama"])), tokenizer)
    assert tokenizer_from_pretrained(str(folders["llama"]), pad_token="</s>").pad_token_id == 1


def test_folders_with_parts_missing_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = T5EncoderModel.from_pretrained(folders["t5"])
    state = {name: value for name, value in encoder.state_dict().items() if "block.1" not in name}
    encoder.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"weights missing: .*block\.1"):
        text_encoder_from_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="no tokenizer at"):  # transformers makes one of special tokens here
        tokenizer_from_pretrained(str(tmp_path))


def test_t5_and_clip_are_joined_along_the_sequence(folders: dict[str, Path], make_encoder: Any, tokenizer: Any) -> None:
    clip, t5 = TextConditioner(make_encoder(hidden_size=16), tokenizer, pooled=True), conditioner(folders["t5"])
    both = Compose([clip, t5], join="sequence")
    condition, first, second = both(FIELDS), clip(FIELDS), t5(FIELDS)
    assert both.widths(4) == (16, 16, 0)
    assert condition.tokens is not None and first.tokens is not None and second.tokens is not None
    assert torch.equal(condition.tokens, torch.cat([first.tokens, second.tokens], dim=1))
    assert condition.mask is not None and second.mask is not None and condition.mask[:, :77].all()
    assert torch.equal(condition.mask[:, 77:], second.mask)
    assert condition.vector is not None and first.vector is not None and torch.equal(condition.vector, first.vector)
