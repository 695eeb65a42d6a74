"""The widths of text encoders before they are loaded; a projection out of a whole CLIP."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from ldm.conditioning import clip_projection_from_pretrained, clip_text_from_config, clip_text_from_pretrained
from ldm.conditioning.condition import Widths
from ldm.conditioning.published import text_widths
from ldm.errors import UserError


def test_a_whole_clip_gives_its_text_encoder_and_its_projection(tiny_clip: Path) -> None:
    """As OpenCLIP's on the hub: the width of the projection stands outside of text_config."""
    whole = CLIPModel.from_pretrained(tiny_clip)
    assert whole.config.text_config.projection_dim != whole.config.projection_dim == 8
    projection = clip_projection_from_pretrained(str(tiny_clip))
    assert torch.equal(projection.weight, whole.text_projection.weight)
    encoder = clip_text_from_pretrained(str(tiny_clip))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(encoder(ids).last_hidden_state, whole.text_model(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("encoder", "projection", "pooled", "wanted"),
    [
        ({"hidden_size": 24}, None, False, Widths(24)),
        ({"hidden_size": 24}, None, True, Widths(24, 24)),
        ({"hidden_size": 24}, {"hidden_size": 24, "projection_dim": 6}, True, Widths(24, 6)),
        ({}, None, False, None),
        ({"name_or_path": "CLIP"}, {"name_or_path": "CLIP"}, True, Widths(16, 8)),
        ({"name_or_path": "openai/clip-vit-large-patch14"}, None, False, Widths(768)),
        ({"name_or_path": "nobody/nothing"}, None, False, None),
        ({"name_or_path": "CLIP"}, {"name_or_path": "nobody/nothing"}, True, None),
    ],
)
def test_widths_are_known_without_loading(
    encoder: dict[str, Any], projection: Any, pooled: bool, wanted: Any, tiny_clip: Path
) -> None:
    places = {"CLIP": str(tiny_clip)}
    for part in (encoder, projection or {}):
        if "name_or_path" in part:
            part["name_or_path"] = places.get(part["name_or_path"], part["name_or_path"])
    assert text_widths(encoder, projection, pooled) == wanted


def test_the_default_text_encoder_computes_as_clip_l() -> None:
    with torch.device("meta"):
        config = clip_text_from_config().config
    assert (config.hidden_act, config.layer_norm_eps, config.num_attention_heads) == ("quick_gelu", 1e-5, 12)


def test_a_text_encoder_alone_has_no_projection(tiny_clip: Path, tmp_path: Path) -> None:
    clip_text_from_pretrained(str(tiny_clip)).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="text encoder with a projection"):
        clip_projection_from_pretrained(str(tmp_path / "plain"))
