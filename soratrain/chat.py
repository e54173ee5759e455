"""A client of any server that speaks OpenAI's chat protocol: vLLM, llama.cpp, Ollama, `transformers serve`, and others.

What may pass by itself (429, 5xx, silence, a broken connection, an answer that is no reply) is asked again after a wait
that doubles, jittered, or that the server itself asks for; what will not is said with the server's own words.
A reply can only be that of its own request: both are handled by one call on a connection of its own (`chat_wire.py`).
"""

from __future__ import annotations

import difflib
import itertools
import logging
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from soratrain.chat_messages import ChatRequest, Messages, Reply, reply_of
from soratrain.chat_wire import ENDPOINT, Wire
from soratrain.errors import ChatError, ConfigError

log = logging.getLogger(__name__)

LONGEST_WAIT = 60.0  # seconds between two tries
LONGEST_ASKED = 600.0  # seconds that a server may ask to wait
CHECK_S = 30.0  # seconds that a list of models may take, at most
SAY_EVERY = 60.0  # seconds; many requests fail at once, which one line tells


class ChatServer:
    """A server and one of its models.

    Args:
        url: the server's address, `http://localhost:8000` or with the path that its `/chat/completions` follows.
        model: the model's name there; None takes the only one (`check` finds it).
        key_env: the environment variable with the server's key, if it needs one.
        timeout_s: seconds that an answer may take.
        retries: further tries of a request that failed for a reason that may pass.
        concurrency: requests of `complete_all` under way at a time.
        backoff_s: seconds before the second try; twice as long before each further one, up to a minute.
        extra: further keys of the request's body, such as `{"top_p": 0.9}`; one that is None is left out of it.

    Raises:
        ConfigError: a value that cannot work.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        key_env: str = "OPENAI_API_KEY",
        timeout_s: float = 120.0,
        retries: int = 5,
        concurrency: int = 8,
        backoff_s: float = 0.5,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, least in (
            ("retries", retries, 0),
            ("concurrency", concurrency, 1),
            ("backoff_s", backoff_s, 0),
        ):
            if value < least:
                raise ConfigError(f"{name}={value}: must be at least {least}")
        if timeout_s <= 0:
            raise ConfigError(f"timeout_s={timeout_s}: must be more than 0")
        self.model, self.timeout_s, self.retries, self.concurrency = model, timeout_s, retries, concurrency
        self.backoff_s, self.extra = backoff_s, dict(extra or {})
        self._wire = Wire(url, key_env)
        self._lock, self._quiet_until, self._said = threading.Lock(), 0.0, -SAY_EVERY

    @property
    def url(self) -> str:
        """The address that `/chat/completions` follows."""
        return self._wire.url

    def check(self) -> str:
        """Return the model's name, after the server has said that it has it.

        A model that the server does not list (some load what they are asked for) is asked for one word.

        Raises:
            ChatError: there is no server, it does not let us in, or it has no such model.
        """
        try:
            found = self._patiently(lambda: self._wire.ask("/models", None, min(CHECK_S, self.timeout_s)), check=True)
            listed = [str(model["id"]) for model in found["data"]]
        except ChatError as error:
            if error.status not in (404, 405, 501):  # servers without a list have another way to say no
                mend = "" if error.status else "; start it, or mend the url"
                raise ChatError(f"{error}{mend}", status=error.status, again=error.again) from error
            listed = []
        except (KeyError, TypeError):
            raise ChatError(f"{self._wire.nonsense(found)}; does the url lead to its /models?") from None
        if self.model is None:
            if len(listed) != 1:
                raise ChatError(f"{self.url} has {listing(listed)}; say which model to use")
            self.model = listed[0]
        if self.model not in listed:
            self._probe(listed)
        return self.model

    def _probe(self, listed: Sequence[str]) -> None:
        """Ask an unlisted model for one word."""
        try:
            self.complete([{"role": "user", "content": "Hello"}], max_tokens=1)
        except ChatError as error:
            if error.status not in (400, 404, 422):
                raise
            close = difflib.get_close_matches(str(self.model), listed, n=1)
            mend = f"did you mean {close[0]!r}? " if close else ""
            raise ChatError(
                f"{error}: it seems to have no model {self.model!r}; {mend}it has {listing(listed)}",
                status=error.status,
            ) from error

    def complete(
        self, messages: Messages, *, seed: int | None = None, max_tokens: int = 512, temperature: float = 0.0
    ) -> Reply:
        """Return the model's reply to `messages`.

        Raises:
            ChatError: there is none, after all retries.
        """
        return self._reply(ChatRequest(messages, seed, max_tokens, temperature), threading.Event())

    def complete_all(self, requests: Iterable[ChatRequest]) -> Iterator[tuple[int, Reply | ChatError]]:
        """Yield the place of each request and its reply, or what became of it, in the order in which they end.

        Requests are taken, by the caller's own thread, as they are needed: a generator may make them.
        """
        todo: queue.SimpleQueue[tuple[int, ChatRequest] | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Reply | BaseException]] = queue.SimpleQueue()
        stopped = threading.Event()

        def work() -> None:
            while (task := todo.get()) is not None and not stopped.is_set():
                place, request = task
                try:
                    done.put((place, self._reply(request, stopped)))
                except BaseException as error:  # noqa: BLE001 - whatever it is, the caller's thread hears of it
                    done.put((place, error))

        for _ in range(self.concurrency):  # as daemons: one that waits for a server keeps no process alive
            threading.Thread(target=work, daemon=True).start()
        source, under_way = enumerate(requests), 0
        try:
            while True:
                for task in itertools.islice(source, 2 * self.concurrency - under_way):
                    todo.put(task)
                    under_way += 1
                if not under_way:
                    return
                place, found = done.get()
                under_way -= 1
                if not isinstance(found, Reply | ChatError):
                    raise found
                yield place, found
        finally:
            stopped.set()
            for _ in range(self.concurrency):
                todo.put(None)

    def _reply(self, request: ChatRequest, stopped: threading.Event) -> Reply:
        """Return the reply to one request."""
        body = {key: value for key, value in {**request.body(self.model), **self.extra}.items() if value is not None}

        def ask() -> Reply:
            found = self._wire.ask(ENDPOINT, body, self.timeout_s)
            try:
                return reply_of(found)
            except (KeyError, IndexError, TypeError, AttributeError):
                raise self._wire.nonsense(found) from None

        return self._patiently(ask, stopped)

    def _patiently(self, ask: Any, stopped: threading.Event | None = None, *, check: bool = False) -> Any:
        """Return what `ask` returns, tried as often as the settings say; in a check, only where a server is at work."""
        for attempt in itertools.count():
            self._sleep(self._quiet_until - time.monotonic(), stopped)
            try:
                return ask()
            except ChatError as error:
                if not error.again or (check and (error.status or 0) < 400):
                    raise
                if attempt == self.retries or (error.wait or 0) > LONGEST_ASKED:
                    asks = f"; it asks to wait {error.wait:.0f} s" if error.wait else ""
                    times = f", {attempt + 1} times" if attempt else ""
                    raise ChatError(f"{error}{times}{asks}", status=error.status, again=True) from error
                self._heed(error)
                wait = min(LONGEST_WAIT, self.backoff_s * 2**attempt) * random.uniform(0.5, 1)
                self._sleep(wait if error.wait is None else error.wait + 0.1 * wait, stopped)

    def _heed(self, error: ChatError) -> None:
        """Say a failure, if none was said of late; where the server asks to wait, all wait."""
        now = time.monotonic()
        with self._lock:
            say = now - self._said >= SAY_EVERY
            self._said = now if say else self._said
            self._quiet_until = max(self._quiet_until, now + (error.wait or 0))
        if say:
            log.warning("%s; asking again, up to %d times", error, self.retries)

    @staticmethod
    def _sleep(seconds: float, stopped: threading.Event | None) -> None:
        if seconds > 0:
            (stopped or threading.Event()).wait(seconds)
        if stopped and stopped.is_set():
            raise ChatError("nobody waits for this reply any more")


def listing(models: Sequence[str], most: int = 8) -> str:
    """Return models in words."""
    if not models:
        return "no list of models"
    return ", ".join(models[:most]) + (f" and {len(models) - most} more" if len(models) > most else "")
