"""Prompts made as long as captions: what is asked of a language model, how often, and what becomes of its replies.

A reply that is no caption (empty, refused, cut off, a quotation lost) is asked for again with another draw; a prompt
for which none comes is drawn as it is, and that is said. A text depends on its prompt, the model, the examples and the
seed, never on the other prompts.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from soratrain.batch import draw_of
from soratrain.chat import ChatRequest, Messages, Reply
from soratrain.errors import ChatError, ConfigError
from soratrain.expand.cache import Cache
from soratrain.expand.examples import Example, draw_examples
from soratrain.expand.replies import caption_of, quotes
from soratrain.models.writing import one_line

log = logging.getLogger(__name__)

FORM = 1  # of what is asked; a change makes texts anew
SHOWN = 3  # prompts whose longer forms are said
TASK = """\
You write captions of {kinds}. For each text that you are given, write the caption that {one} of it would have{style}. \
Keep all that the text says: every thing, number, colour, action, place, camera movement and name. Add only what makes \
it clear and fits what is said. Repeat letter by letter, with its quotation marks, what stands in quotation marks. \
Answer with the caption alone, in one paragraph."""
LIKE_EXAMPLES = ", in the style, the words, the language and about the length of the examples"
UNLIKE = """\
, in two to four plain sentences in the present tense: who or what is seen and how it looks, what happens, where, in \
what light, and what the camera does"""

Wish = tuple[str, bool]  # a prompt, and whether a still picture is to be drawn of it
Write = Callable[[Sequence[ChatRequest]], Iterator[tuple[int, Reply | ChatError]]]


class Expanded(NamedTuple):
    """A longer prompt, and what made it."""

    text: str
    by: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Expansion(ABC):
    """Makes prompts longer.

    Args:
        style: type of the captions that prompts are to be like.
        examples: how many pairs of captions are shown, at most.
        captions, shards: folders that they are drawn from, see `draw_examples`.
        instruction: what is asked for, instead of what stands above.
        attempts: how often a reply that is no caption is asked for.
        max_tokens: longest reply.
        temperature, top_p: how freely it is worded; at a temperature of 0 only further attempts are free.
        seed: of the wording and of the choice of examples.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str]

    captions: str | Sequence[str] | None = None
    shards: str | Sequence[str] | None = None
    style: str = "long"
    examples: int = 6
    instruction: str | None = None
    attempts: int = 3
    max_tokens: int = 300
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("examples", 0), ("attempts", 1), ("max_tokens", 1), ("temperature", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"expand.{name}={getattr(self, name)} must be at least {least}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"expand.top_p={self.top_p} must lie in (0, 1]")

    @abstractmethod
    def model_name(self) -> str:
        """Return what the texts depend on of the model."""

    @abstractmethod
    def writing(self) -> AbstractContextManager[Write]:
        """Return a context in which the model answers, and after which it holds nothing.

        Raises:
            ChatError: it may be there another time, or (with `again` false) the user must mend something.
        """

    def __call__(self, wishes: Sequence[Wish], folder: Path) -> dict[Wish, Expanded]:
        """Return longer prompts, those of before from the file in `folder`, where it keeps those that are new.

        Those for which there is none are missing, which is said.

        Raises:
            UserError: the model cannot be asked, and will not be before something is mended.
        """
        wishes = [wish for wish in dict.fromkeys(wishes) if wish[0].strip()]
        shown = {still: self._examples(still) for still in dict.fromkeys(still for _, still in wishes)}
        asked = {wish: self._messages(*wish, shown[wish[1]]) for wish in wishes}
        model = self.model_name() if wishes else ""
        keys = {wish: self._key(messages, model) for wish, messages in asked.items()}
        cache = Cache(folder)
        new = [wish for wish in wishes if cache.get(keys[wish]) is None]
        failures = self._write_all(new, asked, keys, cache, model) if new else {}
        by = {"engine": self.name, "model": model, "seed": self.seed}
        found = {wish: Expanded(text, by) for wish in wishes if (text := cache.get(keys[wish])) is not None}
        self._say(found, [wish for wish in new if wish in found], failures, cache.path)
        return found

    def _write_all(
        self, new: Sequence[Wish], asked: Mapping[Wish, Messages], keys: Mapping[Wish, str], cache: Cache, model: str
    ) -> dict[Wish, str]:
        """Ask for the prompts that are new, and keep what comes; return what is wrong with the rest."""
        failures: dict[Wish, str] = {}
        try:
            with self.writing() as write:
                pending = list(new)
                for attempt in range(self.attempts):
                    requests = [self._request(asked[wish], wish, attempt) for wish in pending]
                    again = []
                    for place, reply in write(requests):
                        wish = pending[place]
                        if isinstance(reply, ChatError):
                            failures[wish] = str(reply)
                            continue
                        text, failures[wish] = caption_of(wish[0], reply)
                        if text:
                            del failures[wish]
                            cache.put(keys[wish], text, prompt=wish[0], engine=self.name, model=model, seed=self.seed)
                        else:
                            again.append(place)
                    pending = [pending[place] for place in sorted(again)]
                    if not pending:
                        break
        except ChatError as error:
            if not error.again:
                raise
            failures |= {wish: str(error) for wish in new if cache.get(keys[wish]) is None}
        return {wish: failures[wish] for wish in new if wish in failures}

    def _request(self, messages: Messages, wish: Wish, attempt: int) -> ChatRequest:
        temperature = max(self.temperature, 0.7) if attempt else self.temperature
        return ChatRequest(messages, draw_of(self.seed, *wish, attempt), self.max_tokens, temperature)

    def _messages(self, prompt: str, still: bool, shown: Sequence[Example]) -> list[dict[str, Any]]:
        """Return what is asked: examples as turns of a talk that has gone on for a while, then the prompt."""
        one, kinds = ("a picture", "pictures") if still else ("a video clip", "video clips")
        task = self.instruction or TASK.format(kinds=kinds, one=one, style=LIKE_EXAMPLES if shown else UNLIKE)
        last = one_line(prompt)
        if said := "; ".join("".join(quote) for quote in quotes(last)):
            last += f"\n(To be repeated letter by letter: {said})"
        turns = [turn for pair in shown for turn in pair] + [last]
        turns[0] = f"{task}\n\n{turns[0]}"  # not every chat template knows a system's turn
        return [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]

    def _examples(self, still: bool) -> list[Example]:
        """Return the examples for pictures or for videos."""
        captions, shards = listed(self.captions), listed(self.shards)
        found, place = draw_examples(
            captions, shards, count=self.examples, style=self.style, still=still, seed=self.seed
        )
        if found:
            log.info("expand=%s: %d examples of captions, from %s", self.name, len(found), place)
        elif self.examples:
            log.info(
                "expand=%s: no clip of %s has both a short and a %s caption: prompts are made longer without examples",
                self.name,
                " or ".join([*captions, *shards]) or "any folder",
                self.style,
            )
        return found

    def _key(self, messages: Messages, model: str) -> str:
        """Return a hash of all that a text depends on."""
        settings = [FORM, self.name, model, self.seed, self.attempts, self.max_tokens, self.temperature, self.top_p]
        return blake2b(json.dumps([settings, messages]).encode(), digest_size=16).hexdigest()

    def _say(self, found: dict[Wish, Expanded], new: Sequence[Wish], failures: dict[Wish, str], path: Path) -> None:
        """Say what has become of the prompts."""
        for wish in new[:SHOWN]:
            log.info("expand=%s: %s → %s", self.name, wish[0], found[wish].text)
        if len(found) > len(new[:SHOWN]):
            log.info("expand=%s: the longer forms of %d prompts are in %s", self.name, len(found), path)
        if failures:
            reasons = Counter(failures.values()).most_common(3)
            log.warning(
                "expand=%s: %d of %d prompts are drawn as they are, such as %r: %s",
                self.name,
                len(failures),
                len(found) + len(failures),
                next(iter(failures))[0][:80],
                "; ".join(f"{reason} ({count})" if len(reasons) > 1 else reason for reason, count in reasons),
            )


def listed(places: str | Sequence[str] | None) -> list[str]:
    """Return folders as a list."""
    return [] if places is None else [places] if isinstance(places, str) else [str(place) for place in places]
