"""Tokenizers as the text of their files."""

import json
import tempfile
from pathlib import Path

from ldm.conditioning.pretrained import tokenizer_from_pretrained
from ldm.errors import UserError
from ldm.interop.nodes import SECOND
from ldm.interop.package import Tokenizer

TEXT_FILES = (".json", ".txt")


def tokenizer_files(folder: Path) -> Tokenizer:
    """The text files of a tokenizer's folder by name."""
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.suffix in TEXT_FILES}


def write_tokenizers(tokenizers: list[Tokenizer], folder: Path) -> None:
    """Writes a model folder's tokenizers: the first one's files, and a second one's in a folder of theirs."""
    for files, place in zip(tokenizers, (folder, folder / SECOND), strict=False):
        place.mkdir(parents=True)
        for name, content in files.items():
            (place / name).write_text(content)


def vocabulary(files: Tokenizer) -> dict[str, int]:
    """The numbers of a tokenizer's tokens, without those that were added to it."""
    if "vocab.json" in files:
        return dict(json.loads(files["vocab.json"]))
    return dict(json.loads(files["tokenizer.json"])["model"]["vocab"])


def load_tokenizer(
    name_or_path: str, subfolder: str = "", pad: str | None = None, most: int | None = None
) -> Tokenizer:
    """A tokenizer's files, from a folder or of a hub name; `pad` is another padding token.

    UserError where it has more than `most` tokens, those that a text encoder knows.
    """
    tokenizer = tokenizer_from_pretrained(name_or_path, subfolder)
    if most is not None and len(tokenizer) > most:
        raise UserError(
            f"the tokenizer {name_or_path} has {len(tokenizer)} tokens, the text encoder knows {most}: they are not of "
            "one model; give --tokenizer FOLDER"
        )
    if pad is not None:
        tokenizer.pad_token = pad
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return tokenizer_files(Path(folder))


def require_text_files(tokenizers: list[Tokenizer], origin: str) -> None:
    """UserError for a name in a file's description that would be written outside of a tokenizer's folder."""
    for name in (name for files in tokenizers for name in files):
        if Path(name).name != name or not name.endswith(TEXT_FILES):
            raise UserError(f"{origin} has a tokenizer's file {name!r}: expected names that end in {TEXT_FILES}")
