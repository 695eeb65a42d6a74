"""Config nodes to and from the config.json files of a diffusers folder."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.prediction import X0, Epsilon, V
from ldm.diffusion.schedule import Linear, ScaledLinear, ZeroTerminalSNR
from ldm.errors import UserError
from ldm.first_stage.regularizer import VQRegularizer
from ldm.interop import nodes
from ldm.interop.nodes import Node, readable
from ldm.interop.package import Tokenizer
from ldm.interop.statistics import SD_FACTOR
from ldm.networks.attention import head_count
from ldm.networks.unet import UNet

Config = Mapping[str, Any]
SCHEDULES = {"scaled_linear": ScaledLinear, "linear": Linear}
PREDICTIONS = {"epsilon": Epsilon, "v_prediction": V, "sample": X0}
UNREADABLE = "is not readable as diffusers writes it"
# What a UNet of this project cannot be; what is not named in a file is the first value.
UNET_ALLOWED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "addition_embed_type": (None, "text_time"),
}
FIRST_STAGE_ALLOWED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL", "VQModel"),
    "act_fn": ("silu", "swish"),
    "lookup_from_codebook": (False,),
    "norm_type": ("group",),
}


def _groups(described: Node) -> int:
    """The one number of groups that all group norms have; UserError where they differ."""
    with torch.device("meta"):
        module = nodes.build(described)
    groups = {part.num_groups for part in module.modules() if isinstance(part, nn.GroupNorm)}
    if len(groups) != 1:
        raise UserError(
            f"the {nodes.class_name(described)}'s group norms have {sorted(groups)} groups; diffusers has one number "
            "for all"
        )
    return int(groups.pop())


def _block_types(attended: list[bool], names: tuple[str, str]) -> dict[str, list[str]]:
    """The names of the blocks with and without attention, down and up."""
    down = [names[0] if has else names[1] for has in attended]
    return {"down_block_types": down, "up_block_types": _mirrored(down)}


def _attention_levels(config: Config, names: tuple[str, str], origin: str) -> list[bool]:
    """Which levels have attention; UserError for blocks of other names, or where up is not the mirror of down."""
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    if not set(down) <= set(names) or up != _mirrored(down):
        raise UserError(f"{origin} has blocks {down} and {up}; expected {list(names)}, mirrored up")
    return [name == names[0] for name in down]


def _mirrored(down: list[str]) -> list[str]:
    return [name.replace("Down", "Up").replace("Encoder", "Decoder") for name in reversed(down)]


def one_or_each(values: list[Any]) -> Any:
    """A value that all have, else the list."""
    return values[0] if all(value == values[0] for value in values) else values


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count


# ------------------------------------------------------------------------------------------------------ UNet

UNET_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D")


def unet_config(model: Node, sample_size: int) -> dict[str, Any]:
    """config.json of `UNet2DConditionModel`; UserError where it has no such UNet."""
    network, numbers = nodes.arguments(model["denoiser"]["network"]), nodes.numbers(model)
    if network["use_scale_shift_norm"] or network["resblock_updown"] or network["context_dim"] is None:
        raise UserError(
            "diffusers' conditional UNet has neither use_scale_shift_norm nor resblock_updown, and needs tokens"
        )
    widths = [network["model_channels"] * mult for mult in network["channel_mult"]]
    heads = [head_count(width, network["num_heads"], network["head_channels"]) for width in widths]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": network["in_channels"],
        "out_channels": network["out_channels"],
        "block_out_channels": widths,
        **_block_types(_each(network["attention_levels"], len(widths)), UNET_BLOCKS),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "layers_per_block": network["num_res_blocks"],
        "attention_head_dim": one_or_each(heads),  # diffusers' name for the number of heads
        "transformer_layers_per_block": network["transformer_depth"],
        "cross_attention_dim": network["context_dim"],
        "use_linear_projection": network["use_linear_projection"],
        # SD 2.1's scores overflow in float16 (diffusers' folders of it say so too)
        "upcast_attention": network["use_linear_projection"] and network["vector_dim"] is None,
        "norm_num_groups": _groups(model["denoiser"]["network"]),
    }
    if network["vector_dim"] is not None:
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": network["vector_dim"]}
        config["addition_time_embed_dim"] = numbers[0]["channels"] if numbers else 256
    return config


def unet_node(config: Config, origin: str) -> Node:
    """The UNet's node; UserError that names what this project's UNet cannot be."""
    with readable(f"{origin} {UNREADABLE}"):
        refuse_others(config, UNET_ALLOWED, origin)
        widths = list(config["block_out_channels"])
        heads = _each(config.get("num_attention_heads") or config.get("attention_head_dim", 8), len(widths))
        per_head = {width // count for width, count in zip(widths, heads, strict=True)}
        same_count = len(set(heads)) == 1
        if not same_count and len(per_head) > 1:
            raise UserError(f"{origin} has {heads} heads at {widths} channels: neither one number nor one width")
        depths = config.get("transformer_layers_per_block", 1)
        if any(not isinstance(depth, int) for depth in _each(depths, 1)):
            raise UserError(f"{origin} has transformer_layers_per_block={depths}; expected a number, or one per level")
        has_vector = config.get("addition_embed_type") is not None
        return nodes.node(
            UNet,
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            model_channels=widths[0],
            channel_mult=[width // widths[0] for width in widths],
            num_res_blocks=config.get("layers_per_block", 2),
            attention_levels=_attention_levels(config, UNET_BLOCKS, origin),
            num_heads=heads[0] if same_count else None,
            head_channels=None if same_count else per_head.pop(),
            context_dim=config["cross_attention_dim"],
            transformer_depth=depths,
            use_linear_projection=bool(config.get("use_linear_projection", False)),
            vector_dim=config.get("projection_class_embeddings_input_dim") if has_vector else None,
            groups=config.get("norm_num_groups", 32),
        )


def size_of(config: Config, factor: int) -> tuple[int, int]:
    """(height, width) in pixels that a UNet's configuration says it is for."""
    height, width = _each(config.get("sample_size") or 64, 2)
    return int(height) * factor, int(width) * factor


# ----------------------------------------------------------------------------------------------- first stage

FIRST_STAGE_BLOCKS = ("AttnDownEncoderBlock2D", "DownEncoderBlock2D")


def first_stage_config(first_stage: Node, statistics: dict[str, Any], sample_size: int) -> dict[str, Any]:
    """config.json of `AutoencoderKL` or `VQModel`; `statistics` go in as they are."""
    own = nodes.arguments(first_stage)
    encoder, decoder = nodes.arguments(own["encoder"]), nodes.arguments(own["decoder"])
    same = ("channels", "channel_mult", "num_res_blocks", "mid_attention", "attention_levels", "groups")
    if any(encoder[name] != decoder[name] for name in same):
        raise UserError("diffusers' autoencoders have the same levels on both sides; these differ")
    is_vq, latent = nodes.is_of(own["regularizer"], VQRegularizer), decoder["in_channels"]
    if not is_vq and (encoder["out_channels"], own["latent_channels"]) != (2 * latent, latent):
        raise UserError(
            f"diffusers' AutoencoderKL has as many latent channels as its decoder takes; this first stage has "
            f"{own['latent_channels']}, its decoder takes {latent}, its encoder gives {encoder['out_channels']}"
        )
    mult = encoder["channel_mult"]
    config: dict[str, Any] = {
        "_class_name": "VQModel" if is_vq else "AutoencoderKL",
        "in_channels": encoder["in_channels"],
        "out_channels": decoder["out_channels"],
        "block_out_channels": [encoder["channels"] * factor for factor in mult],
        **_block_types(_each(encoder["attention_levels"] or False, len(mult)), FIRST_STAGE_BLOCKS),
        "layers_per_block": encoder["num_res_blocks"],
        "latent_channels": latent,
        "norm_num_groups": _groups(first_stage),
        "act_fn": "silu",
        "sample_size": sample_size,
        "mid_block_add_attention": encoder["mid_attention"],
        **statistics,
    }
    if is_vq:
        config |= {"num_vq_embeddings": own["regularizer"]["entries"], "vq_embed_dim": own["regularizer"]["channels"]}
        if not own["quant_conv"]:
            raise UserError("diffusers' VQModel has convolutions around its codebook; this first stage has none")
    elif not own["quant_conv"]:
        config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    return config


def first_stage_node(config: Config, origin: str) -> Node:
    """The first stage's node; UserError for another class of autoencoder."""
    with readable(f"{origin} {UNREADABLE}"):
        refuse_others({"_class_name": None, **config}, FIRST_STAGE_ALLOWED, origin)
        widths = list(config["block_out_channels"])
        shared = {
            "channels": widths[0],
            "channel_mult": [width // widths[0] for width in widths],
            "num_res_blocks": config.get("layers_per_block", 1),
            "mid_attention": config.get("mid_block_add_attention", True),
            "attention_levels": _attention_levels(config, FIRST_STAGE_BLOCKS, origin),
            "groups": config.get("norm_num_groups", 32),
        }
        is_vq = config["_class_name"] == "VQModel"
        channels = config.get("latent_channels", 3 if is_vq else 4)
        return nodes.first_stage(
            {**shared, "in_channels": config.get("in_channels", 3), "out_channels": channels * (2 - is_vq)},
            {**shared, "in_channels": channels, "out_channels": config.get("out_channels", 3)},
            (config.get("vq_embed_dim") or channels) if is_vq else channels,
            config.get("use_quant_conv", True) and config.get("use_post_quant_conv", True),
            config.get("num_vq_embeddings", 256) if is_vq else None,
        )


def statistics_of(config: Config, channels: int) -> tuple[Tensor, Tensor]:
    """(mean, std) of the raw latents, [C] each float32: diffusers gives its UNets (raw - mean) scaling_factor / std.

    Without a scaling_factor it is diffusers' own, as in the folders of SD 1.
    """
    factor = float(config.get("scaling_factor") or SD_FACTOR)
    mean = config.get("latents_mean") or [float(config.get("shift_factor") or 0.0)] * channels
    std = torch.tensor(config.get("latents_std") or [1.0] * channels, dtype=torch.float64)
    return torch.tensor(mean), (std / factor).float()


# ------------------------------------------------------------------------------------------------------ text


def text_node(config: Config, tokenizer: Tokenizer, projected: bool, origin: str, **options: Any) -> Node:
    """The node of a text encoder, with `options` of TextConditioner; `projected`: it has a projection."""
    config = config.get("text_config", config)
    refuse_others(config, {"model_type": ("clip_text_model", "clip")}, origin)
    vocab, positions = config.get("vocab_size", 49408), config.get("max_position_embeddings", 77)
    encoder = {
        "hidden_size": config.get("hidden_size", 512),
        "layers": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 8),
        "intermediate": config.get("intermediate_size", 2048),
        "vocab": vocab,
        "max_position": positions,
        "act": config.get("hidden_act", "quick_gelu"),
        "bos": config.get("bos_token_id", vocab - 2),
        "eos": config.get("eos_token_id", vocab - 1),
        "pad": config.get("pad_token_id", vocab - 1),
    }
    longest = json.loads(tokenizer.get("tokenizer_config.json", "{}")).get("model_max_length", 77)
    dim = config.get("projection_dim", 512) if projected else None
    return nodes.text_conditioner(encoder, dim, max_length=min(int(longest), positions), **options)


# -------------------------------------------------------------------------------------------------- schedule


def scheduler_config(model: Node) -> dict[str, Any]:
    """scheduler_config.json of a DDIM sampler on the model's schedule; UserError where diffusers has no such one."""
    schedule, prediction = model["denoiser"]["schedule"], model["denoiser"]["prediction"]
    zero_terminal = nodes.is_of(schedule, ZeroTerminalSNR)
    schedule = schedule["schedule"] if zero_terminal else schedule
    kinds = [theirs for theirs, ours in SCHEDULES.items() if nodes.is_of(schedule, ours)]
    predictions = [theirs for theirs, ours in PREDICTIONS.items() if nodes.is_of(prediction, ours)]
    if not kinds or not predictions:
        raise UserError(
            f"diffusers' Stable Diffusion pipelines have no schedule {nodes.class_name(schedule)} with prediction "
            f"{nodes.class_name(prediction)}; they have {', '.join(SCHEDULES)} with {', '.join(PREDICTIONS)}"
        )
    betas = nodes.arguments(schedule)
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": betas["steps"],
        "beta_start": betas["beta_start"],
        "beta_end": betas["beta_end"],
        "beta_schedule": kinds[0],
        "rescale_betas_zero_snr": zero_terminal,
        "prediction_type": predictions[0],
        "clip_sample": False,
        "steps_offset": 1,
        # Leading times never reach the last one, where a model without signal there has to begin (Lin et al. 2023);
        # trailing ones step from the lowest level to the picture itself.
        "timestep_spacing": "trailing" if zero_terminal else "leading",
        "set_alpha_to_one": zero_terminal,
    }


def schedule_nodes(config: Config, origin: str) -> tuple[Node, Node]:
    """(schedule, prediction) of a scheduler_config.json."""
    if not {"beta_schedule", "beta_start", "beta_end"} <= config.keys():
        raise UserError(
            f"{origin} has a {config.get('_class_name')} without beta_schedule, beta_start and beta_end (EDM, flow "
            f"matching?); known here are {', '.join(SCHEDULES)} with both ends"
        )
    kind, prediction = config["beta_schedule"], config.get("prediction_type", "epsilon")
    if kind not in SCHEDULES or prediction not in PREDICTIONS or config.get("trained_betas") is not None:
        raise UserError(
            f"{origin} has beta_schedule {kind!r}, prediction_type {prediction!r}, which are not known here"
        )
    ends = {"beta_start": config["beta_start"], "beta_end": config["beta_end"]}
    schedule = nodes.node(SCHEDULES[kind], **ends, steps=config.get("num_train_timesteps", 1000))
    if config.get("rescale_betas_zero_snr"):
        if prediction == "epsilon":
            raise UserError(
                f"{origin} has rescale_betas_zero_snr with prediction_type 'epsilon', which is singular at the last "
                "time (no signal is left there to compute it from): expected v_prediction or sample"
            )
        schedule = nodes.node(ZeroTerminalSNR, schedule=schedule)
    return schedule, nodes.node(PREDICTIONS[prediction])


def refuse_others(config: Config, allowed: Mapping[str, tuple[Any, ...]], origin: str) -> None:
    """UserError where a configuration has a value that is not among the allowed ones."""
    for name, values in allowed.items():
        if name in config and any(value not in values for value in _each(config[name], 1)):
            raise UserError(
                f"{origin}: {name}={config[name]!r} is not known here (known: {', '.join(map(str, values))})"
            )
