"""The hub's text models without their weights: of the published sizes, on the meta device, with small tokenizers."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from ldm.conditioning import captions_tokenizer, clip_text_from_config
from tests.unigram import save_unigram

CLIPS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": dict(hidden_size=768, layers=12, heads=12, intermediate=3072),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": dict(hidden_size=1024, layers=24, heads=16, intermediate=4096),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": dict(hidden_size=1280, layers=32, heads=20, intermediate=5120),
}
T5 = "google/t5-v1_1-xxl"
T5_SIZES = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lets the loaders of `ldm.conditioning.pretrained` find the hub's text models; folders load as ever."""
    folder = tmp_path_factory.mktemp("hub")
    captions_tokenizer(["a red circle"] * 3, folder / "clip")
    save_unigram(folder / "t5", ["a red circle"])
    with torch.device("meta"):
        configs: dict[str, Any] = {name: clip_text_from_config(**sizes).config for name, sizes in CLIPS.items()}
    configs[T5] = T5Config(**T5_SIZES, feed_forward_proj="gated-gelu")

    def encoder(name: str, **options: Any) -> Any:
        family = T5EncoderModel if name == T5 else CLIPTextModel
        with torch.device("meta"):
            return family(deepcopy(configs[name])), {"missing_keys": set()}

    def projected(name: str, projection_dim: int, **options: Any) -> Any:
        assert projection_dim == CLIPS[name]["hidden_size"]
        with torch.device("meta"):
            projection = nn.Linear(projection_dim, projection_dim, bias=False)
        return SimpleNamespace(text_projection=projection), {"missing_keys": set()}

    def config_dict(name: str, **options: Any) -> Any:
        return {"projection_dim": CLIPS[name]["hidden_size"]}, {}

    def tokenizer(name: str, **options: Any) -> Any:
        return AutoTokenizer.from_pretrained(folder / ("t5" if name == T5 else "clip"))

    def replace(real: Any, method: str, fake: Any) -> None:
        original = getattr(real, method)

        def chosen(source: str, *arguments: Any, **options: Any) -> Any:
            if source in configs and not Path(source).exists():
                return fake(source, *arguments, **options)
            return original(source, *arguments, **options)

        monkeypatch.setattr(real, method, staticmethod(chosen))

    replace(AutoConfig, "from_pretrained", lambda name, **options: deepcopy(configs[name]))
    replace(AutoModelForTextEncoding, "from_pretrained", encoder)
    replace(CLIPTextModelWithProjection, "from_pretrained", projected)
    replace(CLIPTextConfig, "get_config_dict", config_dict)
    replace(AutoTokenizer, "from_pretrained", tokenizer)
