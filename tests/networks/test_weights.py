"""Files of weights: given, published, downloaded; each failure says which file, where from, and where to put it."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.networks.weights import downloaded, find_weights, weights_folder

PUBLISHED = "https://example.org/releases/net-0123abcd.pth"


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; what is below /short breaks off."""

    def log_message(self, *arguments: object) -> None: ...

    def do_GET(self) -> None:
        if self.path.startswith("/short"):
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"only this")
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the files below tmp_path/served."""
    (tmp_path / "served").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served"))) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_a_path_is_taken_as_it_is_and_none_is_the_published_file(tmp_path: Path, home: Path) -> None:
    (tmp_path / "mine.pth").write_bytes(b"x")
    assert find_weights(tmp_path / "mine.pth", PUBLISHED, "1 MB") == tmp_path / "mine.pth"
    assert weights_folder() == home
    home.mkdir(parents=True)
    (home / "net-0123abcd.pth").write_bytes(b"x")
    assert find_weights(None, PUBLISHED, "1 MB") == home / "net-0123abcd.pth"


@pytest.mark.parametrize("source", [None, "/nowhere/net.pth"])
def test_a_missing_file_is_told_with_its_source_and_its_place(source: str | None, home: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_weights(source, PUBLISHED, "1 MB")
    for told in (source or str(home), "net-0123abcd.pth", "1 MB", PUBLISHED, str(home / "net-0123abcd.pth"), "`path`"):
        assert told in str(caught.value)


def test_an_address_is_downloaded_once_and_kept_with_its_sum(server: str, tmp_path: Path) -> None:
    content = b"weights" * 1000
    (tmp_path / "served" / "net.pth").write_bytes(content)
    path = find_weights(f"{server}/net.pth", PUBLISHED, "1 MB")
    assert path.read_bytes() == content and path.name == "net.pth"
    assert path.with_name("net.pth.sha256").read_text().strip() == hashlib.sha256(content).hexdigest()
    (tmp_path / "served" / "net.pth").unlink()
    assert downloaded(f"{server}/net.pth") == path
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="SHA-256 differs"):
        downloaded(f"{server}/net.pth")


def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(server: str, tmp_path: Path, home: Path) -> None:
    (tmp_path / "served" / "net-0123abcd.pth").write_bytes(b"another file")
    for name, reason in (("gone.pth", "404"), ("short.pth", "9 of 100 bytes"), ("net-0123abcd.pth", "its name says")):
        with pytest.raises(UserError, match=f"could not be downloaded .*{reason}.*give the file's path"):
            downloaded(f"{server}/{name}")
    with pytest.raises(UserError, match="could not be downloaded"):
        downloaded("http://127.0.0.1:1/net.pth")
    assert not [path for path in home.rglob("*") if path.is_file()]
