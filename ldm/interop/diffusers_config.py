"""Architectures as the config.json files of a diffusers folder say them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.interop.package import Architecture, build_first_stage, one_or_each
from ldm.networks.attention import head_count
from ldm.networks.unet import UNet

Config = Mapping[str, Any]
SCHEDULES = {"ScaledLinear": "scaled_linear", "Linear": "linear"}
ZERO_TERMINAL = "ZeroTerminalSNR"  # around one of them: diffusers' rescale_betas_zero_snr
PREDICTIONS = {"Epsilon": "epsilon", "V": "v_prediction", "X0": "sample"}
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
TEXT_ALLOWED: dict[str, tuple[Any, ...]] = {"model_type": ("clip_text_model", "clip")}
SD_FACTOR = 0.18215  # the scaling factor of an autoencoder whose config.json has none, in diffusers


def groups_of(module: nn.Module, what: str) -> int:
    """The one number of groups that all group norms have; UserError where they differ."""
    found = {part.num_groups for part in module.modules() if isinstance(part, nn.GroupNorm)}
    if len(found) != 1:
        raise UserError(f"the {what}'s group norms have {sorted(found)} groups; diffusers has one number for all")
    return found.pop()


# ------------------------------------------------------------------------------------------------------ UNet


def unet_config(architecture: Architecture, unet: UNet, sample_size: int) -> dict[str, Any]:
    """config.json of `UNet2DConditionModel`; UserError where it has no such UNet."""
    network = architecture.network or {}
    if network.get("use_scale_shift_norm") or network.get("resblock_updown") or network["context_dim"] is None:
        raise UserError(
            "diffusers' conditional UNet has neither use_scale_shift_norm nor resblock_updown, and needs tokens"
        )
    widths = [network["model_channels"] * mult for mult in network["channel_mult"]]
    attended = _each(network["attention_levels"], len(widths))
    heads = [head_count(width, network.get("num_heads"), network.get("head_channels")) for width in widths]
    cross = [("CrossAttnDownBlock2D" if yes else "DownBlock2D") for yes in attended]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": network["in_channels"],
        "out_channels": network["out_channels"],
        "block_out_channels": widths,
        "down_block_types": cross,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(cross)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "layers_per_block": network["num_res_blocks"],
        "attention_head_dim": one_or_each(heads),  # diffusers' name for the number of heads
        "transformer_layers_per_block": network["transformer_depth"],
        "cross_attention_dim": network["context_dim"],
        "use_linear_projection": network.get("use_linear_projection", False),
        # SD 2.1's scores overflow in float16 (diffusers' folders of it say so too)
        "upcast_attention": bool(network.get("use_linear_projection")) and network.get("vector_dim") is None,
        "norm_num_groups": groups_of(unet, "UNet"),
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
    }
    if network.get("vector_dim") is not None:
        config |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": network["vector_dim"]}
        config["addition_time_embed_dim"] = (
            architecture.numbers[0].get("channels", 256) if architecture.numbers else 256
        )
    return config


def network_arguments(config: Config, origin: str) -> dict[str, Any]:
    """`UNet`'s arguments; UserError that names what this project's UNet cannot be."""
    with _understood(origin):
        return _network_arguments(config, origin)


def _network_arguments(config: Config, origin: str) -> dict[str, Any]:
    refuse_others(config, UNET_ALLOWED, origin)
    widths = list(config["block_out_channels"])
    down = list(config["down_block_types"])
    known = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    mirrored = [name.replace("Down", "Up") for name in reversed(down)]
    if not set(down) <= set(known) or list(config["up_block_types"]) != mirrored:
        raise UserError(
            f"{origin} has blocks {down} and {config['up_block_types']}; expected {list(known)}, mirrored up"
        )
    heads = _each(config.get("num_attention_heads") or config.get("attention_head_dim", 8), len(widths))
    per_head = {width // count for width, count in zip(widths, heads, strict=True)}
    if len(set(heads)) > 1 and len(per_head) > 1:
        raise UserError(f"{origin} has {heads} heads at {widths} channels: neither one number nor one width")
    alike = len(set(heads)) == 1
    vector = config.get("projection_class_embeddings_input_dim") if config.get("addition_embed_type") else None
    depths = config.get("transformer_layers_per_block", 1)
    if any(not isinstance(depth, int) for depth in _each(depths, 1)):
        raise UserError(f"{origin} has transformer_layers_per_block={depths}; expected a number, or one per level")
    return {
        "in_channels": config.get("in_channels", 4),
        "out_channels": config.get("out_channels", 4),
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 2),
        "attention_levels": [known[name] for name in down],
        "num_heads": heads[0] if alike else None,
        "head_channels": None if alike else per_head.pop(),
        "context_dim": config["cross_attention_dim"],
        "transformer_depth": depths,
        "use_linear_projection": bool(config.get("use_linear_projection", False)),
        "vector_dim": vector,
        "groups": config.get("norm_num_groups", 32),
    }


def size_of(config: Config, factor: int) -> tuple[int, int]:
    """(height, width) in pixels that a UNet's configuration says it is for."""
    side = config.get("sample_size") or 64
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return int(height) * factor, int(width) * factor


# ----------------------------------------------------------------------------------------------- first stage


def first_stage_config(architecture: Architecture, statistics: dict[str, Any], sample_size: int) -> dict[str, Any]:
    """config.json of `AutoencoderKL` or `VQModel`; `statistics` go in as they are."""
    arguments = architecture.first_stage
    encoder, decoder, book = arguments["encoder"], arguments["decoder"], arguments["codebook"]
    same = ("channels", "channel_mult", "num_res_blocks", "mid_attention", "attention_levels", "groups")
    if any(encoder.get(name) != decoder.get(name) for name in same):
        raise UserError("diffusers' autoencoders have the same levels on both sides; these differ")
    latent = decoder["in_channels"]
    if not book and (encoder["out_channels"], arguments["latent_channels"]) != (2 * latent, latent):
        raise UserError(
            f"diffusers' AutoencoderKL has as many latent channels as its decoder takes; this first stage has "
            f"{arguments['latent_channels']}, its decoder takes {latent}, its encoder gives {encoder['out_channels']}"
        )
    with torch.device("meta"):
        groups = groups_of(build_first_stage(arguments), "first stage")
    mult = encoder["channel_mult"]
    attended = _each(encoder.get("attention_levels") or False, len(mult))
    down = [("AttnDownEncoderBlock2D" if yes else "DownEncoderBlock2D") for yes in attended]
    config: dict[str, Any] = {
        "_class_name": "VQModel" if book else "AutoencoderKL",
        "in_channels": encoder["in_channels"],
        "out_channels": decoder["out_channels"],
        "block_out_channels": [encoder["channels"] * factor for factor in mult],
        "down_block_types": down,
        "up_block_types": [name.replace("DownEncoder", "UpDecoder") for name in reversed(down)],
        "layers_per_block": encoder["num_res_blocks"],
        "latent_channels": latent,
        "norm_num_groups": groups,
        "act_fn": "silu",
        "sample_size": sample_size,
        "mid_block_add_attention": encoder.get("mid_attention", True),
        **statistics,
    }
    if book:
        config |= {"num_vq_embeddings": book["entries"], "vq_embed_dim": book["channels"]}
        if not arguments["quant_conv"]:
            raise UserError("diffusers' VQModel has convolutions around its codebook; this first stage has none")
    elif not arguments["quant_conv"]:
        config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    return config


def first_stage_arguments(config: Config, origin: str) -> dict[str, Any]:
    """`Architecture.first_stage`; UserError for another class of autoencoder."""
    with _understood(origin):
        return _first_stage_arguments(config, origin)


def _first_stage_arguments(config: Config, origin: str) -> dict[str, Any]:
    refuse_others({"_class_name": None, **config}, FIRST_STAGE_ALLOWED, origin)
    widths, down = list(config["block_out_channels"]), list(config["down_block_types"])
    known = {"AttnDownEncoderBlock2D": True, "DownEncoderBlock2D": False}
    mirrored = [block.replace("DownEncoder", "UpDecoder") for block in reversed(down)]
    if not set(down) <= set(known) or list(config["up_block_types"]) != mirrored:
        raise UserError(
            f"{origin} has blocks {down} and {config['up_block_types']}; expected {list(known)}, mirrored up"
        )
    is_vq = config["_class_name"] == "VQModel"
    channels = config.get("latent_channels", 3 if is_vq else 4)
    shared = {
        "channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 1),
        "mid_attention": config.get("mid_block_add_attention", True),
        "attention_levels": [known[block] for block in down],
        "groups": config.get("norm_num_groups", 32),
    }
    latent = (config.get("vq_embed_dim") or channels) if is_vq else channels
    book = {"entries": config.get("num_vq_embeddings", 256), "channels": latent} if is_vq else None
    return {
        "encoder": shared | {"in_channels": config.get("in_channels", 3), "out_channels": channels * (2 - is_vq)},
        "decoder": shared | {"in_channels": channels, "out_channels": config.get("out_channels", 3)},
        "codebook": book,
        "latent_channels": latent,
        "quant_conv": config.get("use_quant_conv", True) and config.get("use_post_quant_conv", True),
    }


def statistics_of(config: Config, channels: int) -> tuple[Tensor, Tensor]:
    """(mean, std) of the raw latents, [C] each float32: diffusers gives its UNets (raw - mean) scaling_factor / std.

    Without a scaling_factor it is diffusers' own, as in the folders of SD 1.
    """
    factor = float(config.get("scaling_factor") or SD_FACTOR)
    mean = config.get("latents_mean") or [float(config.get("shift_factor") or 0.0)] * channels
    std = torch.tensor(config.get("latents_std") or [1.0] * channels, dtype=torch.float64)
    return torch.tensor(mean), (std / factor).float()


# -------------------------------------------------------------------------------------------------- schedule


def scheduler_config(architecture: Architecture) -> dict[str, Any]:
    """scheduler_config.json of a DDIM sampler on the model's schedule; UserError where diffusers has no such one."""
    zero_terminal = architecture.schedule["kind"] == ZERO_TERMINAL
    schedule = architecture.schedule["schedule"] if zero_terminal else architecture.schedule
    kind = schedule["kind"]
    if kind not in SCHEDULES or architecture.prediction not in PREDICTIONS:
        raise UserError(
            f"diffusers' Stable Diffusion pipelines have no schedule {kind} with prediction {architecture.prediction}; "
            f"they have {', '.join(SCHEDULES)} with {', '.join(PREDICTIONS)}"
        )
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule["steps"],
        "beta_start": schedule["beta_start"],
        "beta_end": schedule["beta_end"],
        "beta_schedule": SCHEDULES[kind],
        "rescale_betas_zero_snr": zero_terminal,
        "prediction_type": PREDICTIONS[architecture.prediction],
        "clip_sample": False,
        "steps_offset": 1,
        # Leading times never reach the last one, where a model without signal there has to begin (Lin et al. 2023);
        # trailing ones step from the lowest level to the picture itself.
        "timestep_spacing": "trailing" if zero_terminal else "leading",
        "set_alpha_to_one": zero_terminal,
    }


def schedule_of(config: Config, origin: str) -> tuple[dict[str, Any], str]:
    """(`Architecture.schedule`, prediction) of a scheduler_config.json."""
    if not {"beta_schedule", "beta_start", "beta_end"} <= config.keys():
        raise UserError(
            f"{origin} has a {config.get('_class_name')} without beta_schedule, beta_start and beta_end (EDM, flow "
            f"matching?); known here are {', '.join(SCHEDULES.values())} with both ends"
        )
    kinds = {theirs: ours for ours, theirs in SCHEDULES.items()}
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    kind, prediction = config["beta_schedule"], config.get("prediction_type", "epsilon")
    if kind not in kinds or prediction not in predictions or config.get("trained_betas") is not None:
        raise UserError(
            f"{origin} has beta_schedule {kind!r}, prediction_type {prediction!r}, which are not known here"
        )
    ends = {"beta_start": config["beta_start"], "beta_end": config["beta_end"]}
    schedule = {"kind": kinds[kind], **ends, "steps": config.get("num_train_timesteps", 1000)}
    if not config.get("rescale_betas_zero_snr"):
        return schedule, predictions[prediction]
    if prediction == "epsilon":
        raise UserError(
            f"{origin} has rescale_betas_zero_snr with prediction_type 'epsilon', which is singular at the last time "
            "(nothing of the picture is left there to compute it from): expected v_prediction or sample"
        )
    return {"kind": ZERO_TERMINAL, "schedule": schedule}, predictions[prediction]


def refuse_others(config: Config, allowed: Mapping[str, tuple[Any, ...]], origin: str) -> None:
    """UserError where a configuration has a value that is not among the allowed ones."""
    for name, values in allowed.items():
        if name in config and any(value not in values for value in _each(config[name], 1)):
            raise UserError(
                f"{origin}: {name}={config[name]!r} is not known here (known: {', '.join(map(str, values))})"
            )


@contextmanager
def _understood(origin: str) -> Iterator[None]:
    """UserError where a configuration lacks what it is read for, or has something else there."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, IndexError) as error:
        told = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{origin} is not readable as diffusers writes it: {told}") from error


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count
