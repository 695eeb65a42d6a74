"""Our weights' names in the layouts of others: diffusers and transformers, CompVis and sgm, OpenCLIP.

Every function takes our names of one part (the UNet, the first stage, a text encoder) and gives a
`WeightMapping` for each tensor of the other layout. Nothing is guessed from other files: their
names follow from ours alone.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Rules = list[tuple[str, str]]


@dataclass(frozen=True)
class WeightMapping:
    """A tensor of another layout, and what it is of ours.

    theirs     its name there
    ours       our tensors, stacked along the first dimension in this order (one, except for a fused projection)
    transpose  it is a matrix that lies transposed there
    flat       our 1x1 convolution is a matrix there
    """

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    flat: bool = False

    def under(self, theirs: str, ours: str) -> "WeightMapping":
        """The same of parts of larger models, whose names begin with these prefixes."""
        return replace(self, theirs=theirs + self.theirs, ours=tuple(ours + name for name in self.ours))

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """The other layout's tensor from ours."""
        parts = [state[name] for name in self.ours]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.flat:
            tensor = tensor[:, :, 0, 0]
        return tensor.T if self.transpose else tensor

    def back(self, tensor: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Our tensors of the other layout's; `shapes` are ours by name."""
        tensor = tensor.T if self.transpose else tensor
        sizes = [shapes[name][0] for name in self.ours]
        parts = torch.split(tensor, sizes) if len(sizes) > 1 else (tensor,)
        return {name: part.reshape(shapes[name]).contiguous() for name, part in zip(self.ours, parts, strict=True)}


ToMappings = Callable[[Iterable[str]], list[WeightMapping]]
"""Our names of a part -> the tensors of another layout."""


def renamed(names: Iterable[str], rules: Rules) -> dict[str, str]:
    """Our name -> the other's, by regular expressions that are applied in their order."""
    others = {}
    for name in names:
        other = name
        for pattern, replacement in rules:
            other = re.sub(pattern, replacement, other)
        others[name] = other
    return others


# ---------------------------------------------------------------------------------------- diffusers, transformers

UNET: Rules = [
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
FIRST_STAGE: Rules = [
    (r"^regularizer\.codebook\.", "quantize.embedding."),
    (r"\.(down|up)\.(\d+)\.(res|attention)_(\d+)\.", r".\1_blocks.\2.\3_\4."),
    (r"\.(down|up)\.(\d+)\.resample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"\.middle\.", ".mid_block."),
    (r"\.res_(\d+)\.", r".resnets.\1."),
    (r"\.attention_(\d+)\.norm\.", r".attentions.\1.group_norm."),
    (r"\.attention_(\d+)\.", r".attentions.\1."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.(norm|conv)_(\d)\.", r".\1\2."),
]
OLD_ATTENTION: Rules = [  # the first stage's attention in diffusers before 0.18, as in Stable Diffusion 1.5's folder
    (r"(\.attentions\.\d+)\.query\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.key\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.value\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
]
COMPVIS_OF_DIFFUSERS: Rules = [  # a first stage's file in diffusers' names, without the folder that says what it is
    *OLD_ATTENTION,
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.", r".\1.\2.block."),
    (r"\.(down|up)_blocks\.(\d+)\.attentions\.", r".\1.\2.attn."),
    (r"\.(down|up)_blocks\.(\d+)\.\1samplers\.0\.", r".\1.\2.\1sample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"(\.attn[._]\d+)\.group_norm\.", r"\1.norm."),
    (r"(\.attn[._]\d+)\.to_(q|k|v)\.", r"\1.\2."),
    (r"(\.attn[._]\d+)\.to_out\.0\.", r"\1.proj_out."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
]
PIXEL_ATTENTION = re.compile(r"attention(_\d+)?\.to_(q|k|v|out)\.weight$")


def unet_to_diffusers(names: Iterable[str]) -> list[WeightMapping]:
    """A UNet as diffusers' UNet2DConditionModel (with transformers) or UNet2DModel (plain attention) has it."""
    names = list(names)
    plain = tuple(name[: -len("to_q.weight")] for name in names if name.endswith(".attention.to_q.weight"))
    pieces = []
    for name, theirs in renamed(names, UNET).items():
        pixels = bool(plain) and name.startswith(plain)
        theirs = theirs.replace(".norm.", ".group_norm.") if pixels else theirs
        pieces.append(WeightMapping(theirs, (name,), flat=pixels and bool(PIXEL_ATTENTION.search(name))))
    return pieces


def first_stage_to_diffusers(names: Iterable[str]) -> list[WeightMapping]:
    """A first stage as diffusers' AutoencoderKL or VQModel has it."""
    return [
        WeightMapping(theirs, (name,), flat=bool(PIXEL_ATTENTION.search(name)))
        for name, theirs in renamed(names, FIRST_STAGE).items()
    ]


def text_to_transformers(names: Iterable[str], prefix: str) -> list[WeightMapping]:
    """A text encoder (`encoder.*`, `projection.weight`) as transformers has it; `prefix` is "text_model." or ""."""
    rules: Rules = [(r"^encoder\.", prefix), (r"^projection\.", "text_projection.")]
    return [WeightMapping(theirs, (name,)) for name, theirs in renamed(names, rules).items()]


# ------------------------------------------------------------------------------------------------- CompVis, sgm

RES: Rules = [
    (r"\.res\.norm_1\.", ".0.in_layers.0."),
    (r"\.res\.conv_1\.", ".0.in_layers.2."),
    (r"\.res\.emb\.", ".0.emb_layers.1."),
    (r"\.res\.norm_2\.", ".0.out_layers.0."),
    (r"\.res\.conv_2\.", ".0.out_layers.3."),
    (r"\.res\.skip\.", ".0.skip_connection."),
]
TRANSFORMER: Rules = [
    (r"\.attention\.", ".1."),
    (r"\.blocks\.(\d+)\.", r".transformer_blocks.\1."),
    (r"\.self_attention\.", ".attn1."),
    (r"\.cross_attention\.", ".attn2."),
    (r"\.feed_forward\.proj\.", ".ff.net.0.proj."),
    (r"\.feed_forward\.out\.", ".ff.net.2."),
    (r"\.to_out\.", ".to_out.0."),
    (r"\.norm_(\d)\.", r".norm\1."),
]
COMPVIS_UNET: Rules = [
    (r"^vector_embed\.", "label_emb.0."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^middle\.1\.res\.", "middle_block.2.res."),
    (r"^middle\.0\.", "middle_block."),
    *RES,
    *TRANSFORMER,
    (r"^middle_block\.2\.0\.", "middle_block.2."),
]
COMPVIS_FIRST_STAGE: Rules = [
    (r"^regularizer\.codebook\.", "quantize.embedding."),
    (r"\.middle\.res_0\.", ".mid.block_1."),
    (r"\.middle\.attention_0\.", ".mid.attn_1."),
    (r"\.middle\.res_1\.", ".mid.block_2."),
    (r"\.res_(\d+)\.", r".block.\1."),
    (r"\.attention_(\d+)\.", r".attn.\1."),
    (r"\.down\.(\d+)\.resample\.", r".down.\1.downsample."),
    (r"\.up\.(\d+)\.resample\.", r".up.\1.upsample."),
    (r"\.to_(q|k|v)\.", r".\1."),
    (r"\.to_out\.", ".proj_out."),
    (r"\.skip\.", ".nin_shortcut."),
    (r"\.(norm|conv)_(\d)\.", r".\1\2."),
]


def unet_to_compvis(names: Iterable[str]) -> list[WeightMapping]:
    """A UNet with transformers as CompVis' and sgm's UNetModel has it: blocks are numbered through all levels."""
    names = list(names)
    numbers = _block_numbers(names)
    attended = {m[1] for name in names if (m := re.match(r"up\.(\d+)\.blocks\.\d+\.attention\.", name))}
    numbered = {name: _numbered(name, numbers, attended) for name in names}
    theirs = renamed(set(numbered.values()), COMPVIS_UNET)
    return [WeightMapping(theirs[numbered[name]], (name,)) for name in names]


def _block_numbers(names: Iterable[str]) -> dict[str, int]:
    """The number in CompVis' list of "down.i.blocks.j", "down.i.downsample" and "up.i.blocks.j"."""
    places = {
        m.group(1) for name in names if (m := re.match(r"((?:down|up)\.\d+\.(?:blocks\.\d+|downsample))\.", name))
    }
    order = sorted(places, key=_place)
    down = [place for place in order if place.startswith("down")]
    up = [place for place in order if place.startswith("up")]
    return {place: i for i, place in enumerate(down, start=1)} | {place: i for i, place in enumerate(up)}


def _place(place: str) -> tuple[str, int, str, int]:
    way, level, kind, *number = place.split(".")
    return way, int(level), kind, int(number[0]) if number else 0  # "blocks" comes before "downsample"


def _numbered(name: str, numbers: Mapping[str, int], attended: set[str]) -> str:
    """The name with CompVis' list and number instead of ours; `attended` are the levels up with attention."""
    if match := re.match(r"((down|up)\.(\d+)\.blocks\.\d+)\.(.*)", name):
        place, way, _, rest = match.groups()
        return f"{'input' if way == 'down' else 'output'}_blocks.{numbers[place]}.{rest}"
    if match := re.match(r"(down\.\d+\.downsample)\.conv\.(.*)", name):
        return f"input_blocks.{numbers[match[1]]}.0.op.{match[2]}"
    if match := re.match(r"up\.(\d+)\.upsample\.(.*)", name):  # in the list of the level's last block
        last = max(n for place, n in numbers.items() if place.startswith(f"up.{match[1]}."))
        return f"output_blocks.{last}.{2 if match[1] in attended else 1}.{match[2]}"
    return name


def first_stage_to_compvis(names: Iterable[str]) -> list[WeightMapping]:
    """A first stage as CompVis' AutoencoderKL or VQModel has it: the decoder's levels from fine to coarse."""
    names = list(names)
    levels = 1 + max(int(m[1]) for name in names if (m := re.match(r"decoder\.up\.(\d+)\.", name)))

    def turned(match: re.Match[str]) -> str:
        return f"decoder.up.{levels - 1 - int(match[1])}."

    theirs = renamed(names, COMPVIS_FIRST_STAGE)
    return [WeightMapping(re.sub(r"^decoder\.up\.(\d+)\.", turned, other), (name,)) for name, other in theirs.items()]


def first_stage_as_compvis(names: Iterable[str]) -> dict[str, str]:
    """A first stage's diffusers names -> CompVis' (its decoder counts its levels the other way); others stay."""
    names = list(names)
    levels = 1 + max((int(m[1]) for name in names if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", name))), default=-1)

    def turned(match: re.Match[str]) -> str:
        return f"decoder.up.{levels - 1 - int(match[1])}."

    theirs = renamed(names, COMPVIS_OF_DIFFUSERS)
    return {n: re.sub(r"^decoder\.up\.(\d+)\.", turned, other) if levels else n for n, other in theirs.items()}


OPEN_CLIP: Rules = [
    (r"^encoder\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^encoder\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^encoder\.final_layer_norm\.", "ln_final."),
    (r"^encoder\.encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.q_proj\.", ".attn.in_proj_"),
    (r"^projection\.weight$", "text_projection"),
]


def text_to_open_clip(names: Iterable[str]) -> list[WeightMapping]:
    """A text encoder (`encoder.*`, `projection.weight`) as OpenCLIP has it: query, key and value in one matrix."""
    pieces = []
    for name, theirs in renamed([n for n in names if not re.search(r"\.(k|v)_proj\.", n)], OPEN_CLIP).items():
        fused = tuple(name.replace(".q_proj.", f".{part}_proj.") for part in "qkv") if ".q_proj." in name else (name,)
        pieces.append(WeightMapping(theirs, fused, transpose=name == "projection.weight"))
    return pieces
