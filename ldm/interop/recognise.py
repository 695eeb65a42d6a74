"""What a single file holds, from its tensors' names and shapes."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.interop.package import Text, one_or_each

State = Mapping[str, Tensor]
HEAD_channels = 64  # SD 2's, SDXL's and every CLIP's
ADAPTERS = {
    "a LoRA": r"(\.|_)lora(\.|_|[AB]\b)|^(lora|oft|lycoris)_|\.lora_[AB]\.|\.hada_w|\.lokr_|_lora\.",
    "a ControlNet": (
        r"^control_model\.|^input_hint_block\.|controlnet_cond_embedding|zero_convs?\.|controlnet_(down|mid)_block"
        r"|^lora_controlnet$|^lllite_"
    ),
    "a textual inversion": r"^(emb_params|string_to_(param|token)|clip_[lg]|<.+>)$",
    "a T2I-adapter": r"^(adapter\.)?body\.\d+\.",
    "an IP-adapter": r"^(image_proj|ip_adapter)(\.|$)",
    "motion modules": r"motion_modules\.",
}
PARTS = {
    "a UNet": r"^(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)\.",
    "a text encoder": r"^(text_model|transformer\.(resblocks|text_model)|token_embedding)\.",
}
UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."


def refuse_adapters(names: list[str], origin: str) -> None:
    """UserError where these are the names of a LoRA, a ControlNet or another part that is trained on top of a model."""
    if told := _first(ADAPTERS, names):
        raise UserError(
            f"{origin} holds {told[0]} ({told[1]}), which is trained on top of a model and is none by itself; "
            "give the file of the model"
        )


def unknown(names: list[str], origin: str) -> UserError:
    """The error for a file that is neither a model nor a first stage."""
    if told := _first(PARTS, names):
        return UserError(
            f"{origin} holds {told[0]} alone ({told[1]}); give the file of the whole model, or the diffusers folder "
            "that it is a part of"
        )
    return UserError(
        f"{origin} is no model that is known here: it has neither a UNet ({UNET}*) nor a first stage (encoder.*, "
        f"decoder.*) in CompVis' or sgm's layout; its tensors begin with {', '.join(sorted(names)[:3]) or 'nothing'}"
    )


def _first(kinds: Mapping[str, str], names: list[str]) -> tuple[str, str] | None:
    """The first of the kinds whose pattern a name has, and that name."""
    found = ((kind, name) for kind, pattern in kinds.items() for name in names if re.search(pattern, name))
    return next(found, None)


def network_arguments(state: State, origin: str) -> dict[str, Any]:
    """`UNet`'s arguments from CompVis' names (without prefix); UserError where it is no UNet with transformers."""
    try:
        return _network_arguments(state)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"the UNet in {origin} is cut or of another kind: it has no {error}") from error


def _network_arguments(state: State) -> dict[str, Any]:
    first = state["input_blocks.0.0.weight"]
    width = first.shape[0]
    levels: list[list[tuple[int, int | None]]] = [[]]  # of each block: its width, its transformer's depth
    number = 1
    while any(name.startswith(f"input_blocks.{number}.") for name in state):
        if f"input_blocks.{number}.0.op.weight" in state:
            levels.append([])
        else:
            out = state[f"input_blocks.{number}.0.in_layers.2.weight"].shape[0]
            levels[-1].append((out, _depth(state, f"input_blocks.{number}.1.")))
        number += 1
    attended = [level[0][1] is not None for level in levels]
    middle = _depth(state, "middle_block.1.")
    depths = [level[0][1] or (middle if i == len(levels) - 1 else 1) for i, level in enumerate(levels)]
    contexts = Counter(t.shape[1] for name, t in state.items() if re.search(r"attn2\.to_[kv]\.weight$", name))
    projection = next((name for name in state if name.endswith(".1.proj_in.weight")), "input_blocks.1.1.proj_in.weight")
    linear = state[projection].ndim == 2
    return {
        "in_channels": first.shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "model_channels": width,
        "channel_mult": [level[0][0] // width for level in levels],
        "num_res_blocks": one_or_each([len(level) for level in levels]),
        "attention_levels": attended,
        "num_heads": None if linear else 8,
        "head_channels": HEAD_channels if linear else None,
        "context_dim": contexts.most_common(1)[0][0],  # one that is damaged is then told by its name
        "transformer_depth": one_or_each(depths),
        "use_linear_projection": linear,
        "vector_dim": state["label_emb.0.0.weight"].shape[1] if "label_emb.0.0.weight" in state else None,
    }


def _depth(state: State, prefix: str) -> int | None:
    """How many transformer blocks there are under a prefix; None where there is no transformer."""
    pattern = re.compile(re.escape(prefix) + r"transformer_blocks\.(\d+)\.")
    found = {int(match[1]) for name in state if (match := pattern.match(name))}
    return len(found) or None


def first_stage_arguments(state: State, origin: str) -> dict[str, Any]:
    """`Architecture.first_stage` from CompVis' names (without prefix)."""
    try:
        return _first_stage_arguments(state)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"the first stage in {origin} is cut or of another kind: it has no {error}") from error


def _first_stage_arguments(state: State) -> dict[str, Any]:
    first, deepest = state["encoder.conv_in.weight"], state["decoder.conv_in.weight"]
    channels = first.shape[0]
    levels = _count(state, r"encoder\.down\.(\d+)\.")
    shared = {
        "channels": channels,
        "channel_mult": [state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] // channels for i in range(levels)],
        "num_res_blocks": one_or_each([_count(state, rf"encoder\.down\.{i}\.block\.(\d+)\.") for i in range(levels)]),
        "mid_attention": "encoder.mid.attn_1.q.weight" in state,
        "attention_levels": [f"encoder.down.{i}.attn.0.q.weight" in state for i in range(levels)],
        "groups": 32,
    }
    book = state.get("quantize.embedding.weight")
    quant = state.get("post_quant_conv.weight")
    ends = {part: state[f"{part}.conv_out.weight"].shape[0] for part in ("encoder", "decoder")}
    return {
        "encoder": shared | {"in_channels": first.shape[1], "out_channels": ends["encoder"]},
        "decoder": shared | {"in_channels": deepest.shape[1], "out_channels": ends["decoder"]},
        "codebook": None if book is None else {"entries": book.shape[0], "channels": book.shape[1]},
        "latent_channels": deepest.shape[1] if quant is None else quant.shape[1],
        "quant_conv": quant is not None,
    }


def _count(state: State, pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def clip_text(state: State, origin: str, **taken: Any) -> Text:
    """A text encoder from transformers' names (without `text_model.`)."""
    config = _text_config(
        state,
        origin,
        ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight"),
        (r"encoder\.layers\.(\d+)\.", "encoder.layers.0.mlp.fc1.weight"),
    )
    return Text({**config, "act": "quick_gelu"}, **taken)


def open_clip_text(state: State, origin: str, projected: bool, unused_layers: int = 0, **taken: Any) -> Text:
    """A text encoder from OpenCLIP's names; its last `unused_layers` layers are left out."""
    config = _text_config(
        state,
        origin,
        ("token_embedding.weight", "positional_embedding"),
        (r"transformer\.resblocks\.(\d+)\.", "transformer.resblocks.0.mlp.c_fc.weight"),
    )
    config |= {"act": "gelu", "layers": config["layers"] - unused_layers}
    if projected and "text_projection" not in state:
        raise UserError(f"the text encoder in {origin} is cut or of another kind: it has no 'text_projection'")
    return Text(config, state["text_projection"].shape[1] if projected else None, **taken)


def _text_config(state: State, origin: str, embeddings: tuple[str, str], layers: tuple[str, str]) -> dict[str, Any]:
    try:
        tokens, positions, inner = (state[name] for name in (*embeddings, layers[1]))
    except KeyError as error:
        raise UserError(f"the text encoder in {origin} is cut or of another kind: it has no {error}") from error
    vocab, width = tokens.shape
    if width % HEAD_channels:
        raise UserError(
            f"the text encoder in {origin} is {width} wide, which does not split into CLIP's heads of "
            f"{HEAD_channels}, and the file does not say otherwise; convert from the folder that it was made of"
        )
    return {
        "hidden_size": width,
        "layers": _count(state, layers[0]),
        "heads": width // HEAD_channels,
        "intermediate": inner.shape[0],
        "vocab": vocab,
        "max_position": positions.shape[0],
        "bos": vocab - 2,
        "eos": vocab - 1,
        "pad": vocab - 1,
    }
