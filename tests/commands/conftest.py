"""Model folders of tiny models with random weights, one for each kind of input."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torch import nn

from ldm.config.check import build
from ldm.interop.model_folder import write_model_folder

FIRST_STAGE = {
    "_target_": "ldm.first_stage.autoencoder.FirstStage",
    "latent_channels": 4,
    "encoder": {"_target_": "ldm.networks.autoencoder.Encoder", "in_channels": 3, "channels": 8,
                "channel_mult": [1, 1, 1], "num_res_blocks": 1, "out_channels": 8, "groups": 4},
    "regularizer": {"_target_": "ldm.first_stage.regularizer.KLRegularizer"},
    "decoder": {"_target_": "ldm.networks.autoencoder.Decoder", "in_channels": 4, "channels": 8,
                "channel_mult": [1, 1, 1], "num_res_blocks": 1, "out_channels": 3, "groups": 4},
}  # fmt: skip
CONDITIONERS = {
    "class": {"_target_": "ldm.conditioning.classes.ClassConditioner", "num_classes": 4, "dim": 8, "field": "label",
              "dropout": 0.1},
    "none": {"_target_": "ldm.conditioning.compose.Unconditional"},
    "low_resolution": {"_target_": "ldm.conditioning.image.LowResolution"},
    "masked_image": {"_target_": "ldm.conditioning.image.MaskedImage"},
}  # fmt: skip
IN_CHANNELS = {"low_resolution": 7, "masked_image": 9}
PARTS = {
    "v": ("ldm.diffusion.schedule.ScaledLinear", "ldm.diffusion.prediction.V"),
    "flow": ("ldm.diffusion.schedule.RectifiedFlow", "ldm.diffusion.prediction.Flow"),
    "edm": ("ldm.diffusion.schedule.VarianceExploding", "ldm.diffusion.prediction.EDM"),
}
SAMPLING = {
    "sampler": {"_target_": "ldm.sampling.ddim.DDIM", "eta": 0.0},
    "grid": {"_target_": "ldm.sampling.grid.Trailing"},
    "guidance": {"_target_": "ldm.sampling.guidance.ClassifierFree"},
    "steps": 4,
    "guidance_scale": 2.0,
}


def model_config(conditioner: str = "class", prediction: str = "v") -> dict[str, Any]:
    """The config.yaml of a tiny model, 32 px with latents of a quarter."""
    network = {"_target_": "ldm.networks.unet.UNet", "in_channels": IN_CHANNELS.get(conditioner, 4),
               "out_channels": 4, "model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1,
               "attention_levels": [False, True], "head_channels": 16, "groups": 8,
               "context_dim": 8 if conditioner == "class" else None}  # fmt: skip
    schedule, target = PARTS[prediction]
    model = {
        "_target_": "ldm.latent_diffusion.LatentDiffusion",
        "denoiser": {
            "_target_": "ldm.diffusion.denoiser.Denoiser",
            "network": network,
            "schedule": {"_target_": schedule},
            "prediction": {"_target_": target},
        },
        "conditioner": CONDITIONERS[conditioner],
        "first_stage": FIRST_STAGE,
    }
    return {"data": {"size": 32}, "tokenizer_path": "tokenizer", "model": model, "sampling": SAMPLING}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the model folder of a tiny model, once for each `conditioner` and `prediction`."""
    folders: dict[tuple[str, str], Path] = {}

    def write(conditioner: str = "class", prediction: str = "v") -> Path:
        key = conditioner, prediction
        if key not in folders:
            config = model_config(*key)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = build(OmegaConf.create(config["model"]))
                for parameter in model.denoiser.network.parameters():  # the initial zeros would ignore the condition
                    nn.init.normal_(parameter, 0.0, 0.1)
            folders[key] = tmp_path_factory.mktemp("model") / "model"
            record = {"kind": "diffusion", "order": 0, "stage": "base"}
            write_model_folder(folders[key], record, yaml.safe_dump(config), model.state_dict(), None, None)
        return folders[key]

    return write
