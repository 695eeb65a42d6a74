"""Text encoders and tokenizers from a folder or the hub."""

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ldm.errors import UserError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WEIGHTS = "config.json, model.safetensors"
TOKENIZER = "tokenizer_config.json and tokenizer.json, or vocab.json and merges.txt"


def text_encoder_from_pretrained(name_or_path: str, subfolder: str = "", clip_skip: int = 0) -> "PreTrainedModel":
    """The text encoder in a folder (or of a hub name); `subfolder` is "text_encoder" in a diffusers folder.

    Of a whole CLIP its text half, of T5 and UMT5 the encoder half, else transformers' base model (BERT, Gemma, ...).
    The last `clip_skip` layers are left out: SD 2 uses 23 of OpenCLIP ViT-H's 24. Raises UserError where it cannot
    be loaded, has weights missing, or has no more layers than that.
    """
    from transformers import (
        MODEL_FOR_TEXT_ENCODING_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForTextEncoding,
        CLIPConfig,
        CLIPTextModel,
    )

    try:
        config = AutoConfig.from_pretrained(name_or_path, subfolder=subfolder)
        family: Any = CLIPTextModel if isinstance(config, CLIPConfig) else AutoModel
        if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
            family = AutoModelForTextEncoding
        encoder, info = family.from_pretrained(name_or_path, subfolder=subfolder, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise _not_loaded("text encoder", name_or_path, subfolder, WEIGHTS) from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))  # which is not used
    if missing:
        raise UserError(f"the text encoder at {name_or_path!r} has weights missing: {listed(missing)}")
    layers = encoder.config.get_text_config().num_hidden_layers
    if not 0 <= clip_skip < layers:
        raise UserError(f"clip_skip={clip_skip}: the text encoder at {name_or_path!r} has {layers} layers, keep one")
    if clip_skip:
        blocks = next(m for m in encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
        del blocks[layers - clip_skip :]
        encoder.config.get_text_config().num_hidden_layers = layers - clip_skip
    return cast("PreTrainedModel", encoder)


def clip_projection_from_pretrained(name_or_path: str, subfolder: str = "") -> nn.Linear:
    """The linear map of the pooled state in a text encoder's folder (or of a hub name); UserError without one."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    files = f"{WEIGHTS} with a text_projection"
    try:
        # of a whole CLIP the width stands outside of text_config, where transformers does not look (#25622)
        config, _ = CLIPTextConfig.get_config_dict(name_or_path, subfolder=subfolder)
        loaded: Any = CLIPTextModelWithProjection.from_pretrained(
            name_or_path,
            subfolder=subfolder,
            projection_dim=int(config.get("projection_dim", 512)),
            output_loading_info=True,
        )
        encoder, info = loaded
    except (OSError, ValueError) as error:
        raise _not_loaded("text encoder", name_or_path, subfolder, files) from error
    if any("text_projection" in name for name in info["missing_keys"]):
        raise _not_loaded("text encoder with a projection", name_or_path, subfolder, files)
    return cast(nn.Linear, encoder.text_projection)


def tokenizer_from_pretrained(
    name_or_path: str, subfolder: str = "", pad_token: str | None = None
) -> "PreTrainedTokenizerFast":
    """The tokenizer in a folder (or of a hub name); `subfolder` is "tokenizer" in a diffusers folder.

    `pad_token` replaces its padding token: OpenCLIP's is "!". Raises UserError where it cannot be loaded.
    """
    from transformers import AutoTokenizer, CLIPTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, subfolder=subfolder)
    except (OSError, ValueError, TypeError, KeyError):
        try:  # CLIP's older folders have no configuration
            tokenizer = CLIPTokenizer.from_pretrained(name_or_path, subfolder=subfolder)
        except (OSError, ValueError, TypeError) as error:
            raise _not_loaded("tokenizer", name_or_path, subfolder, TOKENIZER) from error
    vocabulary = tokenizer.get_vocab()
    # where transformers 5 finds no files it makes a tokenizer of special tokens, and at most one more
    if len(vocabulary.keys() - tokenizer.added_tokens_encoder.keys()) <= 1:
        raise _not_loaded("tokenizer", name_or_path, subfolder, TOKENIZER)
    if pad_token is not None:
        if pad_token not in vocabulary:
            raise UserError(f"pad_token={pad_token!r}: the tokenizer has no such token")
        tokenizer.pad_token = pad_token
    return cast("PreTrainedTokenizerFast", tokenizer)


def _not_loaded(part: str, name: str, subfolder: str, files: str) -> UserError:
    place = f"{name}/{subfolder}" if subfolder else name
    return UserError(
        f"no {part} at {place!r}: it is neither a folder with {files}, nor could it be downloaded from the "
        "hub under that name (is this machine offline, or HF_HUB_OFFLINE set?). On a machine with a "
        f"network run `hf download {name} --local-dir FOLDER`, and give FOLDER as the path"
    )
