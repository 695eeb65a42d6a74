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
from ldm.conditioning import tokenizer_from_pretrained
from ldm.errors import UserError
from ldm.evaluation.interval import Interval, of_mean
from ldm.evaluation.preparation import Preparation
from ldm.evaluation.vision import load_pretrained


def preparation(size: int) -> Preparation:
    """CLIP's: the shorter side to `size` pixels (bicubic, antialias), centre crop (Radford et al. 2021)."""
    return Preparation(size, (size, size))


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
        size = cast(int, cast(CLIPVisionConfig, model.config.vision_config).image_size)
        self.preparation = preparation(size)
        self.max_length: int = cast(CLIPTextConfig, model.config.text_config).max_position_embeddings
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def from_pretrained(cls, source: str) -> Self:
        """With a CLIP of a folder or of the Hugging Face hub, e.g. "openai/clip-vit-large-patch14"."""
        model = load_pretrained(CLIPModel, source)
        return cls(cast(CLIPModel, model), cast(CLIPTokenizer, tokenizer_from_pretrained(source)), name=source)

    @cached_property
    def description(self) -> str:
        """All that the score depends on: the model, its weights and the resize."""
        weights = fingerprint(self.model.state_dict())
        return f"{self.name}@{weights}, {self.preparation}"

    @torch.inference_mode()
    def scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """The score [B] of each image [B, 3, H, W] in [0, 1] with its caption, 0 to 100."""
        if len(images) != len(captions):
            raise UserError(f"{len(images)} pictures but {len(captions)} captions")
        images = images.to(self.model.device)
        pixels = self.preparation((images.float().clamp(0.0, 1.0) * 255.0).round())
        image = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
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
