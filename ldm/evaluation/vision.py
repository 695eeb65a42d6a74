"""Vision models of transformers as feature networks: CLIP, DINOv2 and any other with a pooled output."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, TypeAlias, cast

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from ldm.errors import UserError
from ldm.evaluation.features import Features
from ldm.evaluation.preparation import Preparation

Loader: TypeAlias = type[AutoModel] | type[PreTrainedModel]


def load_pretrained(kind: Loader, source: str, unused: tuple[str, ...] = (), **options: Any) -> nn.Module:
    """A model in evaluation mode, frozen; `unused` are beginnings of names of weights that may be missing.

    UserError where it is not available, or lacks weights, which transformers would initialize at random.
    """
    try:
        loaded: Any = kind.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise UserError(not_there(source, error)) from error
    model, loading = loaded
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith(unused))
    if missing:
        raise UserError(f"{source} lacks {len(missing)} weights of {type(model).__name__}, e.g. {missing[0]}")
    return cast(nn.Module, model.train(False).requires_grad_(False))


def not_there(source: str, error: Exception) -> str:
    """The message for a model that is neither a folder here nor available from the hub."""
    return (
        f"no model at {source!r}: it is neither a folder with config.json, preprocessor_config.json and "
        "model.safetensors, nor could it be downloaded from the Hugging Face hub under that name (is this machine "
        "offline, or HF_HUB_OFFLINE set?). On a machine with a network run "
        f"`hf download {source} --local-dir FOLDER`, copy FOLDER here and give its path "
        f"({str(error).splitlines()[0]})"
    )


class VisionFeatures(Features):
    """An output of a vision model, its pictures prepared as its image processor says.

    `source` is a folder that transformers wrote, or a name on the hub; `name` is the network's name in the label of a
    distance, by default the source (of a folder its last part).
    """

    kind: Loader = AutoModel
    output: str
    unused: tuple[str, ...] = ()

    def __init__(self, source: str, name: str | None = None) -> None:
        super().__init__(self.load(source))
        self.name = name or (Path(source).resolve().name if Path(source).is_dir() else source)
        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(source)
        except OSError as error:
            raise UserError(not_there(source, error)) from error
        self.preparation = Preparation.from_processor(processor, source)
        self.resize = f"{self.output}, {self.preparation}"

    def load(self, source: str) -> nn.Module:
        """The vision model of a source."""
        return load_pretrained(self.kind, source, self.unused)

    def extract(self, pixels: Tensor) -> Tensor:
        return self.read(self.network(pixel_values=self.preparation(pixels)))

    @abstractmethod
    def read(self, outputs: Any) -> Tensor:
        """The features [B, D] among the outputs of the model."""


class ClipFeatures(VisionFeatures):
    """CLIP's image embeddings, after the projection (as in clean-fid's CLIP-FID and in CMMD)."""

    kind = CLIPVisionModelWithProjection
    output = "image_embeds"

    def load(self, source: str) -> nn.Module:
        try:
            config: Any = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(not_there(source, error)) from error
        half = getattr(config, "vision_config", config)  # of a CLIP with both halves
        half.projection_dim = config.projection_dim  # which such a file may say for both halves alone
        return load_pretrained(self.kind, source, config=half)

    def read(self, outputs: Any) -> Tensor:
        return cast(Tensor, outputs.image_embeds)


class ClassTokenFeatures(VisionFeatures):
    """The class token of the last layer: DINOv2's features, as in Stein et al. 2023; DINO's, ViT's."""

    output = "class token"
    unused = ("pooler.",)

    def read(self, outputs: Any) -> Tensor:
        return cast(Tensor, outputs.last_hidden_state[:, 0])


class PooledFeatures(VisionFeatures):
    """The pooled output of any vision model that has one: ConvNeXt, ResNet, Swin, BEiT, SigLIP's image half, ..."""

    output = "pooler_output"

    def load(self, source: str) -> nn.Module:
        model = super().load(source)
        return cast(nn.Module, getattr(model, "vision_model", model))  # of a model with a text half

    def read(self, outputs: Any) -> Tensor:
        return cast(Tensor, outputs.pooler_output).flatten(1)
