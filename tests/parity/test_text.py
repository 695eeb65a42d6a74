"""Our text conditions against transformers' text models: last layer, last but one, pooled and projected."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ldm.conditioning import (
    TextConditioner,
    captions_tokenizer,
    clip_projection_from_pretrained,
    text_encoder_from_pretrained,
)
from ldm.errors import UserError
from ldm.interop.names import text_to_transformers

from .names import gradients_of, relative, worst_gradient

TOLERANCE = 1e-5
CAPTIONS = ["a red circle above a blue square", "a blue circle", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model of three layers with a projection, and its tokenizer."""
    path = tmp_path_factory.mktemp("text") / "model"
    tokenizer = captions_tokenizer(CAPTIONS * 3, path, max_length=12)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        projection_dim=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=12,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = CLIPTextModelWithProjection(config)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(("layer", "final_norm"), [(-1, True), (-2, True), (-2, False)])
def test_states_pooled_and_gradients_are_those_of_transformers(folder: Path, layer: int, final_norm: bool) -> None:
    ours = TextConditioner(
        text_encoder_from_pretrained(str(folder)),
        captions_tokenizer([], folder),
        layer=layer,
        final_norm=final_norm,
        pooled=True,
        projection=clip_projection_from_pretrained(str(folder)),
        frozen=False,
        max_length=12,
    )
    peer = CLIPTextModelWithProjection.from_pretrained(folder)
    ids, _ = ours.tokenize(CAPTIONS)
    theirs = peer(input_ids=ids, output_hidden_states=True)
    states = theirs.last_hidden_state if layer == -1 else theirs.hidden_states[layer]
    if final_norm and layer != -1:
        states = peer.text_model.final_layer_norm(states)
    condition = ours({"caption": CAPTIONS})
    assert condition.tokens is not None and condition.vector is not None
    assert relative(condition.tokens, states) < TOLERANCE
    assert relative(condition.vector, theirs.text_embeds) < TOLERANCE
    target = torch.randn_like(states)
    ((condition.tokens - target).square().mean() + condition.vector.square().mean()).backward()
    ((states - target).square().mean() + theirs.text_embeds.square().mean()).backward()
    pieces = text_to_transformers(dict(ours.named_parameters()), "text_model.")
    worst, name = worst_gradient(ours, gradients_of(peer, ours, pieces), "k_proj.bias")
    assert worst < TOLERANCE, (name, worst)


def test_left_out_layers_are_the_last(folder: Path) -> None:
    two = text_encoder_from_pretrained(str(folder), clip_skip=1)
    ids = torch.tensor([[1, 2, 3]])
    peer = CLIPTextModelWithProjection.from_pretrained(folder).text_model
    wanted = peer.final_layer_norm(peer(input_ids=ids, output_hidden_states=True).hidden_states[-2])
    assert relative(two(input_ids=ids).last_hidden_state, wanted) < TOLERANCE
    with pytest.raises(UserError, match=r"clip_skip=3: .* has 3 layers"):
        text_encoder_from_pretrained(str(folder), clip_skip=3)


def test_a_text_model_without_a_projection_is_refused(folder: Path, tmp_path: Path) -> None:
    text_encoder_from_pretrained(str(folder)).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="text encoder with a projection"):
        clip_projection_from_pretrained(str(tmp_path / "plain"))
