"""Captions as a Condition: the states of a CLIP text encoder, with captions dropped for guidance."""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.checkpoint import fingerprint
from ldm.conditioning.condition import Arguments, Condition, Widths
from ldm.conditioning.published import clip_widths, text_widths
from ldm.errors import UserError, nearest
from ldm.randomness import fold, uniform

log = logging.getLogger(__name__)

Fields = Mapping[str, Sequence[str] | Tensor]
"""What a batch says of its samples, by name, B entries each: texts, or numbers and pictures as tensors [B, ...]."""
Encode = Callable[[Tensor], Tensor]
"""A first stage's normalised latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]."""


class Conditioner(nn.Module, ABC):
    """What turns the fields of a batch into a Condition."""

    sees_mask = False
    """Whether it shows the network a picture's `mask` and what is beside it."""
    needs_image = False
    """Whether it is given the picture itself, which there is neither beside cached latents nor beside a prompt."""

    def bind(self, encode: Encode) -> None:
        """Is given the first stage's `encode`; one that shows pictures as latents keeps it."""

    def encoders(self) -> dict[str, "TextConditioner"]:
        """The frozen text encoders in it, by the name under which their states may be kept; none by default."""
        return {}

    @abstractmethod
    def widths(self, latent_channels: int) -> Widths:
        """How wide its conditions' fields are, beside latents of so many channels."""

    @classmethod
    def planned(cls, arguments: Arguments, latent_channels: int) -> Widths | None:
        """The `widths` of one that is still to be built, from its configuration; None where that does not tell."""
        return None

    @abstractmethod
    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The condition of B samples from `fields` (name -> B strings, or a tensor [B, ...]).

        `rng_keys` [B] int64 are the randomness keys of this visit of the samples; with them the conditioner
        drops what its options say (training). Without them nothing is drawn (sampling, evaluation).
        """

    @abstractmethod
    def empty(self, n: int) -> Condition:
        """The condition of n samples that says nothing: what guidance steers away from."""

    def __call__(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        return cast(Condition, super().__call__(fields, rng_keys))


def dropped(rng_keys: Tensor, field: str, probability: float) -> Tensor:
    """True [B] bool where `field` is dropped at this visit, drawn from `rng_keys` [B] int64.

    For conditions computed beforehand: `condition.where(dropped(rng_keys, "caption", 0.1), empty)`.
    """
    return uniform(fold(rng_keys, f"drop:{field}")) < probability


class TextConditioner(Conditioner):
    """Token states [B, L, D] of a CLIP text encoder (Rombach et al. 2022, section 3.3; L = max_length).

    field        the batch's field that holds the captions
    dropout      probability that a caption becomes "" at a visit (Ho and Salimans 2022), in [0, 1]
    layer        which layer's states: -1 the last, -2 the one before (SD 2, SDXL), ...
    final_norm   apply the encoder's final layer norm to them (SD 1 and 2; SDXL does without)
    pooled       also give `vector` [B, D]: the last layer's normed state at the end token
    projection   a linear map of `vector` to [B, P], as SDXL has it; None: as it is
    zero_empty_embedding   an empty caption's states and vector are zeros (SDXL), not the encoding of ""
    mask         also give `mask`; off, padding is attended as in Stable Diffusion
    frozen       the encoder stays in eval mode, without gradients
    max_length   tokens per caption with start and end; longer ones are cut, the end token kept

    A frozen one takes states that were made beforehand from the fields `NAME.tokens` (and `.vector`, `.mask`) instead
    of encoding, where they are there; NAME is `name`, which holds the fingerprint of the encoder and its options.

    `truncated` counts the captions that were cut since the start.
    Raises UserError for options that do not fit the encoder or the tokenizer.
    """

    def __init__(
        self,
        encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        field: str = "caption",
        dropout: float = 0.0,
        layer: int = -1,
        final_norm: bool = True,
        pooled: bool = False,
        mask: bool = False,
        frozen: bool = True,
        max_length: int = 77,
        projection: nn.Linear | None = None,
        zero_empty_embedding: bool = False,
    ) -> None:
        super().__init__()
        _check(encoder.config, tokenizer, dropout, layer, max_length)
        if projection is not None and not pooled:
            raise UserError("projection is a map of the pooled state: give pooled=true as well")
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.field = field
        self.dropout = dropout
        self.layer = layer
        self.final_norm = final_norm
        self.pooled = pooled
        self.mask = mask
        self.frozen = frozen
        self.max_length = max_length
        self.projection = projection
        self.zero_empty_embedding = zero_empty_embedding
        self.truncated = 0
        self._name: str | None = None
        self._empty: Condition | None = None
        if frozen:
            self.requires_grad_(False)
        self.train(self.training)

    def widths(self, latent_channels: int) -> Widths:
        """The encoder's width; that of the pooled state is the projection's where there is one."""
        width = int(self.encoder.config.hidden_size)
        pooled = self.projection.out_features if self.projection is not None else width
        return Widths(tokens=width, vector=pooled if self.pooled else 0)

    @classmethod
    def planned(cls, arguments: Arguments, latent_channels: int) -> Widths | None:
        """From the encoder's sizes."""
        return text_widths(arguments["encoder"], arguments.get("projection"), bool(arguments.get("pooled")))

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The captions' condition, see Conditioner.forward; UserError where the field is missing."""
        if self.field not in fields:
            raise UserError(f"the batch has no field {self.field!r} to condition on ({nearest(self.field, fields)})")
        drop = dropped(rng_keys, self.field, self.dropout) if rng_keys is not None and self.dropout > 0 else None
        if self.frozen and (made := self._made_beforehand(fields)) is not None:
            return made if drop is None else made.where(drop, self._empty_one())
        captions = [str(caption) for caption in fields[self.field]]
        if drop is not None:
            captions = ["" if d else caption for d, caption in zip(drop.tolist(), captions, strict=True)]
        return self._encode(captions)

    def empty(self, n: int) -> Condition:
        """The condition of "" for n samples."""
        one = self._encode([""])
        return one.select(torch.zeros(n, dtype=torch.int64))

    @property
    def name(self) -> str:
        """The name of states made beforehand: another encoder, tokenizer or option has another."""
        if self._name is None:
            options = (self.field, self.layer, self.final_norm, self.pooled, self.mask, self.max_length)
            vocabulary = sorted(self.tokenizer.get_vocab().items())
            told = repr((options, self.zero_empty_embedding, self.tokenizer.pad_token_id, vocabulary)).encode()
            weights = fingerprint(self.state_dict())
            self._name = f"text-{hashlib.sha256(told + weights.encode()).hexdigest()[:16]}"
        return self._name

    def encoders(self) -> dict[str, "TextConditioner"]:
        """Itself, where it is frozen."""
        return {self.name: self} if self.frozen else {}

    def states(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What to keep of captions: the fields that `forward` takes instead of encoding them."""
        return {f"{self.name}.{part}": value for part, value in self._encode(captions).inputs().items()}

    def _made_beforehand(self, fields: Fields) -> Condition | None:
        """The condition from states in the fields; None without any, UserError where they are another encoder's."""
        kept = [name for name in fields if name.startswith("text-")]
        if not kept:
            return None
        own = {name.removeprefix(f"{self.name}."): fields[name] for name in kept if name.startswith(f"{self.name}.")}
        if not own:
            others = ", ".join(sorted({name.split(".")[0] for name in kept}))
            raise UserError(
                f"the captions were encoded beforehand by {others}, this text encoder is {self.name}: make them anew, "
                "or encode in training (latent_text=false)"
            )
        return Condition(**cast(dict[str, Tensor], own)).to(self.encoder.device, self.encoder.dtype)

    def _empty_one(self) -> Condition:
        if self._empty is None or self._empty.inputs()["tokens"].device != self.encoder.device:
            self._empty = self.empty(1)
        return self._empty

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Token ids [B, max_length] int64 on the CPU: start, words, end, padding."""
        found = torch.full((len(captions), self.max_length), cast(int, self.tokenizer.pad_token_id))
        rows = found.numpy()
        backend = self.tokenizer.backend_tokenizer  # without what transformers adds: offsets, masks, copies
        backend.no_truncation()
        backend.no_padding()
        for row, encoding in zip(rows, backend.encode_batch_fast(list(captions)), strict=True):
            ids = self._cut(encoding.ids)
            row[: len(ids)] = ids
        return found

    def encode(self, ids: Tensor) -> Condition:
        """The condition of token ids [B, L]; with gradients only where the encoder is trained."""
        ids = ids.to(self.encoder.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            output = self.encoder(input_ids=ids, output_hidden_states=True)
            states = output.hidden_states[self.layer]  # [B, L, D], before the final norm
            states = self.encoder.final_layer_norm(states) if self.final_norm else states
            end = (ids == self.tokenizer.eos_token_id).int().argmax(dim=1)  # [B], the first end token
            vector = output.last_hidden_state[torch.arange(len(ids)), end] if self.pooled else None
            vector = self.projection(vector) if self.projection is not None else vector
        mask = torch.arange(ids.shape[1], device=ids.device) <= end[:, None] if self.mask else None
        return Condition(tokens=states, mask=mask, vector=vector)

    def _encode(self, captions: Sequence[str]) -> Condition:
        condition = self.encode(self.tokens(captions))
        if not self.zero_empty_embedding:
            return condition
        empty = torch.tensor([caption == "" for caption in captions], dtype=torch.bool)
        zeros = {name: torch.zeros_like(value) for name, value in condition.inputs().items()}
        return condition.where(empty, Condition(**{**zeros, "mask": condition.mask}))  # attending to nothing gives NaN

    def train(self, mode: bool = True) -> "TextConditioner":
        """Set the mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.train(False)
            if self.projection is not None:
                self.projection.train(False)
        return self

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_length:
            return ids
        if self.truncated == 0:
            message = "a caption of %d tokens is cut to %d; further ones are counted in `truncated`"
            log.warning(message, len(ids), self.max_length)
        self.truncated += 1
        return [*ids[: self.max_length - 1], cast(int, self.tokenizer.eos_token_id)]


def _check(config: CLIPTextConfig, tokenizer: CLIPTokenizer, dropout: float, layer: int, max_length: int) -> None:
    if not 0 <= dropout <= 1:
        raise UserError(f"dropout={dropout} is not a probability: give a number from 0 to 1")
    if not -config.num_hidden_layers <= layer <= -1:
        raise UserError(f"layer={layer}: the text encoder has layers -{config.num_hidden_layers} to -1")
    if not 2 <= max_length <= config.max_position_embeddings:
        raise UserError(f"max_length={max_length}: the text encoder takes 2 to {config.max_position_embeddings} tokens")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the text encoder knows {config.vocab_size}: they are not of "
            "one model; take both from the same folder, or build the encoder for it with clip_text_for(tokenizer, ...)"
        )


def clip_text_from_config(
    hidden_size: int = 768,
    layers: int = 12,
    heads: int = 12,
    intermediate: int = 3072,
    vocab: int = 49408,
    max_position: int = 77,
    act: str = "quick_gelu",
    bos: int = 49406,
    eos: int = 49407,
    pad: int = 49407,
) -> CLIPTextModel:
    """A text encoder with random weights; the defaults are CLIP ViT-L/14's (123,060,480 parameters)."""
    if hidden_size % heads:
        raise UserError(f"hidden_size={hidden_size} is not a multiple of heads={heads}")
    config = CLIPTextConfig(
        hidden_size=hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=max_position,
        hidden_act=act,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return CLIPTextModel(config)


def clip_text_for(
    tokenizer: CLIPTokenizer,
    hidden_size: int = 768,
    layers: int = 12,
    heads: int = 12,
    intermediate: int = 3072,
    max_position: int = 77,
    act: str = "quick_gelu",
    token_std: float = 0.02,
    position_std: float = 0.02,
) -> CLIPTextModel:
    """A text encoder with random weights whose vocabulary and special tokens are the tokenizer's.

    `token_std` and `position_std` are the deviations that the embeddings begin with. CLIP's 0.02 is for long
    training; beside it the layers' random outputs are large, and words are told apart only after many steps.
    """
    if token_std <= 0 or position_std <= 0:
        raise UserError(f"token_std={token_std}, position_std={position_std}: expected numbers above 0")
    encoder = clip_text_from_config(
        hidden_size,
        layers,
        heads,
        intermediate,
        vocab=len(tokenizer),
        max_position=max_position,
        act=act,
        bos=cast(int, tokenizer.bos_token_id),
        eos=cast(int, tokenizer.eos_token_id),
        pad=cast(int, tokenizer.pad_token_id),
    )
    nn.init.normal_(encoder.embeddings.token_embedding.weight, std=token_std)
    nn.init.normal_(encoder.embeddings.position_embedding.weight, std=position_std)
    return encoder


def clip_text_from_pretrained(name_or_path: str, subfolder: str = "", clip_skip: int = 0) -> CLIPTextModel:
    """The text encoder in a folder (or of a hub name); `subfolder` is "text_encoder" in a diffusers folder.

    The last `clip_skip` layers are left out: SD 2 uses 23 of OpenCLIP ViT-H's 24. Raises UserError where
    it cannot be had, or has no more layers than that.
    """
    try:
        encoder = CLIPTextModel.from_pretrained(name_or_path, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise _not_loaded("text encoder", name_or_path, subfolder, "config.json, model.safetensors") from error
    if not 0 <= clip_skip < encoder.config.num_hidden_layers:
        raise UserError(
            f"clip_skip={clip_skip}: the text encoder at {name_or_path!r} has "
            f"{encoder.config.num_hidden_layers} layers, and one has to stay"
        )
    if clip_skip:
        encoder.config.num_hidden_layers -= clip_skip
        encoder.encoder.layers = encoder.encoder.layers[: encoder.config.num_hidden_layers]
    return encoder


def clip_projection_from_pretrained(name_or_path: str, subfolder: str = "") -> nn.Linear:
    """The linear map of the pooled state in a text encoder's folder (or of a hub name); UserError without one."""
    files = "config.json, model.safetensors with a text_projection"
    try:
        width = clip_widths(name_or_path, subfolder)[1]  # which transformers looks for in the wrong place (#25622)
        loaded: Any = CLIPTextModelWithProjection.from_pretrained(
            name_or_path, subfolder=subfolder, projection_dim=width, output_loading_info=True
        )
        encoder, told = loaded
    except (OSError, ValueError) as error:
        raise _not_loaded("text encoder", name_or_path, subfolder, files) from error
    if any("text_projection" in name for name in told["missing_keys"]):
        raise _not_loaded("text encoder with a projection", name_or_path, subfolder, files)
    return cast(nn.Linear, encoder.text_projection)


def clip_projection(hidden_size: int, projection_dim: int) -> nn.Linear:
    """A linear map of the pooled state [B, hidden_size] to [B, projection_dim] with random weights, as CLIP has it."""
    return nn.Linear(hidden_size, projection_dim, bias=False)


def tokenizer_from_pretrained(name_or_path: str, subfolder: str = "", pad_token: str | None = None) -> CLIPTokenizer:
    """The tokenizer in a folder (or of a hub name); `subfolder` is "tokenizer" in a diffusers folder.

    `pad_token` is another padding than its own: OpenCLIP's is "!". Raises UserError where it cannot be had.
    """
    files = "tokenizer_config.json and tokenizer.json, or vocab.json and merges.txt"
    try:
        tokenizer = CLIPTokenizer.from_pretrained(name_or_path, subfolder=subfolder)
    except (OSError, ValueError, TypeError) as error:
        raise _not_loaded("tokenizer", name_or_path, subfolder, files) from error
    if len(tokenizer) <= 3:  # transformers 5 makes one of special tokens alone where it finds no files
        raise _not_loaded("tokenizer", name_or_path, subfolder, files)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise UserError(f"pad_token={pad_token!r}: the tokenizer has no such token")
        tokenizer.pad_token = pad_token
    return cast(CLIPTokenizer, tokenizer)


def _not_loaded(what: str, name: str, subfolder: str, files: str) -> UserError:
    where = f"{name}/{subfolder}" if subfolder else name
    return UserError(
        f"no {what} at {where!r}: it is neither a folder with {files}, nor could it be downloaded from the "
        "hub under that name (is this machine offline, or HF_HUB_OFFLINE set?). On a machine with a "
        f"network run `hf download {name} --local-dir FOLDER`, and give FOLDER as the path"
    )
