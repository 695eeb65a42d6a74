"""A tokenizer of a few words, and a tiny text encoder for it."""

import pytest
import torch

from ldm.conditioning import captions_tokenizer, clip_text_for

CAPTIONS = [
    f"a {color} {shape} {relation} a {other} square"
    for color in ("red", "blue", "green")
    for shape in ("circle", "triangle")
    for relation in ("above", "below")
    for other in ("yellow", "white")
]


@pytest.fixture(scope="session")
def captions():
    return CAPTIONS


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tokenizer"
    captions_tokenizer(CAPTIONS, path)
    return path


@pytest.fixture
def tokenizer(tokenizer_folder):
    return captions_tokenizer([], tokenizer_folder)


@pytest.fixture
def make_encoder(tokenizer):
    def make(seed: int = 0, hidden_size: int = 16, layers: int = 3, max_position: int = 77):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            encoder = clip_text_for(tokenizer, hidden_size, layers, 2, 32, max_position)
            # CLIP's initial weights are too small to tell layers and norms apart.
            for parameter in encoder.parameters():
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        return encoder

    return make
