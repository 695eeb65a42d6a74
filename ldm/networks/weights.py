"""Files of published weights: where they are, and their download."""

import hashlib
import re
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import torch
from tqdm import tqdm

from ldm.checkpoint import sha256, write_atomic
from ldm.errors import UserError

CHUNK = 1 << 20  # bytes


def weights_folder() -> Path:
    """The folder of downloaded weights: torch.hub's, which TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights(source: str | Path | None, published: str, size: str) -> Path:
    """The file of weights that `source` means: a path, an http(s) address, or None for the published file.

    The published file is looked for in `weights_folder()` and never downloaded without an address. An address is
    downloaded there once, and its SHA-256, which is compared whenever the file is used again. `size` of the published
    file is for the UserError, which says where to get it.
    """
    if source is not None and re.match(r"https?://", str(source)):
        return downloaded(str(source))
    path = weights_folder() / Path(published).name if source is None else Path(source)
    if not path.is_file():
        raise UserError(
            f"there is no file {path}. It would hold the weights {Path(published).name} ({size}), published at "
            f"{published}. Put that file at {weights_folder() / Path(published).name}, or give `path`: the "
            "file, or an http(s) address to download it from"
        )
    return path


def downloaded(address: str) -> Path:
    """The file that an address was downloaded to, now or earlier; UserError where it is not complete."""
    folder = hashlib.sha256(address.encode()).hexdigest()[:16]
    path = weights_folder() / folder / Path(urlsplit(address).path).name
    record = path.with_name(f"{path.name}.sha256")
    if path.is_file() and record.is_file():
        if sha256(path) != record.read_text().strip():
            raise UserError(
                f"{path} has changed since it was downloaded from {address} (its SHA-256 differs): delete it"
            )
        return path
    try:
        with write_atomic(path) as temporary:
            digest = _download(address, temporary)
            prefix = re.search(r"-([0-9a-f]{8,})\.", path.name)  # torch.hub's convention
            if prefix and not digest.startswith(prefix[1]):
                raise OSError(f"the file's SHA-256 begins with {digest[: len(prefix[1])]}, its name says {prefix[1]}")
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(
            f"{address} could not be downloaded ({error}). Check the address and the network; or download it "
            "elsewhere, copy it here, and give the file's path instead"
        ) from error
    with write_atomic(record) as temporary:
        temporary.write_text(f"{digest}\n")
    return path


def _download(address: str, path: Path) -> str:
    """Writes what an address gives to `path`; its SHA-256. OSError where fewer bytes came than the header says."""
    digest = hashlib.sha256()
    with urlopen(address, timeout=60) as response, path.open("wb") as file:
        length = int(response.headers.get("Content-Length", -1))
        with tqdm(
            total=length if length > 0 else None,
            unit="B",
            unit_scale=True,
            desc=Path(urlsplit(address).path).name,
            leave=False,
        ) as bar:
            while part := response.read(CHUNK):
                digest.update(part)
                file.write(part)
                bar.update(len(part))
        if length >= 0 and file.tell() != length:
            raise OSError(f"{file.tell()} of {length} bytes came")
    return digest.hexdigest()
