"""Clips described by any server that speaks OpenAI's chat protocol: vLLM, SGLang, llama.cpp, `transformers serve`, ….

Frames are taken and made smaller here, and travel as JPEGs inside the request. Requests are under way at the same time
and end in any order; each answer comes back with the place of its own request (see `ChatServer`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from soratrain.captions.engine import Answer, Member, Question, Seen, chunks
from soratrain.captions.frames import Frames, checked, jpeg_url, told
from soratrain.chat import ChatServer
from soratrain.chat_messages import ChatRequest, Reply
from soratrain.errors import ChatError, ConfigError
from soratrain.replies import DECLINED

TOO_MUCH = (400, 413, 415, 422)  # statuses of a server that cannot take this request, however often
WORD = 24  # bytes that no token is longer than, on average over a caption


class OpenAIEngine:
    """A model behind a server.

    Args:
        url: the server's address, `http://localhost:8000` or with the path that its `/chat/completions` follows.
        model: the model's name there; None takes the only one.
        key_env: the environment variable with the server's key, if it needs one.
        batch_size: clips that are decoded together; more than `concurrency`, or the server waits for the decoder.
        concurrency: requests under way at a time, of each process.
        timeout_s: seconds that an answer may take.
        retries, backoff_s: further tries of a request that failed for a reason that may pass, and seconds before the
            first of them; twice as long before each further one.
        frames_per_second, max_frames, max_side: which frames are shown, see `Frames`.
        jpeg_quality: 1 to 95.
        max_tokens: of a caption; a longer one is cut off, and rejected.
        temperature: of a second attempt; the first is asked for at 0.
        extra: further keys of each request's body.

    Raises:
        ConfigError: a value out of range.
    """

    name, prompted = "openai", True

    def __init__(
        self,
        *,
        url: str,
        model: str | None = None,
        key_env: str = "OPENAI_API_KEY",
        batch_size: int = 64,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        retries: int = 5,
        backoff_s: float = 0.5,
        frames_per_second: float = 2.0,
        max_frames: int = 8,
        max_side: int = 512,
        jpeg_quality: int = 90,
        max_tokens: int = 300,
        temperature: float = 0.7,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value < 1:
                raise ConfigError(f"engine.{name}={value} must be at least 1")
        if not 1 <= jpeg_quality <= 95:
            raise ConfigError(f"engine.jpeg_quality={jpeg_quality} must lie between 1 and 95")
        if temperature <= 0:
            raise ConfigError(f"engine.temperature={temperature} must be above 0: a second attempt goes by chance")
        self.load = Frames(frames_per_second, max_frames, max_side)
        try:
            self.server = ChatServer(
                url,
                model,
                key_env=key_env,
                timeout_s=timeout_s,
                retries=retries,
                concurrency=concurrency,
                backoff_s=backoff_s,
                extra=extra,
            )
        except ConfigError as error:
            raise ConfigError(f"engine.{error}") from error
        self.batch_size, self.quality = batch_size, jpeg_quality
        self.max_tokens, self.temperature = max_tokens, temperature
        self.model, self.gone = str(model), ""

    def open(self, device: torch.device, autocast: bool, prompts: Mapping[str, str]) -> None:
        """See that the server is there and has the model.

        Raises:
            ChatError: it is not, or has not.
        """
        self.prompts, self.gone = dict(prompts), ""
        self.model = self.server.check()

    def try_out(self) -> None:
        """Ask about grey pictures, as many and as large as a clip's may be, as it will be asked about clips.

        Raises:
            ChatError: the server does not take them, in its own words.
        """
        count = self.load.most
        urls = [jpeg_url(np.full((self.load.side, self.load.side, 3), 128, np.uint8), self.quality)] * count
        asked = self._messages(urls, told("Describe it.", count, float(count > 1)))
        try:
            self.server.complete(asked, seed=0, max_tokens=self.max_tokens)
        except ChatError as error:
            mend = (
                f"; engine.model must be one that sees pictures, engine.max_frames={count} at once, and has room for"
                f" them and for engine.max_tokens={self.max_tokens}: make these smaller, or mend the server"
            )
            raise ChatError(
                f"{error}{mend if error.status in TOO_MUCH else ''}", status=error.status, again=error.again
            ) from error

    def identity(self) -> str:
        """Return a hash of the model's name and of how it is asked."""
        asked: dict[str, Any] = {
            "engine": "openai",
            "model": self.model,
            "prompts": self.prompts,
            "frames": repr(self.load),
        }
        asked |= {"told": [told("", 1, 0), told("", 2, 1)], "quality": self.quality, "max_tokens": self.max_tokens}
        asked |= {"temperature": self.temperature, "extra": self.server.extra}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def styles(self, wanted: Sequence[str] | None) -> list[str]:
        """Return the styles to write: those that have a prompt."""
        return checked(self.prompts, wanted)

    def groups(self, members: Sequence[Member]) -> list[list[Member]]:
        """Return clips of any size, as many as are decoded together."""
        return chunks(members, self.batch_size)

    def look(self, clips: Sequence[Seen]) -> list[tuple[list[str], float]]:
        """Return the frames of each clip as they travel, and how long it lasts."""
        return [([jpeg_url(frame, self.quality) for frame in clip.video], clip.seconds) for clip in clips]

    def _messages(self, urls: Sequence[str], prompt: str) -> list[dict[str, Any]]:
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]

    def ask(self, looked: Sequence[tuple[list[str], float]], questions: Sequence[Question]) -> list[Answer]:
        """Return the captions; where as many requests as are under way have failed one after another, ask no more."""
        found: dict[int, Answer] = {}
        failed = 0

        def requests() -> Iterator[ChatRequest]:
            for place, style, draw in questions:
                if self.gone:
                    return
                urls, seconds = looked[place]
                prompt = told(self.prompts[style], len(urls), seconds)
                temperature = 0.0 if draw is None else self.temperature
                yield ChatRequest(self._messages(urls, prompt), draw or 0, self.max_tokens, temperature)

        for number, reply in self.server.complete_all(requests()):
            found[number] = answer = self._answer(reply)
            failed = failed + 1 if answer.failure and not answer.final else 0
            if failed >= max(4, self.server.concurrency) or (isinstance(reply, ChatError) and hopeless(reply)):
                self.gone = answer.failure
        unasked = Answer("", failure=f"not asked: {self.gone}")
        return [found.get(number, unasked) for number in range(len(questions))]

    def _answer(self, reply: Reply | ChatError) -> Answer:
        if isinstance(reply, ChatError):
            return Answer("", failure=str(reply), final=reply.status in TOO_MUCH)
        endless = len(reply.text.split()) > self.max_tokens or len(reply.text.encode()) > WORD * self.max_tokens
        return Answer(
            reply.text, cut=reply.finish_reason == "length" or endless, declined=reply.finish_reason in DECLINED
        )


def hopeless(error: ChatError) -> bool:
    """Return whether an error will meet every request alike: a wrong key, a model that is there no longer."""
    return not error.again and error.status not in TOO_MUCH
