"""Our model folder as a package, and a package as our model folder."""

import inspect
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm.conditioning.pretrained import tokenizer_from_pretrained
from ldm.conditioning.text import TextConditioner, clip_text_for
from ldm.errors import UserError
from ldm.interop.model_folder import ModelFolder, write_model_folder
from ldm.interop.package import Architecture, Package, Text, Tokenizer, part_of, require_fitting

Node = dict[str, Any]
TEXT, NUMBERS = "ldm.conditioning.text.TextConditioner", "ldm.conditioning.micro.MicroConditioner"
MASKED = "ldm.conditioning.image.MaskedImage"
COMPOSE, UNET = "ldm.conditioning.compose.Compose", "ldm.networks.unet.UNet"
TRAINING = {"_target_", "dropout", "gradient_checkpointing", "zero_init_residual"}  # of no meaning to a trained network
TOKENIZER = "tokenizer"  # the converted folder's tokenizer_path, which the loader replaces by the folder's place
SECOND = "second"  # the folder in it with the second text encoder's
HEAD_channels = 64

# ---------------------------------------------------------------------------------------------------- reading


def package_of(folder: ModelFolder, weights: str = "ema") -> Package:
    """The model in one of our folders; UserError for parts that no other tool has."""
    try:
        config = yaml.safe_load(folder.config_text)
        return _package_of(folder, config, weights)
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{folder.path} is damaged: its config.yaml is not the one of a model ({error!r})") from error


def _package_of(folder: ModelFolder, config: Node, weights: str) -> Package:
    state, averaged = folder.weights(weights), weights == "ema" and folder.averaged
    if folder.record["kind"] == "first_stage":
        known = Architecture(_first_stage_arguments(config["first_stage"]))
        state = {f"first_stage.{name}": tensor for name, tensor in state.items()}
        return Package(known, state, averaged=averaged)
    parts: Node = config["tasks"]["diffusion"]["latent_diffusion"]
    denoiser, conditioner = parts["denoiser"], parts["conditioner"]
    _expect(denoiser["network"], UNET)
    nodes = [conditioner]
    if conditioner["_target_"] == COMPOSE:
        nodes = list(conditioner["conditioners"])
    texts: list[Text] = []
    tokenizers: list[Tokenizer] = []
    numbers: list[Node] = []
    masked = False
    for i, node in enumerate(nodes):
        prefix = "conditioner." if nodes == [conditioner] else f"conditioner.conditioners.{i}."
        if node["_target_"] == TEXT:
            if i != len(texts):
                raise UserError("the text encoders have to stand before the others in conditioner.conditioners")
            texts.append(_text(node, part_of(state, prefix)))
            tokenizers.append(_tokenizer(node["tokenizer"], str(config.get("tokenizer_path")), folder))
        elif node["_target_"] == MASKED and node.get("mask_first", True) and texts:
            masked = True
        else:
            _expect(node, NUMBERS)
            numbers.append({name: value for name, value in node.items() if name != "_target_" and value is not None})
    size = config["data"]["size"]
    architecture = Architecture(
        _first_stage_arguments(parts["first_stage"]),
        {name: value for name, value in denoiser["network"].items() if name not in TRAINING},
        tuple(texts),
        tuple(numbers),
        _schedule(denoiser["schedule"]),
        denoiser["prediction"]["_target_"].rsplit(".", 1)[-1],
        (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        masked,
    )
    require_fitting(architecture, str(folder.path))
    return Package(architecture, state, tokenizers, averaged=averaged)


def _schedule(node: Node) -> Node:
    """`Architecture.schedule` of a schedule's node, and of the one that it is made of."""
    arguments = {name: _schedule(value) if isinstance(value, dict) else value for name, value in node.items()}
    kind = str(arguments.pop("_target_")).rsplit(".", 1)[-1]
    return {**arguments, "kind": kind}


def _expect(node: Mapping[str, Any], target: str) -> None:
    if node["_target_"] != target:
        raise UserError(f"a {node['_target_']} has no counterpart in other formats; there is one for {target}")


def _first_stage_arguments(node: Node) -> dict[str, Any]:
    regularizer = node["regularizer"]
    book = {name: regularizer[name] for name in ("entries", "channels")} if "entries" in regularizer else None
    return {
        "encoder": {name: value for name, value in node["encoder"].items() if name not in TRAINING},
        "decoder": {name: value for name, value in node["decoder"].items() if name not in TRAINING},
        "codebook": book,
        "latent_channels": node["latent_channels"],
        "quant_conv": node.get("quant_conv", True),
    }


def _text(node: Node, state: Mapping[str, Tensor]) -> Text:
    """The text encoder of a conditioner's node: sizes from its weights, the rest from the node or its source."""
    options = {name: p.default for name, p in inspect.signature(TextConditioner).parameters.items()} | node
    if options["mask"]:
        raise UserError("a text conditioner with mask=true has no counterpart: other tools attend to the padding too")
    encoder = dict(node["encoder"])
    defaults = {name: p.default for name, p in inspect.signature(clip_text_for).parameters.items()}
    known = _source(encoder) if "name_or_path" in encoder else defaults | encoder
    tokens = state["encoder.embeddings.token_embedding.weight"]
    vocab, width = tokens.shape
    layers = {name.split(".")[3] for name in state if name.startswith("encoder.encoder.layers.")}
    config = {
        "hidden_size": width,
        "layers": len(layers),
        "heads": known.get("heads") or width // HEAD_channels,
        "intermediate": state["encoder.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "vocab": vocab,
        "max_position": state["encoder.embeddings.position_embedding.weight"].shape[0],
        "act": known.get("act") or ("quick_gelu" if width == 768 else "gelu"),
        "bos": known.get("bos", vocab - 2),
        "eos": known.get("eos", vocab - 1),
        "pad": known.get("pad", vocab - 1),
    }
    projection = state.get("projection.weight")
    names = ("layer", "final_norm", "pooled", "max_length", "zero_empty_embedding")
    taken = {name: options[name] for name in names}
    return Text(config, None if projection is None else projection.shape[0], **taken)


def _source(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder that a text encoder was loaded from says, where it is still there."""
    path = Path(encoder["name_or_path"]) / (encoder.get("subfolder") or "") / "config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text())
    config = config.get("text_config", config)
    names = {"num_attention_heads": "heads", "hidden_act": "act", "bos_token_id": "bos", "eos_token_id": "eos"}
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def _tokenizer(node: Node, own: str, folder: ModelFolder) -> Tokenizer:
    name = str(node.get("name_or_path") or node.get("path"))
    subfolder = str(node.get("subfolder") or "")
    if name == own and folder.tokenizer is not None:
        return tokenizer_files(folder.tokenizer / subfolder)
    return load_tokenizer(name, subfolder, node.get("pad_token"))


def tokenizer_files(folder: Path) -> Tokenizer:
    """The text files of a tokenizer's folder by name."""
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.suffix in (".json", ".txt")}


def vocabulary(files: Tokenizer) -> dict[str, int]:
    """The numbers of a tokenizer's tokens, those aside that were added to it."""
    if "vocab.json" in files:
        return dict(json.loads(files["vocab.json"]))
    return dict(json.loads(files["tokenizer.json"])["model"]["vocab"])


def load_tokenizer(
    name_or_path: str, subfolder: str = "", pad: str | None = None, most: int | None = None
) -> Tokenizer:
    """A tokenizer's files, from a folder or of a hub name; `pad` is another padding token.

    UserError where it has more than `most` tokens, those that a text encoder knows.
    """
    tokenizer = tokenizer_from_pretrained(name_or_path, subfolder)
    if most is not None and len(tokenizer) > most:
        raise UserError(
            f"the tokenizer {name_or_path} has {len(tokenizer)} tokens, the text encoder knows {most}: they are not of "
            "one model; give --tokenizer FOLDER"
        )
    if pad is not None:
        tokenizer.pad_token = pad
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return tokenizer_files(Path(folder))


# ---------------------------------------------------------------------------------------------------- writing


def write_own(package: Package, path: Path) -> None:
    """Writes a package as one of our model folders, all or nothing; it samples, is evaluated and trained on."""
    architecture = package.architecture
    config: Node = {"name": "converted", "first_stage": first_stage_node(package)}
    state = package.state
    if architecture.network is None:
        state = package.part("first_stage.")
        config["task"] = "first_stage"
    else:
        config |= {
            "task": "diffusion",
            "tokenizer_path": TOKENIZER,
            "data": {"size": list(architecture.size)},
            "evaluation": {"sets": {}, "metrics": []},
            "network": {"_target_": UNET, **architecture.network},
            "conditioner": _conditioner_node(architecture),
            "schedule": _schedule_node(architecture.schedule),
            "prediction": {"_target_": f"ldm.diffusion.prediction.{architecture.prediction}"},
        }
        config["tasks"] = {"diffusion": {"latent_diffusion": _model_node(config)}}
    record = {"experiment": "converted", "stage": "converted", "order": 0, "step": 0, "train_seconds": 0.0}
    record["kind"] = package.kind
    text = yaml.safe_dump(config, sort_keys=False)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / TOKENIZER
        for i, files in enumerate(package.tokenizers):
            folder = tokenizer / SECOND if i else tokenizer
            folder.mkdir(parents=True)
            for name, content in files.items():
                (folder / name).write_text(content)
        write_model_folder(path, record, text, state, None, tokenizer if package.tokenizers else None)


def _model_node(config: Node) -> Node:
    return {
        "_target_": "ldm.latent_diffusion.LatentDiffusion",
        "denoiser": {
            "_target_": "ldm.diffusion.denoiser.Denoiser",
            **{name: config[name] for name in ("network", "schedule", "prediction")},
        },
        "conditioner": config["conditioner"],
        "first_stage": config["first_stage"],
    }


def _schedule_node(schedule: Mapping[str, Any]) -> Node:
    arguments = {name: _schedule_node(v) if isinstance(v, dict) else v for name, v in schedule.items()}
    return {"_target_": f"ldm.diffusion.schedule.{arguments.pop('kind')}", **arguments}


def first_stage_node(package: Package) -> Node:
    """The configuration of a package's first stage."""
    arguments = package.architecture.first_stage
    regularizer: Node = {"_target_": "ldm.first_stage.regularizer.KLRegularizer"}
    if arguments["codebook"]:
        regularizer = {"_target_": "ldm.first_stage.regularizer.VQRegularizer", **arguments["codebook"]}
    return {
        "_target_": "ldm.first_stage.autoencoder.FirstStage",
        "latent_channels": arguments["latent_channels"],
        "quant_conv": arguments["quant_conv"],
        "latent_mean": package.state["first_stage.latent_mean"].to(torch.float64).tolist(),
        "latent_std": package.state["first_stage.latent_std"].to(torch.float64).tolist(),
        "encoder": {"_target_": "ldm.networks.autoencoder.Encoder", **arguments["encoder"]},
        "regularizer": regularizer,
        "decoder": {"_target_": "ldm.networks.autoencoder.Decoder", **arguments["decoder"]},
    }


def _conditioner_node(architecture: Architecture) -> Node:
    nodes: list[Node] = []
    for i, text in enumerate(architecture.texts):
        load = "ldm.conditioning.pretrained.tokenizer_from_pretrained"
        tokenizer: Node = {"_target_": load, "name_or_path": TOKENIZER}
        node: Node = {
            "_target_": TEXT,
            "dropout": 0.1,
            "frozen": True,
            "max_length": text.max_length,
            "layer": text.layer,
            "final_norm": text.final_norm,
            "pooled": text.pooled,
            "zero_empty_embedding": text.zero_empty_embedding,
            "encoder": {"_target_": "ldm.conditioning.text.clip_text_from_config", **text.config},
            "tokenizer": {**tokenizer, "subfolder": SECOND} if i else tokenizer,
        }
        if text.projection_dim is not None:
            projection = {"hidden_size": text.config["hidden_size"], "projection_dim": text.projection_dim}
            node["projection"] = {"_target_": "ldm.conditioning.text.clip_projection", **projection}
        nodes.append(node)
    nodes += [{"_target_": NUMBERS, **numbers} for numbers in architecture.numbers]
    nodes += [{"_target_": MASKED, "mask_first": True}] if architecture.masked else []
    return nodes[0] if len(nodes) == 1 else {"_target_": COMPOSE, "conditioners": nodes}
