"""Where the weights to begin with come from: an earlier stage, a model of this project, or a file of another tool."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.conditioning.text import TextConditioner
from ldm.config.check import build
from ldm.errors import UserError, listed, nearest
from ldm.first_stage.autoencoder import FirstStage
from ldm.interop.convert import read
from ldm.interop.diffusers_folder import is_diffusers
from ldm.interop.model_folder import ModelFolder, find_model_folder
from ldm.interop.own_folder import first_stage_node, tokenizer_files, vocabulary
from ldm.interop.package import Tokenizer, part_of
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.frozen import note_origin
from ldm.training.module import TrainingModule

log = logging.getLogger(__name__)

PARTS = {"network": "denoiser.network", "conditioner": "conditioner", "first_stage": "first_stage"}
"""What init_parts may name, and where it stands in a latent diffusion model."""
STATISTICS = ("latent_mean", "latent_std")


@dataclass(frozen=True)
class Weights:
    """A model's state by our names, where it was read, and its first stage's configuration.

    latents_told   whether its source says what its latents are normalised by
    prediction     the class's name of what its network predicts; "" of a first stage alone
    tokenizers     the files of its own ones
    """

    state: dict[str, Tensor]
    origin: str
    first_stage: dict[str, Any]
    latents_told: bool = True
    prediction: str = ""
    tokenizers: Sequence[Tokenizer] = ()


def weights_of(given: str, models: Mapping[str, Path], knob: str, kind: str) -> Weights:
    """The weights meant by a knob: of a finished stage, by its name, or at a path, of any format that can be read.

    `kind` is "first_stage" (the state is the first stage's alone) or "diffusion". UserError where there is none.
    """
    path = models.get(given, Path(given))
    if not path.exists():
        raise UserError(
            f"{knob}={given}: that stage is not finished in this run, and no such path exists; run it first (add it "
            f"to stages), or give the path of a finished one ({knob}=outputs/NAME/TIME/STAGE), a diffusers folder or "
            "a .safetensors file"
        )
    if not path.is_file() and not is_diffusers(path):
        return _of_model_folder(path, kind)
    package = read(path)
    for note in package.notes:
        log.warning("%s=%s: %s", knob, given, note)
    node, predicted = first_stage_node(package), package.architecture.prediction
    if kind == "first_stage":
        return Weights(package.part("first_stage."), str(path), node, package.latents_told)
    if package.kind != kind:
        raise UserError(f"{knob}={given}: it holds a first stage alone; give it as first_stage_from={given}")
    return Weights(package.state, str(path), node, prediction=predicted, tokenizers=package.tokenizers)


def _of_model_folder(path: Path, kind: str) -> Weights:
    """The weights in a model folder of ours; a first stage may be the one inside a latent diffusion model."""
    folder = _first_stage_folder(path) if kind == "first_stage" else find_model_folder(path, kind)
    folder.verify()
    config, state = cast(DictConfig, OmegaConf.create(folder.config_text)), folder.weights("ema")
    node = cast(dict[str, Any], OmegaConf.to_container(config.first_stage))
    if kind != "first_stage":
        own = [tokenizer_files(folder.tokenizer)] if folder.tokenizer is not None else []
        return Weights(state, str(folder.path), node, prediction=_predicted(config), tokenizers=own)
    if folder.record["kind"] != kind:
        state = part_of(state, "first_stage.")
    return Weights(state, str(folder.path), node)


def _first_stage_folder(path: Path) -> ModelFolder:
    try:
        return find_model_folder(path, "first_stage")
    except UserError:
        with suppress(UserError):
            return find_model_folder(path, "diffusion")
        raise


def _predicted(config: DictConfig) -> str:
    """The class's name of the prediction in a second stage's configuration."""
    return str(config.prediction._target_).rsplit(".", 1)[-1]


# ------------------------------------------------------------------------------------------------- first stage


def inherit_first_stage(config: DictConfig, models: Mapping[str, Path]) -> Weights | None:
    """Takes the first stage's architecture from the model that it will be loaded from."""
    if config.first_stage_from is None:
        return None
    source = _first_stage_of(config, models)
    config.first_stage = OmegaConf.create(source.first_stage)
    return source


def load_first_stage(config: DictConfig) -> FirstStage:
    """The first stage that a second stage will train on, from `first_stage_from` or, failing that, `init_from`."""
    if config.first_stage_from is not None:
        source = _first_stage_of(config, {})
    elif config.init_from is not None:
        source = weights_of(config.init_from, {}, "init_from", "first_stage")
    else:
        raise UserError("first_stage_from: not given; the path of a finished first stage is needed")
    first_stage = cast(FirstStage, build(OmegaConf.create(source.first_stage), "first_stage"))
    load_strictly(first_stage, source.state, source.origin)
    return first_stage.eval().requires_grad_(False)


def _first_stage_of(config: DictConfig, models: Mapping[str, Path]) -> Weights:
    """What first_stage_from names. Where its file does not tell the latents' statistics, they are those of the
    trained network beside it (init_from), else the configured ones."""
    source = weights_of(config.first_stage_from, models, "first_stage_from", "first_stage")
    if source.latents_told:
        return source
    given, channels = config.init_from, len(source.state["latent_mean"])
    known = {name: config.first_stage.get(name, source.first_stage[name]) for name in STATISTICS}
    teller = "configured (first_stage.latent_mean, first_stage.latent_std)"
    if given is not None and _takes(config, "network") and (given in models or Path(given).exists()):
        trained = weights_of(given, models, "init_from", "diffusion")
        known = {name: trained.state[f"first_stage.{name}"].tolist() for name in STATISTICS}
        teller = f"of {trained.origin}"
    values = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in known.items()}
    if any(value.ndim and len(value) != channels for value in values.values()):
        return source  # beside a network of other latents, which is refused when it is loaded
    values = {name: value.expand(channels).clone() for name, value in values.items()}
    log.warning(
        "%s does not say what its latents are normalised by: taken are the values %s, mean %s, std %s",
        source.origin, teller, *(_told(value) for value in values.values()),
    )  # fmt: skip
    node = source.first_stage | {name: value.tolist() for name, value in values.items()}
    return replace(source, state=source.state | values, first_stage=node)


# ---------------------------------------------------------------------------------------------------- loading


def load_weights(
    config: DictConfig, module: TrainingModule, models: Mapping[str, Path], first_stage: Weights | None
) -> None:
    """Loads what first_stage_from and init_from name, of the latter the parts in init_parts; says what came whence.

    UserError where the weights do not fit, or were trained on latents of other statistics.
    """
    model = module.export_module
    _check_parts(config)
    if first_stage is not None:
        load_strictly(cast(LatentDiffusion, model).first_stage, first_stage.state, first_stage.origin)
        log.info("first_stage: from %s (first_stage_from)", first_stage.origin)
    if config.init_from is None:
        return
    source = weights_of(config.init_from, models, "init_from", module.kind)
    if module.kind == "first_stage":
        load_strictly(model, source.state, source.origin)
        return
    if _takes(config, "network"):
        if first_stage is not None:
            _check_latents(cast(LatentDiffusion, model).first_stage, first_stage.origin, source)
        _tell_prediction(source, _predicted(config))
    if _takes(config, "conditioner"):
        _check_tokens(cast(LatentDiffusion, model).conditioner, source)
    _load_parts(model, source, list(config.init_parts))


def _takes(config: DictConfig, part: str) -> bool:
    """Whether a part of the model, or a part of that, comes from init_from."""
    return any(str(name).split(".")[0] == part for name in config.init_parts or [])


def _check_parts(config: DictConfig) -> None:
    """UserError for init_parts that do not exist, or that leave open where the first stage comes from."""
    if config.init_parts is None:
        return
    parts, given = list(config.init_parts), config.first_stage_from
    if config.init_from is None:
        raise UserError(f"init_parts={parts}: these are the parts that a second stage takes from init_from")
    for name in parts:
        if str(name).split(".")[0] not in PARTS:
            raise UserError(f"init_parts: there is no part {name!r}; {nearest(str(name), PARTS)}")
    if _takes(config, "first_stage") == (given is not None):
        which = "neither names the" if given is None else "both name a"
        raise UserError(f"init_parts={parts}, first_stage_from={given}: {which} first stage; one of the two has to")


def _tell_prediction(source: Weights, wanted: str) -> None:
    if source.prediction != wanted:
        log.warning(
            "the network in %s predicts %s, this configuration trains it to predict %s (prediction=...)",
            source.origin, source.prediction, wanted,
        )  # fmt: skip


def _load_parts(model: nn.Module, source: Weights, parts: Sequence[str]) -> None:
    """Loads parts of a model (`network`, `conditioner.conditioners.0`) from a file; the others stay as they are."""
    places = ["".join([PARTS[name.split(".")[0]], *(f".{part}" for part in name.split(".")[1:])]) for name in parts]
    prefixes = tuple(f"{place}." for place in places)
    for name, prefix in zip(parts, prefixes, strict=True):
        if "." in name and not any(key.startswith(prefix) for key in source.state):
            raise UserError(f"init_parts: {source.origin} has no weights of {name!r}")
    chosen = {name: tensor for name, tensor in source.state.items() if name.startswith(prefixes)}
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}
    _load(model, chosen | kept, source.origin)
    for place in places:
        note_origin(model.get_submodule(place), source.origin)
    log.info("%s: from %s (init_from)", ", ".join(parts), source.origin)
    if any(
        name.startswith("conditioner.") and _differs(tensor, source.state.get(name)) for name, tensor in kept.items()
    ):
        log.warning("conditioner: its weights are as configured, not those of %s (init_parts)", source.origin)


def _differs(own: Tensor, other: Tensor | None) -> bool:
    return other is None or own.shape != other.shape or not torch.equal(own.cpu(), other.to(own.dtype))


def _check_tokens(conditioner: nn.Module, source: Weights) -> None:
    """UserError where a text encoder was trained with other numbers for the words than it would be given."""
    own = [part.tokenizer for part in conditioner.modules() if isinstance(part, TextConditioner)]
    if len(own) != len(source.tokenizers):
        return  # not all are its own; those of the hub are known by their names
    for tokenizer, files in zip(own, source.tokenizers, strict=True):
        now, then = tokenizer.get_vocab(), vocabulary(files)
        other = next((word for word in then if now.get(word, then[word]) != then[word]), None)
        if other is not None:
            raise UserError(
                f"the text encoder in {source.origin} was trained with another tokenizer ({other!r} is {then[other]} "
                f"there, {now[other]} here), so it would read other words. Give its tokenizer (tokenizer_path=FOLDER, "
                "or conditioner.tokenizer.name_or_path=FOLDER), or leave the conditioner out of init_parts"
            )


def _check_latents(first_stage: FirstStage, origin: str, trained: Weights) -> None:
    """Raises UserError where a network was trained on latents of other channels or statistics than these."""
    for name in ("latent_mean", "latent_std"):
        own, theirs = getattr(first_stage, name).cpu(), trained.state[f"first_stage.{name}"].cpu()
        if own.shape != theirs.shape:
            raise UserError(
                f"the network in {trained.origin} was trained on latents of {len(theirs)} channels, the first stage in "
                f"{origin} has {len(own)}: they do not fit. Train the network anew on it (init_from=null), or give "
                "the first stage that it was trained with"
            )
        if not torch.allclose(own, theirs, rtol=1e-2, atol=1e-2):
            raise UserError(
                f"the network in {trained.origin} was trained on latents whose {name} is "
                f"{_told(theirs)}, that of the first stage in {origin} is {_told(own)}: it would see other latents. "
                "Train it anew on them (init_from=null), or give the first stage that it was trained with"
            )


def _told(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values.tolist()) + "]"


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Loads a state; UserError that lists what is missing, unexpected or of another shape, and nothing is loaded."""
    _load(module, state, origin)
    note_origin(module, origin)


def _load(module: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own if name not in state]
    wrong += [f"unexpected {name}" for name in state if name not in own]
    wrong += [
        f"{name}: {list(state[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if wrong:
        raise UserError(f"the weights in {origin} don't fit the model: {listed(wrong)}")
    module.load_state_dict(state)
