"""A chat server on loopback that looks at the pictures it is sent: what it says, or does wrong, depends on the clip."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import chat_server
import numpy as np
from PIL import Image

Script = Callable[[dict[str, Any]], chat_server.Fault]


def frames(body: dict[str, Any]) -> list[np.ndarray]:
    """The frames in a request."""
    urls = [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


def grey(body: dict[str, Any]) -> int:
    """The grey of the first frame, which says what clip it is of."""
    return round(float(frames(body)[0].mean()))


def words(body: dict[str, Any]) -> str:
    """What is asked."""
    return chat_server.echo(body)


def said(text: str | None, finish: str = "stop") -> dict[str, Any]:
    """An answer."""
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


class Handler(chat_server.Handler):
    def reply(self, body: dict[str, Any], fault: chat_server.Fault | None) -> None:
        if fault is None and not isinstance(body["messages"][-1]["content"], str):  # else nothing is shown
            fault = self.server.script(body)  # type: ignore[attr-defined]
        super().reply(body, fault)


@contextlib.contextmanager
def looking(script: Script) -> Iterator[chat_server.ChatHost]:
    """Serve on loopback what `script` says to each request; it may take its time."""
    with chat_server.ChatHost() as server:
        server.RequestHandlerClass, server.script = Handler, script  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
