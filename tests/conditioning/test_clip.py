"""CLIP's text encoder and its projection, from a folder and by their sizes."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from ldm.conditioning import clip_projection_from_pretrained, clip_text_from_config, text_encoder_from_pretrained
from ldm.errors import UserError


def test_a_whole_clip_gives_its_text_encoder_and_its_projection(tiny_clip: Path) -> None:
    """As OpenCLIP's on the hub: the width of the projection stands outside of text_config."""
    whole = CLIPModel.from_pretrained(tiny_clip)
    assert whole.config.text_config.projection_dim != whole.config.projection_dim == 8
    projection = clip_projection_from_pretrained(str(tiny_clip))
    assert torch.equal(projection.weight, whole.text_projection.weight)
    encoder = text_encoder_from_pretrained(str(tiny_clip))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(encoder(ids).last_hidden_state, whole.text_model(ids).last_hidden_state)


def test_the_default_text_encoder_computes_as_clip_l() -> None:
    with torch.device("meta"):
        config = clip_text_from_config().config
    assert (config.hidden_act, config.layer_norm_eps, config.num_attention_heads) == ("quick_gelu", 1e-5, 12)


def test_a_text_encoder_alone_has_no_projection(tiny_clip: Path, tmp_path: Path) -> None:
    text_encoder_from_pretrained(str(tiny_clip)).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="text encoder with a projection"):
        clip_projection_from_pretrained(str(tmp_path / "plain"))
