"""How well pictures match their captions, in the eyes of CLIP."""

from collections.abc import Sequence
from functools import cached_property
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from transformers import CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from ldm.checkpoint import fingerprint
from ldm.errors import UserError
from ldm.evaluation.interval import Interval, of_mean

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(images: Tensor, size: int) -> Tensor:
    """CLIP's input [B, 3, size, size] of images [B, 3, H, W] in [0, 1] (Radford et al. 2021).

    Rounded to 8 bits, the shorter side resized (bicubic, antialias), centre crop, normalised.
    """
    pixels = (images.float().clamp(0.0, 1.0) * 255.0).round()
    height, width = pixels.shape[-2:]
    short = min(height, width)
    resized = (max(size, int(size * height / short)), max(size, int(size * width / short)))
    if resized != (height, width):
        pixels = F.interpolate(pixels, resized, mode="bicubic", antialias=True).round().clamp(0.0, 255.0)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    pixels = pixels[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (MEAN, STD))
    return (pixels / 255.0 - mean) / std


class CLIPScore(Metric):
    """100 * max(cos(image, caption), 0), the mean over pictures (Hessel et al. 2021, with w = 100).

    Long captions are cut so that the end-of-text token stays, from which CLIP reads the text's features.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, name: str = "clip") -> None:
        super().__init__()
        self.model = model.train(False).requires_grad_(False)
        self.tokenizer, self.name = tokenizer, name
        self.size: int = cast(CLIPVisionConfig, model.config.vision_config).image_size  # type: ignore[assignment]
        self.max_length: int = cast(CLIPTextConfig, model.config.text_config).max_position_embeddings
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def from_pretrained(cls, source: str) -> Self:
        """With a CLIP of a folder or of the Hugging Face hub, e.g. "openai/clip-vit-large-patch14"."""
        try:
            model = CLIPModel.from_pretrained(source)
            tokenizer = CLIPTokenizer.from_pretrained(source)
        except OSError as error:
            raise UserError(
                f"no CLIP model at {source!r}: give a folder that CLIPModel.save_pretrained wrote (with its "
                f"tokenizer), or a name on the hub that can be reached ({str(error).splitlines()[0]})"
            ) from error
        return cls(model, tokenizer, name=source)

    @cached_property
    def description(self) -> str:
        """All that the score depends on: the model, its weights and the resize."""
        weights = fingerprint(self.model.state_dict())
        return f"{self.name}@{weights}, bicubic antialias to {self.size}, centre crop"

    @torch.inference_mode()
    def scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """The score [B] of each image [B, 3, H, W] in [0, 1] with its caption, 0 to 100."""
        if len(images) != len(captions):
            raise UserError(f"{len(images)} pictures but {len(captions)} captions")
        image = self.model.visual_projection(
            self.model.vision_model(pixel_values=preprocess(images, self.size)).pooler_output
        )
        tokens = self.tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(images.device)
        text = self.model.text_projection(self.model.text_model(**tokens).pooler_output)
        return 100.0 * F.cosine_similarity(image, text, dim=-1).clamp(min=0.0)

    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        """Adds images [B, 3, H, W] in [0, 1] and their captions."""
        values = self.scores(images, captions).to(torch.float64)
        self.count += len(values)
        self.total += values.sum()
        self.squares += values.square().sum()

    def compute(self) -> Tensor:
        """The mean score, 0 to 100."""
        return self.total / self.count

    def interval(self, confidence: float = 0.95) -> Interval:
        """The confidence interval of the mean; after a distributed run, within `sync_context()`."""
        return of_mean(float(self.total), float(self.squares), int(self.count), confidence)
