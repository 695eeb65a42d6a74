"""Our model folder as a package, and a package as our model folder: the config node stands in its config.yaml."""

import inspect
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldm.conditioning.text import clip_text_for
from ldm.errors import UserError
from ldm.interop import nodes
from ldm.interop.model_folder import ModelFolder, write_model_folder
from ldm.interop.nodes import TOKENIZER, Node, readable
from ldm.interop.package import Package, Tokenizer
from ldm.interop.recognise import HEAD_channels
from ldm.interop.tokenizers import load_tokenizer, tokenizer_files, write_tokenizers

# ---------------------------------------------------------------------------------------------------- reading


def read_model_folder(folder: ModelFolder, weights: str = "ema") -> Package:
    """The model in one of our folders as it is, with whatever parts; UserError where the folder is damaged."""
    message = f"{folder.path} is damaged: its config.yaml is not the one of a model"
    try:
        config = yaml.safe_load(folder.config_text)
    except yaml.YAMLError as error:
        raise UserError(f"{message} ({error!r})") from error
    with readable(message):
        kept = {"model": config["model"]}
        tokenizers: list[Tokenizer] = []
        if folder.record["kind"] == "diffusion":
            kept |= {name: config[name] for name in ("sampling", "evaluation", "tokenizer_path") if name in config}
            kept["data"] = {"size": config["data"]["size"]}
            texts = nodes.texts(config["model"]).values()
            tokenizers = [_own_tokenizer(text["tokenizer"], config, folder) for text in texts]
    averaged = weights == "ema" and folder.averaged
    return Package(kept, folder.weights(weights), tokenizers, str(folder.path), averaged=averaged)


def _own_tokenizer(tokenizer: Node, config: Node, folder: ModelFolder) -> Tokenizer:
    """The files of a text encoder's tokenizer in the model folder; none where it comes from elsewhere."""
    if folder.tokenizer is None or _place(tokenizer)[0] != str(config.get("tokenizer_path")):
        return {}
    return tokenizer_files(folder.tokenizer / _place(tokenizer)[1])


def _place(tokenizer: Node) -> tuple[str, str]:
    """The folder or hub name that a tokenizer comes from, and the folder in that."""
    return str(tokenizer.get("name_or_path") or tokenizer.get("path")), str(tokenizer.get("subfolder") or "")


def portable(package: Package) -> Package:
    """The package as other formats can describe it: text encoders by their sizes, a tokenizer for each.

    UserError for parts that no other format has.
    """
    message = f"{package.origin} is damaged: its config.yaml is not the one of a model"
    with readable(message):
        nodes.require_counterparts(package.model)
        if package.kind == "first_stage":
            return package
        tokenizers = list(package.tokenizers)
        conditioners = nodes.conditioners(package.model)
        for i, (prefix, text) in enumerate(nodes.texts(package.model).items()):
            conditioners[prefix] = _text_by_sizes(text, package.part(prefix))
            if tokenizers and not tokenizers[i]:
                tokenizers[i] = load_tokenizer(*_place(text["tokenizer"]), text["tokenizer"].get("pad_token"))
        model = {**package.model, "conditioner": nodes.conditioner(list(conditioners.values()))}
        nodes.require_fitting(model, package.origin)
        size = package.config["data"]["size"]
        height, width = (size, size) if isinstance(size, int) else size
        config = nodes.model_config(model, (height, width), package.config.get("sampling"))
    return replace(package, config=config, tokenizers=tokenizers)


def _text_by_sizes(node: Node, state: Mapping[str, Tensor]) -> Node:
    """The node of a text encoder with its sizes, from its weights; the rest is the node's or its source's."""
    encoder = dict(node["encoder"])
    defaults = {name: p.default for name, p in inspect.signature(clip_text_for).parameters.items()}
    known = _source(encoder) if "name_or_path" in encoder else defaults | encoder
    vocab, width = state["encoder.embeddings.token_embedding.weight"].shape
    sizes = {
        "hidden_size": width,
        "layers": len({name.split(".")[3] for name in state if name.startswith("encoder.encoder.layers.")}),
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
    options = {name: value for name, value in node.items() if name not in ("_target_", "encoder", "projection")}
    return nodes.text_conditioner(sizes, None if projection is None else projection.shape[0], **options)


def _source(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder that a text encoder was loaded from says, where it is still there."""
    path = Path(encoder["name_or_path"]) / (encoder.get("subfolder") or "") / "config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text())
    config = config.get("text_config", config)
    names = {"num_attention_heads": "heads", "hidden_act": "act", "bos_token_id": "bos", "eos_token_id": "eos"}
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


# ---------------------------------------------------------------------------------------------------- writing


def write_own(package: Package, path: Path) -> None:
    """Writes a package as one of our model folders, all or nothing; it samples, is evaluated and trained on."""
    model = package.first_stage.model  # with the statistics of its weights
    if package.kind == "diffusion":
        model = {**package.model, "first_stage": model}
    config = {"name": "converted", **package.config, "model": model}
    record = {"experiment": "converted", "stage": "converted", "order": 0, "step": 0, "train_seconds": 0.0}
    record["kind"] = package.kind
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / TOKENIZER
        write_tokenizers(package.tokenizers, tokenizer)
        text = yaml.safe_dump(config, sort_keys=False)
        write_model_folder(path, record, text, package.state, None, tokenizer if package.tokenizers else None)
