"""A server of OpenAI's chat protocol on loopback, that goes wrong when it is told to, and can look at pictures."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

Body = dict[str, Any]
Fault = int | float | str | dict[str, Any]
Answer = Callable[[Body], str]
Script = Callable[[Body], Fault | None]


def words(body: Body) -> str:
    """What is asked: the last message's text."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def frames(body: Body) -> list[np.ndarray]:
    """The frames in a request, none of words alone."""
    content = body["messages"][-1]["content"]
    parts = [] if isinstance(content, str) else content
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


def grey(body: Body) -> int:
    """The grey of the first frame, which says what clip it is of."""
    return round(float(frames(body)[0].mean()))


def said(text: str | None, finish: str = "stop") -> Body:
    """What a server sends for a text."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "1", "object": "chat.completion", "choices": [choice]}


class ChatHost(http.server.ThreadingHTTPServer):
    """Answers chat requests with `answer(body)`; set the attributes at any time.

    Attributes:
        answer: what is replied to the body of a request.
        faults: done one a request, in order: a status to answer (int); seconds to wait before the right answer
            (float); `reset` (the connection is dropped), `half` (a body cut short), `nonsense` (no JSON), `choiceless`
            (JSON without choices), `drip` (a byte now and then); or a dict that is answered as it is, with status 200.
        always: a fault of every request.
        script: what is done with a request that shows pictures, and has no other fault; it may take its time.
        delay: seconds before the answer to a body: replies come out of order.
        finish: the finish reason of every reply.
        models: what `/v1/models` lists; None has no such page.
        only: whether models that are not listed are refused.
        key: what must be in the header, if anything.
        retry_after: what goes with a status that is an error.
        asked: the body of each chat request, in the order in which they came; `busiest`: most at a time.
    """

    daemon_threads = True
    request_queue_size = 128  # the default of 5 makes connections wait a second where many come at once

    def __init__(self, answer: Answer = words, faults: Sequence[Fault] = (), script: Script | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.faults, self.always, self.script = answer, list(faults), None, script
        self.delay: Callable[[dict[str, Any]], float] = lambda body: 0.0
        self.finish, self.models, self.only, self.key, self.retry_after = "stop", ["tiny"], True, "", ""
        self.asked: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None: ...


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ChatHost

    def do_GET(self) -> None:
        server = self.server
        if self.path != "/v1/models" or server.models is None:
            self.send(404, {"detail": "Not Found"})
        elif self.let_in():
            self.send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in server.models]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            server.times.append(time.monotonic())
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            fault = server.faults.pop(0) if server.faults else server.always
        try:
            self.reply(body, fault)
        finally:
            with server.lock:
                server.busy -= 1

    def reply(self, body: dict[str, Any], fault: Fault | None) -> None:
        server = self.server
        if fault is None and server.script and frames(body):
            fault = server.script(body)
        if not self.let_in():
            return
        if self.path != "/v1/chat/completions":
            self.send(404, {"detail": "Not Found"})
        elif server.only and body["model"] not in (server.models or ["tiny"]):
            self.send(404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}})
        elif fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "nonsense":
            self.send(200, "<html><head><title>hm</title></head><body>It works!</body></html>")
        elif fault == "choiceless":
            self.send(200, {"id": "1", "choices": []})
        elif isinstance(fault, dict):
            self.send(200, fault)
        elif isinstance(fault, int):
            self.send(fault, {"error": {"message": f"told to answer {fault}", "type": "test"}})
        else:
            time.sleep(fault if isinstance(fault, float) else server.delay(body))
            self.send(200, said(server.answer(body), server.finish), how=str(fault or ""))

    def let_in(self) -> bool:
        """Refuse a request without the key."""
        given = self.headers.get("Authorization", "")
        if not self.server.key or given == f"Bearer {self.server.key}":
            return True
        self.send(401, {"error": {"message": f"Incorrect API key provided: {given.removeprefix('Bearer ')}"}})
        return False

    def send(self, status: int, body: Any, *, how: str = "") -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            if status >= 400 and self.server.retry_after:
                self.send_header("Retry-After", self.server.retry_after)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if how == "drip":
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.02)
            else:
                self.wfile.write(data[: len(data) // 2] if how == "half" else data)
        if how == "half":
            self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def chatting(answer: Answer = words, faults: Sequence[Fault] = (), script: Script | None = None) -> Iterator[ChatHost]:
    """Serve on loopback."""
    with ChatHost(answer, faults, script) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def looking(script: Script) -> contextlib.AbstractContextManager[ChatHost]:
    """Serve on loopback what `script` says to each request that shows pictures."""
    return chatting(script=script)
