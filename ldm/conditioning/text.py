"""Captions as a Condition: the token states of a text encoder, with captions dropped for guidance."""

import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ldm.checkpoint import fingerprint
from ldm.conditioning.condition import Condition, Widths
from ldm.conditioning.conditioner import Conditioner, Fields, check_probability, dropout_mask, texts
from ldm.errors import UserError

if TYPE_CHECKING:  # transformers takes longer to import than torch: loaded where a model of it is built
    from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

FINAL_NORMS = "final_layer_norm", "encoder.final_layer_norm", "norm", "language_model.norm", "final_norm", "ln_f"
"""The names of the norm after the last layer: CLIP, T5, Llama and its kin, Gemma 3, ModernBERT, GPT-2."""


class TextConditioner(Conditioner):
    """Token states [B, L, D] of a text encoder (Rombach et al. 2022, section 3.3; L = max_length).

    encoder      a text model of transformers: CLIP, the encoder half of T5 or UMT5, BERT, a decoder such as Gemma
    tokenizer    the encoder's tokenizer; its padding token fills every caption up to max_length, on the right
    field        the batch's field that holds the captions
    dropout      probability that a caption becomes "" at a visit (Ho and Salimans 2022), in [0, 1]
    layer        which layer's states: -1 the last, -2 the one before (SD 2, SDXL), ...
    final_norm   apply the encoder's final norm to them (SD 1 and 2, T5; SDXL does without)
    pooled       also give `vector` [B, D]: CLIP's last normed state at the end token
    projection   a linear map of `vector` to [B, P], as SDXL has it; None: no map
    zero_empty_embedding   an empty caption's states and vector are zeros (SDXL), not the encoding of ""
    mask         give the network a `mask` of the tokens that are not padding, and have the encoder attend to these
                 alone (CLIP's words attend to what precedes them in any case); None: false for CLIP, as in Stable
                 Diffusion, true for others, as PixArt-alpha uses T5 and Sana Gemma. SD 3 and FLUX use T5 with false
    frozen       the encoder stays in eval mode, without gradients
    max_length   tokens per caption, special ones included; longer captions are truncated, their end token kept

    A frozen one takes precomputed states from the fields `NAME.tokens` (and `.vector`, `.mask`) instead of encoding,
    where the batch has them; NAME is `name`, which holds the fingerprint of the encoder and its options.

    `truncated` counts the captions that were truncated since the start.
    Raises UserError for options that do not fit the encoder or the tokenizer.
    """

    def __init__(
        self,
        encoder: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerFast",
        field: str = "caption",
        dropout: float = 0.0,
        layer: int = -1,
        final_norm: bool = True,
        pooled: bool = False,
        mask: bool | None = None,
        frozen: bool = True,
        max_length: int = 77,
        projection: nn.Linear | None = None,
        zero_empty_embedding: bool = False,
    ) -> None:
        from transformers import CLIPTextModel

        super().__init__()
        check_probability("dropout", dropout)
        self.is_clip = isinstance(encoder, CLIPTextModel)
        modules = dict(encoder.named_modules())
        self.norm_name = next((name for name in FINAL_NORMS if name in modules), None)
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.field = field
        self.dropout = dropout
        self.layer = layer
        self.final_norm = final_norm
        self.pooled = pooled
        self.mask = mask if mask is not None else not self.is_clip
        self.frozen = frozen
        self.max_length = max_length
        self.projection = projection
        self.zero_empty_embedding = zero_empty_embedding
        self.truncated = 0
        self._name: str | None = None
        self._empty: Condition | None = None
        self._check_options()
        if frozen:
            self.requires_grad_(False)
        self.train(self.training)

    def _check_options(self) -> None:
        """Raise UserError for a tokenizer that is not the encoder's, and for states that the encoder does not have."""
        tokenizer, config = self.tokenizer, self.encoder.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)  # None: any length, as T5's relative positions
        if self.max_length < 2 or (limit is not None and self.max_length > limit):
            most = limit or "any number of"
            raise UserError(f"max_length={self.max_length}: the text encoder takes 2 to {most} tokens")
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} has no `tokenizers` backend: give a folder with a tokenizer.json"
            )
        if tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no padding token: give tokenizer.pad_token, one of its tokens")
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, the text encoder {config.vocab_size}: they are not of one "
                "model; take both from the same folder, or build the encoder for it with clip_text_for(tokenizer, ...)"
            )
        model, layers = type(self.encoder).__name__, config.num_hidden_layers
        if not -layers <= self.layer <= -1:
            raise UserError(f"layer={self.layer}: the text encoder has layers -{layers} to -1")
        if self.final_norm and self.norm_name is None:
            raise UserError(f"final_norm=true: {model} has no norm after its last layer; give final_norm=false")
        if not self.final_norm and self.norm_name is not None and self.layer == -1 and not self.is_clip:
            raise UserError(f"layer=-1 final_norm=false: {model} has its last states normed only; give final_norm=true")
        if self.pooled and not self.is_clip:
            raise UserError(f"pooled=true: {model} has no pooled state, only CLIP has; give pooled=false")
        if self.projection is not None and not self.pooled:
            raise UserError("projection is a map of the pooled state: give pooled=true as well")

    def widths(self, latent_channels: int) -> Widths:
        """The encoder's width, and the pooled state's, after the projection."""
        width = int(self.encoder.config.get_text_config().hidden_size)
        pooled = self.projection.out_features if self.projection is not None else width
        return Widths(tokens=width, vector=pooled if self.pooled else 0)

    def forward(self, fields: Fields, rng_keys: Tensor | None = None) -> Condition:
        """The captions' condition, see Conditioner.forward; UserError where the field is missing."""
        captions = texts(fields, self.field)
        drop = dropout_mask(rng_keys, self.field, self.dropout) if rng_keys is not None and self.dropout > 0 else None
        if self.frozen and (precomputed := self._precomputed(fields)) is not None:
            return precomputed if drop is None else precomputed.where(drop, self._empty_condition())
        if drop is not None:
            captions = ["" if d else caption for d, caption in zip(drop.tolist(), captions, strict=True)]
        return self.encode(captions)

    def encode(self, captions: Sequence[str]) -> Condition:
        """The condition of captions [B]; with gradients only where the encoder is trained."""
        ids, words = (tokens.to(self.encoder.device) for tokens in self.tokenize(captions))  # [B, L]
        attention = {"attention_mask": words.long()} if self.mask and not self.is_clip else {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            output = self.encoder(input_ids=ids, output_hidden_states=True, **attention)
            states, vector = output.last_hidden_state, None  # [B, L, D]
            if self.layer < -1 or not self.final_norm:
                states = output.hidden_states[self.layer]  # before the final norm
                states = self.encoder.get_submodule(str(self.norm_name))(states) if self.final_norm else states
            if self.pooled:
                end = (ids == self.tokenizer.eos_token_id).int().argmax(dim=1)  # [B], the first end token
                vector = output.last_hidden_state[torch.arange(len(ids)), end]
                vector = vector if self.projection is None else self.projection(vector)
        condition = Condition(tokens=states, mask=words if self.mask else None, vector=vector)
        if not self.zero_empty_embedding:
            return condition
        empty = torch.tensor([caption == "" for caption in captions], dtype=torch.bool)
        zeros = {name: torch.zeros_like(value) for name, value in condition.inputs().items()}
        return condition.where(empty, Condition(**{**zeros, "mask": condition.mask}))  # attending to nothing gives NaN

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids [B, max_length] int64 on the CPU, padded on the right, and which are not padding, bool.

        Of a caption without any token ("" where the tokenizer adds none) the first padding token counts.
        """
        ids = torch.full((len(captions), self.max_length), cast(int, self.tokenizer.pad_token_id))
        rows = ids.numpy()
        lengths = torch.ones(len(captions), dtype=torch.int64)
        backend = self.tokenizer.backend_tokenizer  # without transformers' own extras: offsets, masks, copies
        backend.no_truncation()
        backend.no_padding()
        for i, encoding in enumerate(backend.encode_batch_fast(list(captions))):
            row = encoding.ids
            if len(row) > self.max_length:
                end = row[-1:] if encoding.special_tokens_mask[-1] else []
                if self.truncated == 0:
                    message = "a caption of %d tokens is truncated to %d; further ones are counted in `truncated`"
                    log.warning(message, len(row), self.max_length)
                self.truncated += 1
                row = [*row[: self.max_length - len(end)], *end]
            rows[i, : len(row)] = row
            lengths[i] = max(1, len(row))
        return ids, torch.arange(self.max_length) < lengths[:, None]

    @property
    def name(self) -> str:
        """The name of precomputed states: another encoder, tokenizer or option has another."""
        if self._name is None:
            options = (self.field, self.layer, self.final_norm, self.pooled, self.mask, self.max_length)
            vocabulary = sorted(self.tokenizer.get_vocab().items())
            description = repr((options, self.zero_empty_embedding, self.tokenizer.pad_token_id, vocabulary)).encode()
            weights = fingerprint(self.state_dict())
            self._name = f"text-{hashlib.sha256(description + weights.encode()).hexdigest()[:16]}"
        return self._name

    def encoders(self) -> "dict[str, TextConditioner]":
        """Itself, where it is frozen."""
        return {self.name: self} if self.frozen else {}

    def states(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The precomputed states of captions: the fields that `forward` takes instead of encoding."""
        return {f"{self.name}.{part}": value for part, value in self.encode(captions).inputs().items()}

    def _precomputed(self, fields: Fields) -> Condition | None:
        """The condition from states in the fields; None without any, UserError where another encoder made them."""
        names = [name for name in fields if name.startswith("text-")]
        if not names:
            return None
        prefix = f"{self.name}."
        parts = {name.removeprefix(prefix): fields[name] for name in names if name.startswith(prefix)}
        if not parts:
            others = ", ".join(sorted({name.split(".")[0] for name in names}))
            raise UserError(
                f"the captions' states were precomputed by {others}, this text encoder is {self.name}: compute them "
                "again, or encode in training (latent_text=false)"
            )
        return Condition(**cast(dict[str, Tensor], parts)).to(self.encoder.device, self.encoder.dtype)

    def _empty_condition(self) -> Condition:
        """The unconditional embedding, one row."""
        if self._empty is None or self._empty.inputs()["tokens"].device != self.encoder.device:
            self._empty = self.encode([""])
        return self._empty

    def train(self, mode: bool = True) -> "TextConditioner":
        """Set the mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.train(False)
            if self.projection is not None:
                self.projection.train(False)
        return self


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
) -> "CLIPTextModel":
    """A text encoder with random weights; the defaults are CLIP ViT-L/14's (123,060,480 parameters)."""
    from transformers import CLIPTextConfig, CLIPTextModel

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
    tokenizer: "CLIPTokenizer",
    hidden_size: int = 768,
    layers: int = 12,
    heads: int = 12,
    intermediate: int = 3072,
    max_position: int = 77,
    act: str = "quick_gelu",
    token_std: float = 0.02,
    position_std: float = 0.02,
) -> "CLIPTextModel":
    """A text encoder with random weights whose vocabulary and special tokens are the tokenizer's.

    `token_std` and `position_std` are the embeddings' initial standard deviations. CLIP's 0.02 is for long
    training; next to it the layers' random outputs are large, and words differ only after many steps.
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


def clip_projection(hidden_size: int, projection_dim: int) -> nn.Linear:
    """A linear map of the pooled state [B, hidden_size] to [B, projection_dim] with random weights, as CLIP has it."""
    return nn.Linear(hidden_size, projection_dim, bias=False)
