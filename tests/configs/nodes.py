"""Shipped configurations, one part at a time."""

from omegaconf import DictConfig, OmegaConf

from ldm.config.compose import compose

SD1 = {"in_channels": 4, "out_channels": 4, "context_dim": 768, "vector_dim": None}  # what `auto` stands for there


def node(group: str, name: str) -> DictConfig:
    """A part of `experiment=sd1`; widths of a network that are `auto` are those of Stable Diffusion 1."""
    overrides = ["experiment=sd1", f"{group}={name}", "run_folder=nowhere", "tokenizer_path=nowhere"]
    chosen: DictConfig = compose("train", overrides)[group]
    OmegaConf.resolve(chosen)
    for width, value in SD1.items():
        if chosen.get(width) == "auto":
            chosen[width] = value
    return chosen
