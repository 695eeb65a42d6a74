"""The configuration of one stage of the curriculum."""

from typing import cast

from omegaconf import DictConfig, OmegaConf

from ldm.config.compose import names, parse
from ldm.errors import UserError, nearest


def stage_config(cfg: DictConfig, stage: str, overrides: list[str]) -> DictConfig:
    """The configuration of one stage: the root, then `curriculum.<stage>`, then the command line's own values.

    Raises UserError for a stage, or a knob of it, that does not exist.
    """
    if stage not in cfg.curriculum:
        raise UserError(f"stages: there is no stage {stage!r}; {nearest(stage, [str(s) for s in cfg.curriculum])}")
    root = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)))
    difference = root.pop("curriculum")[stage]
    known = set(names(root))
    for name in names(difference):
        parents = [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]
        inside_target = any(OmegaConf.select(root, f"{p}._target_") for p in parents)  # `check` knows better there
        if name not in known and not inside_target:
            raise UserError(f"curriculum.{stage}.{name}: there is no such knob; {nearest(name, known)}")
    merged = cast(DictConfig, OmegaConf.merge(root, difference))
    for override in parse(overrides):
        name = str(override.key_or_group)
        if (
            name in known
            and not name.startswith(("curriculum", "hydra"))
            and not isinstance(root.get(name), DictConfig)
        ):
            OmegaConf.update(merged, name, OmegaConf.select(cfg, name))
    merged.stage = stage
    return merged
