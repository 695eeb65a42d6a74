"""How wide text encoders are that are not loaded yet: what a network beside them is built for."""

from pathlib import Path

from transformers import CLIPTextConfig

from ldm.conditioning.condition import Arguments, Widths

PUBLISHED = {  # by their names on the hub: the width of the states, and of the projected pooled state
    "openai/clip-vit-large-patch14": (768, 768),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (1024, 1024),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": (1280, 1280),
}


def text_widths(encoder: Arguments, projection: Arguments | None, pooled: bool) -> Widths | None:
    """The widths of a TextConditioner of these parts' arguments; None where they cannot be known without loading."""
    width = _sizes(encoder)[0]
    vector = width if projection is None else _sizes(projection)[1]
    if width is None or (pooled and vector is None):
        return None
    return Widths(tokens=width, vector=vector if pooled and vector else 0)


def clip_widths(name_or_path: str, subfolder: str = "") -> tuple[int, int]:
    """The widths of the states and of their projection, of a folder's or a hub name's text encoder, by its config.json.

    That of a whole CLIP says the projection's beside the text encoder's own configuration; inside stands a default.
    OSError or ValueError where there is none.
    """
    if name_or_path in PUBLISHED and not Path(name_or_path).exists():
        return PUBLISHED[name_or_path]
    found, _ = CLIPTextConfig.get_config_dict(name_or_path, subfolder=subfolder)
    return int(found.get("text_config", found).get("hidden_size", 512)), int(found.get("projection_dim", 512))


def _sizes(arguments: Arguments) -> tuple[int | None, int | None]:
    """The same of what makes an encoder or a projection, without loading it; None: unknown."""
    if "hidden_size" in arguments:
        return int(arguments["hidden_size"]), int(arguments.get("projection_dim", arguments["hidden_size"]))
    if "name_or_path" not in arguments:
        return None, None
    try:
        return clip_widths(str(arguments["name_or_path"]), str(arguments.get("subfolder") or ""))
    except (OSError, ValueError):  # neither here nor to be had: loading it will say so
        return None, None
