"""A CLIP tokenizer trained on the captions of a data set, for text encoders that are trained from scratch."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from ldm.conditioning.pretrained import tokenizer_from_pretrained
from ldm.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
Merge = tuple[str, str]


def captions_tokenizer(
    captions: Iterable[str],
    path: str | os.PathLike[str],
    vocab_size: int = 49408,
    max_length: int = 77,
    min_frequency: int = 2,
) -> "CLIPTokenizer":
    """The tokenizer in the folder `path`; where there is none, it is trained on `captions` and saved there.

    Byte-level BPE in CLIP's layout (Radford et al. 2021, section 2.4): 256 bytes, 256 bytes that end a
    word, the merges in order, start, end; lower case; padded with the end token. Any text has ids. Merges
    stop at `vocab_size` tokens, or when no pair occurs `min_frequency` times. The same captions, in any
    order, give the same files, and the folder is written atomically, so several processes may call this.
    transformers, diffusers and older tools (vocab.json, merges.txt) read the folder.
    Raises UserError for a vocabulary that is too small, or no captions.
    """
    from transformers import CLIPTokenizer

    path = Path(path)
    if not path.exists():
        merges = _train_merges(captions, vocab_size, min_frequency)
        # CLIPTokenizer passes the merges to `tokenizers`, which takes pairs; its annotation says strings.
        pairs = cast(list[str], merges)
        tokenizer = CLIPTokenizer(vocab=_vocab(merges), merges=pairs, model_max_length=max_length)
        _save(tokenizer, path)
    return cast("CLIPTokenizer", tokenizer_from_pretrained(str(path)))


def _byte_letters() -> list[str]:
    """The letter that stands for each byte, in CLIP's order: the 188 visible ones first (GPT-2's table)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 256 - len(visible)
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(hidden)]


def _alphabet() -> list[str]:
    letters = _byte_letters()
    return letters + [letter + WORD_END for letter in letters]


def _train_merges(captions: Iterable[str], vocab_size: int, min_frequency: int) -> list[Merge]:
    """The BPE merges of the captions, most frequent first."""
    from transformers import CLIPTokenizer

    alphabet = _alphabet()
    if vocab_size < len(alphabet) + 2:
        raise UserError(f"vocab_size={vocab_size}: bytes, start and end alone take {len(alphabet) + 2}")
    clip = CLIPTokenizer().backend_tokenizer
    scratch = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    scratch.normalizer, scratch.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    # As special tokens the letters have fixed ids; ties between pairs are broken by id.
    trainer = BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=min_frequency,
        special_tokens=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    scratch.train_from_iterator(captions, trainer)
    merges = json.loads(scratch.to_str())["model"]["merges"]
    if not merges:
        raise UserError("no tokenizer can be trained: the captions are empty or no word occurs in them twice")
    return [(left, right) for left, right in merges]


def _vocab(merges: list[Merge]) -> dict[str, int]:
    """Token -> id in CLIP's layout; the end token is the highest."""
    words = dict.fromkeys(left + right for left, right in merges)
    return {token: i for i, token in enumerate([*_alphabet(), *words, START, END])}


def _save(tokenizer: "CLIPTokenizer", path: Path) -> None:
    """Write a temporary folder and rename it to `path`; the finished folder of another process is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        folder = unfinished / path.name
        folder.mkdir()
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(str(folder))
        try:
            os.rename(folder, path)
        except OSError:
            if not path.exists():
                raise
    finally:
        shutil.rmtree(unfinished)
