"""A web server of a folder that answers byte ranges, and goes wrong when it is told to."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path


class RangeServer(http.server.ThreadingHTTPServer):
    """`faults` are done one a request, in order: a status to answer, or `short`, `reset`, `slow`, `whole`."""

    daemon_threads = True
    request_queue_size = 128  # the default of 5 makes connections wait a second where many come at once

    def __init__(self, folder: Path, faults: list[int | str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults = folder, list(faults or [])
        self.always: int | str | None = None  # a fault of every request
        self.asked: list[tuple[str, str]] = []
        self.sent = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None: ...


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: RangeServer

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.asked.append((self.path, self.headers.get("Range", "")))
            fault = server.faults.pop(0) if server.faults else server.always
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(1)
        if isinstance(fault, int):
            self.answer(fault, b"")
            return
        path = server.folder / self.path.lstrip("/")
        if path.is_dir():
            names = (f'<a href="{item.name}{"/" * item.is_dir()}">.</a>' for item in sorted(path.iterdir()))
            self.answer(200, "".join(names).encode(), {"Content-Type": "text/html"})
            return
        if not path.is_file():
            self.answer(404, b"")
            return
        whole = path.stat().st_size
        asked = self.headers.get("Range", "")
        if not asked or fault == "whole":
            self.answer(200, path.read_bytes())
            return
        first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        last = min(last, whole - 1)
        if first >= whole:
            self.answer(416, b"")
            return
        with path.open("rb") as file:
            file.seek(first)
            data = file.read(last + 1 - first)
        self.answer(206, data, {"Content-Range": f"bytes {first}-{last}/{whole}"}, short=fault == "short")

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None, short: bool = False) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if short else data)
            with self.server.lock:
                self.server.sent += len(data)
        if short:
            self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def serving(folder: Path, faults: list[int | str] | None = None) -> Iterator[RangeServer]:
    """Serve `folder` on loopback."""
    with RangeServer(folder, faults) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
