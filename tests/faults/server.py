"""A file server in a thread that answers range requests, and fails as a test tells it to."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("500", "503", "429", "reset", "stall", "short", "less")


@dataclass
class Served:
    """What a server was asked for: (path, first byte, last byte) of each request, in order of arrival."""

    url: str = ""
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)


def _handler(folder: Path, served: Served, fault: Callable[[int], str | None]) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            with lock:
                number = len(served.asked)
                served.asked.append((self.path, int(first or 0), int(last or -1)))
            kind = fault(number)
            path = folder / self.path.lstrip("/")
            if kind == "stall":
                served.stopped.wait(5)
                self.close_connection = True
            elif kind == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            elif kind is not None and kind.isdigit():
                self._answer(int(kind), {}, b"no")
            elif not path.is_file():
                self._answer(404, {}, b"nothing")
            else:
                less = (int(last) - int(first)) // 2 if kind == "less" else 0
                self._range(path, int(first), int(last) - less, cut=kind == "short")

        def _range(self, path: Path, first: int, last: int, cut: bool) -> None:
            total = path.stat().st_size
            if first >= total:
                return self._answer(416, {"Content-Range": f"bytes */{total}"}, b"")
            last = min(last, total - 1)
            body = path.read_bytes()[first : last + 1]
            headers = {
                "Content-Range": f"bytes {first}-{last}/{total}",
                "Last-Modified": self.date_time_string(int(path.stat().st_mtime)),
            }
            self._answer(206, headers, body, cut)

        def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

    return Handler


@contextmanager
def serving(folder: Path, fault: Callable[[int], str | None] = lambda number: None) -> Iterator[Served]:
    """Serves a folder; `fault` names what goes wrong with a request, by its number from 0, a fault or a status."""
    served = Served()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(folder, served, fault))
    server.daemon_threads = True
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        served.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
