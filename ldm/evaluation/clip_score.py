"""CLIP score: how well pictures match their captions."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTextConfig, CLIPVisionConfig

from ldm.checkpoint import fingerprint
from ldm.conditioning import tokenizer_from_pretrained
from ldm.evaluation.interval import of_mean
from ldm.evaluation.metric import Batch, Metric
from ldm.evaluation.preparation import Preparation
from ldm.evaluation.protocol import Value
from ldm.evaluation.vision import load_pretrained


class CLIPScore(Metric):
    """100 * max(cos(image, caption), 0), the mean over pictures (Hessel et al. 2021, with w = 100).

    `model` is a folder or a name on the Hugging Face hub, e.g. "openai/clip-vit-large-patch14". Long captions are cut
    so that the end-of-text token stays, from which CLIP reads the text's features.
    """

    higher_is_better = True

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = cast(CLIPModel, load_pretrained(CLIPModel, model))
        self.tokenizer = tokenizer_from_pretrained(model)
        size = cast(int, cast(CLIPVisionConfig, self.model.config.vision_config).image_size)
        self.preparation = Preparation(size, (size, size))  # bicubic, centre crop (Radford et al. 2021)
        self.max_length: int = cast(CLIPTextConfig, self.model.config.text_config).max_position_embeddings
        self.description = f"{model}@{fingerprint(self.model.state_dict())}, {self.preparation}"
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.inference_mode()
    def scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """The score [B] of each image [B, 3, H, W] in [0, 1] with its caption, 0 to 100."""
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

    def update(self, batch: Batch) -> None:
        values = self.scores(batch.images, batch.captions).to(torch.float64)
        self.count += len(values)
        self.total += values.sum()
        self.squares += values.square().sum()

    def compute(self) -> dict[str, Value]:
        interval = of_mean(float(self.total), float(self.squares), int(self.count))
        return {"clip_score": Value(float(self.total / self.count), *interval)}

    def descriptions(self) -> Mapping[str, str]:
        return {"clip_score": self.description}
