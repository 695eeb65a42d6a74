"""The environment of every test: one thread, no network, no windows, no accounts."""

import logging
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# The libraries read these variables when they are first imported.

import pytest
import torch

torch.set_num_threads(1)
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def tiny_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of 64 training and 16 validation pictures of 32 px, in shards."""
    from ldm.examples import shapes

    out = tmp_path_factory.mktemp("shapes")
    shapes.main([str(out), "--train", "64", "--val", "16", "--size", "32", "--per-shard", "32"])
    return out


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP of random weights for 32 px and 12 tokens, its tokenizer and its image processor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from ldm.conditioning import captions_tokenizer

    path = tmp_path_factory.mktemp("clip") / "tiny-clip"
    captions = ["a red circle above a blue square", "a blue circle", "a red square"]
    tokenizer = captions_tokenizer(captions * 3, path, max_length=12)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = layers | {"vocab_size": len(tokenizer), "max_position_embeddings": 12}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = layers | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        for parameter in model.parameters():  # CLIP's initial weights are too small to tell inputs apart
            parameter.data.normal_(0, 0.3)
        model.text_projection.weight.data.neg_()  # with this seed the cosines are positive
    model.save_pretrained(path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a T5 of random weights, 40 wide, and its tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    from tests.unigram import save_unigram

    path = tmp_path_factory.mktemp("t5") / "tiny-t5"
    vocabulary = save_unigram(path, ["a red circle above a blue square", "a blue circle", "a red square"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = T5Config(vocab_size=vocabulary, d_model=40, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        model = T5ForConditionalGeneration(config)
        for parameter in model.parameters():  # T5's initial weights are too small to tell inputs apart
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DINOv2 of random weights and its image processor: 32 px, centre 28 px."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    path = tmp_path_factory.mktemp("dinov2") / "tiny-dinov2"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=42, initializer_range=0.5
        )
        Dinov2Model(config).save_pretrained(path)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in the layout of FID's Inception."""
    from ldm.networks.inception import Conv, InceptionV3

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state: dict[str, torch.Tensor] = {}
        for name, conv in InceptionV3().named_modules():
            if isinstance(conv, Conv):
                state[f"{name}.conv.weight"] = conv.weight.data * 3.0  # ReLUs would else leave next to nothing
                for kind, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                    state[f"{name}.bn.{kind}"] = torch.full((conv.out_channels,), value)
    torch.save(state, path)
    return path
