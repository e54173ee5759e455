"""What is asked of a language model over OpenAI's chat protocol, and what comes back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SEED_BITS = 31  # what all servers take as a seed
# What reasoning models say before they reply; where it is opened in the prompt, there is its end alone.
THOUGHT = re.compile(r"^\s*(?:.*?</think>|<think>.*\Z)\s*", re.S)

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatRequest:
    """What is asked for.

    Attributes:
        messages: as the protocol has them: `{"role": "user", "content": text}`, or a content of parts, such as
            `{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}`.
        seed: settles the reply, where the server heeds it.
        max_tokens: longest reply.
        temperature: 0 takes the likeliest token each time.
    """

    messages: Messages
    seed: int | None = None
    max_tokens: int = 512
    temperature: float = 0.0

    def body(self, model: str | None) -> dict[str, Any]:
        """Return the request as the protocol has it; what is None is not said."""
        return {
            "model": model,
            "messages": list(self.messages),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": None if self.seed is None else self.seed % 2**SEED_BITS,
        }


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: the reply, without what a reasoning model thought before; it may be empty.
        finish_reason: `stop`, or `length` where it was cut off, or what else the server says; `refusal` where it
            refused in so many words; empty where it does not say.
    """

    text: str
    finish_reason: str


def reply_of(found: Any) -> Reply:
    """Return the first choice of an answer.

    Raises:
        KeyError, IndexError, TypeError, AttributeError: it has none.
    """
    choice = found["choices"][0]
    message = choice["message"]
    content, reason = message.get("content"), str(choice.get("finish_reason") or "")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") in ("text", "output_text"))
    if content is None:
        content, reason = "", "refusal" if message.get("refusal") else reason
    return Reply(spoken(content).encode(errors="replace").decode(), reason)  # JSON can hold halves of a letter


def spoken(text: str) -> str:
    """Return what a model says, without what a reasoning one has thought before."""
    return THOUGHT.sub("", text, count=1).strip()
