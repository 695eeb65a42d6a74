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
    from ldm.data import shapes

    out = tmp_path_factory.mktemp("shapes")
    shapes.main([str(out), "--train", "64", "--val", "16", "--size", "32", "--per-shard", "32"])
    return out
