"""Architectures as the config.json files of a diffusers folder say them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

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
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_type": ("positional",),
    "addition_embed_type": (None, "text_time"),
}


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
    if network.get("scale_shift") or network.get("resample_blocks") or network["context_dim"] is None:
        raise UserError("diffusers' conditional UNet has neither scale_shift nor resample_blocks, and needs tokens")
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
        "use_linear_projection": network.get("linear_projections", False),
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
        "transformer_depth": config.get("transformer_layers_per_block", 1),
        "linear_projections": bool(config.get("use_linear_projection", False)),
        "vector_dim": vector,
        "groups": config.get("norm_num_groups", 32),
    }


# ----------------------------------------------------------------------------------------------- first stage


def first_stage_config(architecture: Architecture, statistics: dict[str, Any], sample_size: int) -> dict[str, Any]:
    """config.json of `AutoencoderKL` or `VQModel`; `statistics` go in as they are."""
    arguments = architecture.first_stage
    encoder, decoder, book = arguments["encoder"], arguments["decoder"], arguments["codebook"]
    same = ("channels", "channel_mult", "num_res_blocks", "mid_attention", "attention_levels", "groups")
    if any(encoder.get(name) != decoder.get(name) for name in same):
        raise UserError("diffusers' autoencoders have the same levels on both sides; these differ")
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
        "latent_channels": arguments["latent_channels"],
        "norm_num_groups": groups_of(build_first_stage(arguments), "first stage"),
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
    name = config.get("_class_name")
    if name not in ("AutoencoderKL", "VQModel"):
        raise UserError(f"{origin} is a {name}; expected AutoencoderKL or VQModel")
    widths, down = list(config["block_out_channels"]), list(config["down_block_types"])
    known = {"AttnDownEncoderBlock2D": True, "DownEncoderBlock2D": False}
    mirrored = [block.replace("DownEncoder", "UpDecoder") for block in reversed(down)]
    if not set(down) <= set(known) or list(config["up_block_types"]) != mirrored:
        raise UserError(
            f"{origin} has blocks {down} and {config['up_block_types']}; expected {list(known)}, mirrored up"
        )
    channels, is_vq = config.get("latent_channels", 4), name == "VQModel"
    shared = {
        "channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 1),
        "mid_attention": config.get("mid_block_add_attention", True),
        "attention_levels": [known[block] for block in down],
        "groups": config.get("norm_num_groups", 32),
    }
    book = (
        {"entries": config["num_vq_embeddings"], "channels": config.get("vq_embed_dim") or channels} if is_vq else None
    )
    return {
        "encoder": shared | {"in_channels": config.get("in_channels", 3), "out_channels": channels * (2 - is_vq)},
        "decoder": shared | {"in_channels": channels, "out_channels": config.get("out_channels", 3)},
        "codebook": book,
        "latent_channels": channels,
        "quant_conv": config.get("use_quant_conv", True) and config.get("use_post_quant_conv", True),
    }


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
    kinds = {theirs: ours for ours, theirs in SCHEDULES.items()}
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    kind, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if kind not in kinds or prediction not in predictions or config.get("trained_betas") is not None:
        raise UserError(
            f"{origin} has beta_schedule {kind!r}, prediction_type {prediction!r}, which are not known here"
        )
    ends = {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
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
        if name in config and config[name] not in values:
            raise UserError(
                f"{origin}: {name}={config[name]!r} is not known here (known: {', '.join(map(str, values))})"
            )


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count
