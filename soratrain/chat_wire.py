"""One exchange with a web server of language models: JSON there, JSON back, or a `ChatError` that says what happened.

Every exchange has a connection of its own, closed after it: an answer that comes late, or twice, has nobody left to be
taken for another's. Redirections are not followed, since they would carry the key elsewhere.
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import ipaddress
import json
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import soratrain
from soratrain.errors import ChatError, ConfigError

RETRIED = (408, 409, 425, 429)  # and all from 500
LARGEST = 16 << 20  # bytes of an answer
SHOWN = 300  # characters of what a server says
ENDPOINT = "/chat/completions"


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirection to be an error."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Wire:
    """How one server is spoken to.

    Args:
        url: the server's address; without a path, `/v1` is added.
        key_env: the environment variable with its key, if it needs one. The key is in no message.

    Attributes:
        url: the address that `/models` and `/chat/completions` follow.

    Raises:
        ConfigError: `url` is no address of a web server, or the key cannot be sent.
    """

    def __init__(self, url: str, key_env: str) -> None:
        self.url, self.key_env = base_of(url), key_env
        self.key = os.environ.get(key_env, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise ConfigError(f"the key in {key_env} holds characters that no header may; set it again")
        handlers: list[urllib.request.BaseHandler] = [NoRedirect()]
        if here(urlsplit(self.url).hostname or ""):
            handlers.append(urllib.request.ProxyHandler({}))  # no proxy reaches this machine's own loopback
        self._opener = urllib.request.build_opener(*handlers)

    def ask(self, path: str, body: Mapping[str, Any] | None, timeout: float) -> Any:
        """Return the JSON that comes back for `body` (POST), or for nothing (GET), within `timeout` seconds.

        Raises:
            ChatError: there is none.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/json", "User-Agent": f"soratrain/{soratrain.__version__}"}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        deadline = time.monotonic() + timeout
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                found, status = whole(answer, deadline), answer.status
        except urllib.error.HTTPError as error:
            raise self._refusal(error, deadline) from None
        except urllib.error.URLError as error:
            raise self._silence(error.reason, timeout) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._silence(error, timeout) from error
        try:
            return json.loads(found)
        except (ValueError, RecursionError):
            raise self.nonsense(found, status) from None

    def nonsense(self, found: Any, status: int = 200) -> ChatError:
        """Return the error for an answer that is not what was asked for."""
        text = self.shown(found) or "nothing"
        return ChatError(f"{self.url} answers what is no reply of a model ({text})", status=status, again=True)

    def shown(self, found: Any) -> str:
        """Return what a server says in an answer, as one short line without the key."""
        if isinstance(found, bytes):
            try:
                found = json.loads(found)
            except (ValueError, RecursionError):
                found = re.sub(r"<(style|script|head).*?</\1>|<[^>]*>", " ", found.decode(errors="replace"), flags=re.S)
        for key in ("error", "message", "detail"):
            if isinstance(found, Mapping) and found.get(key):
                found = found[key]
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        if self.key:
            text = text.replace(self.key, "***")
        text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
        return text if len(text) <= SHOWN else text[:SHOWN] + " …"

    def _refusal(self, error: urllib.error.HTTPError, deadline: float) -> ChatError:
        """Return the error for an answer whose status is none of success."""
        status = error.code
        try:
            said = self.shown(whole(error, deadline))
        except (OSError, http.client.HTTPException, ChatError):
            said = ""
        finally:
            error.close()
        text = f"{self.url} answers {status} ({said or error.reason})"
        if 300 <= status < 400:
            text += f"; its address may now be {self.shown(error.headers.get('Location', 'another'))}"
        elif status in (401, 403):
            text += f"; put its key into the environment variable {self.key_env}"
        wait = after(error.headers.get("Retry-After"))
        return ChatError(text, status=status, again=status in RETRIED or status >= 500, wait=wait)

    def _silence(self, error: Any, timeout: float) -> ChatError:
        """Return the error for a connection that failed."""
        named = f"{type(error).__name__} {error}" if isinstance(error, Exception) else error
        told = getattr(error, "strerror", None) or named
        reason = self.shown(str(told))
        certificate = type(error).__name__ == "SSLCertVerificationError"
        if isinstance(error, TimeoutError):
            return ChatError(f"{self.url} has not answered within {timeout:g} s", again=True)
        if isinstance(error, ConnectionRefusedError | socket.gaierror):
            return ChatError(f"{self.url}: there is no server ({reason})", again=True)
        return ChatError(f"{self.url}: the connection broke ({reason})", again=not certificate)


def whole(answer: Any, deadline: float) -> bytes:
    """Return the body of an answer.

    Raises:
        TimeoutError: it is not all there by `deadline`.
        ChatError: it does not end.
    """
    parts, size = [], 0
    while part := answer.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise ChatError(f"an answer of more than {LARGEST >> 20} MB is no reply of a model", again=True)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


def after(header: str | None) -> float | None:
    """Return the seconds that a `Retry-After` asks for, as a number or a date (RFC 9110, 10.2.3); None for none."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    now = datetime.datetime.now(date.tzinfo)
    return max(0.0, (date - now).total_seconds())


def base_of(url: str) -> str:
    """Return what `/models` follows in the addresses of a server: `http://host:8000` is `http://host:8000/v1`.

    Raises:
        ConfigError: it is no address of a web server, or holds a password.
    """
    text = str(url).strip().rstrip("/").removesuffix(ENDPOINT)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https") or port == 0 or not text.isascii() or " " in text:
        raise ConfigError(f"url={str(url).rpartition('@')[2]!r} is no address of a server; write http://localhost:8000")
    if parts.username is not None:
        raise ConfigError(f"the url of {host} holds a user or a password; put the key into an environment variable")
    if parts.query or parts.fragment:
        raise ConfigError(f"url={url!r}: leave out what follows {'?' if parts.query else '#'}")
    return text if parts.path else f"{text}/v1"


def here(host: str) -> bool:
    """Return whether a host is this machine's own loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
