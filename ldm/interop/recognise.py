"""What a single file holds, from its tensors' names and shapes."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.conditioning.micro import MicroConditioner
from ldm.errors import UserError
from ldm.interop import nodes
from ldm.interop.diffusers_config import one_or_each
from ldm.interop.nodes import Node, readable
from ldm.interop.package import part_of
from ldm.networks.unet import UNet

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
SDXL_TEXT: dict[str, Any] = {"layer": -2, "final_norm": False}  # which states SDXL takes of its text encoders
VIT_H = (1024, 24)  # width and layers of OpenCLIP ViT-H, of which SD 2 uses all but the last
CUT = "is cut or of another kind"


def refuse_adapters(names: list[str], origin: str) -> None:
    """UserError where these are the names of a LoRA, a ControlNet or another part that is trained on top of a model."""
    if part := _first(ADAPTERS, names):
        raise UserError(
            f"{origin} holds {part[0]} ({part[1]}), which is trained on top of a model and is not a model by itself; "
            "give the file of the model"
        )


def unknown(names: list[str], origin: str) -> UserError:
    """The error for a file that is neither a model nor a first stage."""
    if part := _first(PARTS, names):
        return UserError(
            f"{origin} holds {part[0]} alone ({part[1]}); give the file of the whole model, or the diffusers folder "
            "that it is a part of"
        )
    return UserError(
        f"{origin} is not a model that is known here: it has neither a UNet ({UNET}*) nor a first stage (encoder.*, "
        f"decoder.*) in CompVis' or sgm's layout; its tensors begin with {', '.join(sorted(names)[:3]) or 'nothing'}"
    )


def _first(kinds: Mapping[str, str], names: list[str]) -> tuple[str, str] | None:
    """The first of the kinds whose pattern a name has, and that name."""
    matches = ((kind, name) for kind, pattern in kinds.items() for name in names if re.search(pattern, name))
    return next(matches, None)


def unet_node(state: State, origin: str) -> Node:
    """The UNet's node from CompVis' names (without prefix); UserError where it is not a UNet with transformers."""
    with readable(f"the UNet in {origin} {CUT}"):
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
        projection = next(
            (name for name in state if name.endswith(".1.proj_in.weight")), "input_blocks.1.1.proj_in.weight"
        )
        linear = state[projection].ndim == 2
        return nodes.node(
            UNet,
            in_channels=first.shape[1],
            out_channels=state["out.2.weight"].shape[0],
            model_channels=width,
            channel_mult=[level[0][0] // width for level in levels],
            num_res_blocks=one_or_each([len(level) for level in levels]),
            attention_levels=attended,
            num_heads=None if linear else 8,
            head_channels=HEAD_channels if linear else None,
            context_dim=contexts.most_common(1)[0][0],  # a damaged one is then named in the error
            transformer_depth=one_or_each(depths),
            use_linear_projection=linear,
            vector_dim=state["label_emb.0.0.weight"].shape[1] if "label_emb.0.0.weight" in state else None,
        )


def _depth(state: State, prefix: str) -> int | None:
    """How many transformer blocks there are under a prefix; None where there is no transformer."""
    pattern = re.compile(re.escape(prefix) + r"transformer_blocks\.(\d+)\.")
    blocks = {int(match[1]) for name in state if (match := pattern.match(name))}
    return len(blocks) or None


def first_stage_node(state: State, origin: str) -> Node:
    """The first stage's node from CompVis' names (without prefix)."""
    with readable(f"the first stage in {origin} {CUT}"):
        first, deepest = state["encoder.conv_in.weight"], state["decoder.conv_in.weight"]
        channels, levels = first.shape[0], _count(state, r"encoder\.down\.(\d+)\.")
        widths = [state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
        shared = {
            "channels": channels,
            "channel_mult": [width // channels for width in widths],
            "num_res_blocks": one_or_each(
                [_count(state, rf"encoder\.down\.{i}\.block\.(\d+)\.") for i in range(levels)]
            ),
            "mid_attention": "encoder.mid.attn_1.q.weight" in state,
            "attention_levels": [f"encoder.down.{i}.attn.0.q.weight" in state for i in range(levels)],
            "groups": 32,
        }
        book, quant = state.get("quantize.embedding.weight"), state.get("post_quant_conv.weight")
        ends = {part: state[f"{part}.conv_out.weight"].shape[0] for part in ("encoder", "decoder")}
        return nodes.first_stage(
            {**shared, "in_channels": first.shape[1], "out_channels": ends["encoder"]},
            {**shared, "in_channels": deepest.shape[1], "out_channels": ends["decoder"]},
            deepest.shape[1] if quant is None else quant.shape[1],
            quant is not None,
            None if book is None else book.shape[0],
        )


def _count(state: State, pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def clip_text(state: State, origin: str, **options: Any) -> Node:
    """A text encoder's node from transformers' names (without `text_model.`), with options of TextConditioner."""
    with readable(f"the text encoder in {origin} {CUT}"):
        encoder = _text_sizes(
            state["embeddings.token_embedding.weight"],
            state["embeddings.position_embedding.weight"],
            state["encoder.layers.0.mlp.fc1.weight"],
            _count(state, r"encoder\.layers\.(\d+)\."),
            origin,
        )
        return nodes.text_conditioner({**encoder, "act": "quick_gelu"}, **options)


def open_clip_text(state: State, origin: str, projected: bool = True, unused_layers: int = 0, **options: Any) -> Node:
    """A text encoder's node from OpenCLIP's names; its last `unused_layers` layers are left out."""
    with readable(f"the text encoder in {origin} {CUT}"):
        encoder = _text_sizes(
            state["token_embedding.weight"],
            state["positional_embedding"],
            state["transformer.resblocks.0.mlp.c_fc.weight"],
            _count(state, r"transformer\.resblocks\.(\d+)\.") - unused_layers,
            origin,
        )
        dim = state["text_projection"].shape[1] if projected else None
        return nodes.text_conditioner({**encoder, "act": "gelu"}, dim, pooled=projected, **options)


def _text_sizes(tokens: Tensor, positions: Tensor, inner: Tensor, layers: int, origin: str) -> dict[str, Any]:
    vocab, width = tokens.shape
    if width % HEAD_channels:
        raise UserError(
            f"the text encoder in {origin} is {width} wide, which does not split into CLIP's heads of "
            f"{HEAD_channels}, and the file does not say otherwise; convert from the folder that it was made of"
        )
    return {
        "hidden_size": width,
        "layers": layers,
        "heads": width // HEAD_channels,
        "intermediate": inner.shape[0],
        "vocab": vocab,
        "max_position": positions.shape[0],
        "bos": vocab - 2,
        "eos": vocab - 1,
        "pad": vocab - 1,
    }


# ---------------------------------------------------------------------------------------------------- conditioners


def conditioner_nodes(tensors: State, origin: str) -> tuple[list[Node], tuple[str, ...]]:
    """The text encoders' and the numbers' nodes, and the beginnings of the tensors' names that are not used."""
    if clip := part_of(tensors, "conditioner.embedders.0.transformer.text_model."):
        big = part_of(tensors, "conditioner.embedders.1.model.")
        first = clip_text(clip, origin, **SDXL_TEXT, zero_empty_embedding=True)
        second = open_clip_text(big, origin, **SDXL_TEXT, zero_empty_embedding=True)
        return [first, second, *micro_conditioners("target_size")], ()
    if big := part_of(tensors, "conditioner.embedders.0.model."):
        return [open_clip_text(big, origin, **SDXL_TEXT), *micro_conditioners("aesthetic_score")], ()
    if tower := part_of(tensors, "cond_stage_model.model."):
        text, unused = sd2_text(tower, origin)
        return [text], unused
    if clip := part_of(tensors, "cond_stage_model.transformer.text_model."):
        return [clip_text(clip, origin)], ()
    raise UserError(
        f"{origin} holds a UNet without a text encoder that is known here (conditioner.embedders.*, "
        "cond_stage_model.model.*, cond_stage_model.transformer.text_model.*): give the whole model"
    )


def micro_conditioners(last: str, size: tuple[int, int] = (1024, 1024), channels: int = 256) -> list[Node]:
    """SDXL's numbers, the `last` of which is target_size, or aesthetic_score in the refiner; `size` in pixels."""
    defaults: dict[str, list[float]] = {"original_size": list(size), "crop": [0, 0], last: list(size)}
    if last == "aesthetic_score":
        defaults[last] = [6.0]
    options: dict[str, Any] = {} if channels == 256 else {"channels": channels}
    parts = [nodes.node(MicroConditioner, field=name, default=default, **options) for name, default in defaults.items()]
    if last == "aesthetic_score":
        parts[-1]["empty"] = [2.5]
    return parts


def sd2_text(tower: State, origin: str) -> tuple[Node, tuple[str, ...]]:
    """SD 2's text encoder in a file's OpenCLIP tower, and the beginnings of the names that it does not use.

    The published files have the whole tower, of which SD 2 uses all but the last layer; others leave that away, and
    the projection may be there with it or without.
    """
    whole = open_clip_text(tower, origin, False)["encoder"]
    is_vit_h = whole["hidden_size"] == VIT_H[0]
    complete = whole["layers"] == VIT_H[1] if is_vit_h else "text_projection" in tower
    text = open_clip_text(tower, origin, False, unused_layers=int(complete))
    prefix = "cond_stage_model.model."
    last = (f"{prefix}transformer.resblocks.{text['encoder']['layers']}.",) if complete else ()
    return text, (*last, f"{prefix}text_projection")
