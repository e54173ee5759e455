"""expand=openai: prompts made longer by any server of OpenAI's chat protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from soratrain.chat import ChatRequest, ChatServer, Reply
from soratrain.errors import ChatError, ConfigError
from soratrain.expand.expansion import Expansion, Write

LEAST_FAILURES = 4  # one after another, before a server counts as gone


@dataclass(frozen=True, kw_only=True)
class OpenAIExpansion(Expansion):
    """Prompts made longer by a server; see `Expansion`, and `ChatServer` for the rest.

    Raises:
        ConfigError: a value that cannot work.
    """

    name: ClassVar[str] = "openai"

    url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    timeout_s: float = 120.0
    retries: int = 5
    backoff_s: float = 0.5
    concurrency: int = 8
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._server()

    def _server(self) -> ChatServer:
        try:
            return ChatServer(
                self.url,
                self.model,
                key_env=self.key_env,
                timeout_s=self.timeout_s,
                retries=self.retries,
                concurrency=self.concurrency,
                backoff_s=self.backoff_s,
                extra={"top_p": self.top_p, **self.extra},
            )
        except ConfigError as error:
            raise ConfigError(f"expand=openai: {error}") from error

    def model_name(self) -> str:
        """Return the model's name, and what else a request says."""
        return f"{self.model} {dict(self.extra)}" if self.extra else self.model

    @contextmanager
    def writing(self) -> Iterator[Write]:
        """See that the server has the model, then let it be asked."""
        server = self._server()
        server.check()
        yield lambda requests: asked(server, requests)


def asked(server: ChatServer, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, Reply | ChatError]]:
    """Yield replies as they come; a server that fails again and again is given up.

    Raises:
        ChatError: it is.
    """
    failed = 0
    for place, reply in server.complete_all(requests):
        failed = failed + 1 if isinstance(reply, ChatError) and reply.status not in (400, 413, 422) else 0
        if isinstance(reply, ChatError) and failed >= min(len(requests), max(LEAST_FAILURES, server.concurrency)):
            raise reply
        yield place, reply
