"""The names of diffusers' weights for ours, for the parity tests."""

import re

from torch import Tensor, nn

UNET = [
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^vector_embed\.0\.", "add_embedding.linear_1."),
    (r"^vector_embed\.2\.", "add_embedding.linear_2."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.res\.", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.attention\.", r"\1_blocks.\2.attentions.\3."),
    (r"^(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
    (r"^middle\.(\d+)\.res\.", r"mid_block.resnets.\1."),
    (r"^middle\.0\.attention\.", "mid_block.attentions.0."),
    (r"\.blocks\.(\d+)\.", r".transformer_blocks.\1."),
    (r"\.self_attention\.", ".attn1."),
    (r"\.cross_attention\.", ".attn2."),
    (r"\.feed_forward\.proj\.", ".ff.net.0.proj."),
    (r"\.feed_forward\.out\.", ".ff.net.2."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.emb\.", ".time_emb_proj."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.(norm|conv)_(\d)\.", r".\1\2."),
]
AUTOENCODER = [
    (r"\.(down|up)\.(\d+)\.res_(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)\.(\d+)\.resample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"\.middle\.res_(\d)\.", r".mid_block.resnets.\1."),
    (r"\.middle\.attention_0\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.middle\.attention_0\.", ".mid_block.attentions.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.(norm|conv)_(\d)\.", r".\1\2."),
]


def theirs(name: str, rules: list[tuple[str, str]]) -> str:
    """diffusers' name of one of our parameters."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def copy_weights(ours: nn.Module, peer: nn.Module, rules: list[tuple[str, str]]) -> dict[str, str]:
    """Loads our weights into the peer, all of them; returns our name -> the peer's name."""
    names = {name: theirs(name, rules) for name, _ in ours.named_parameters()}
    shapes = {name: p.shape for name, p in peer.named_parameters()}
    state: dict[str, Tensor] = {
        names[name]: p.detach().reshape(shapes[names[name]]) for name, p in ours.named_parameters()
    }
    peer.load_state_dict(state, strict=True)
    return names


def relative(given: Tensor, wanted: Tensor) -> float:
    """||given - wanted|| / ||wanted||."""
    wanted = wanted.detach().reshape(given.shape)
    return float((given.detach() - wanted).norm() / wanted.norm())
