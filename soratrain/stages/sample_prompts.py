"""What to draw, from the command line or a file: a text, and what it overrides of the rest.

A file of the ending `.jsonl` holds an object a line: `prompt`, and perhaps `seed`, `samples`, `size`, `frames`, `fps`
and options of the task by their names (`image`, `strength`, …). Any other file is a text, one prompt a line. Paths in
it are taken as on the command line.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from soratrain.errors import ConfigError, DataError
from soratrain.kinds import fits, in_words
from soratrain.schema import suggest
from soratrain.stages.sample_tasks import Task

OWN: dict[str, Any] = {"seed": int, "samples": int, "size": str, "frames": int, "fps": float}


@dataclass(frozen=True)
class Wish:
    """A text, and what it overrides: of the job by `own`, of the task by `options`."""

    prompt: str
    own: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""  # in a file, for messages

    def of(self, task: Task) -> Task:
        """Return a task with what is overridden of it."""
        return replace(task, **self.options)


def wishes(prompt: str | Sequence[str] | None, file: str | None, task: Task) -> list[Wish]:
    """Return what to draw: what a file says, or else the prompts.

    Raises:
        ConfigError: neither says anything, or the file says what is not known.
        DataError: the file cannot be read.
    """
    if file is not None:
        return of_file(Path(file), task)
    if prompt is None or prompt == []:
        raise ConfigError('prompt is not set: say what to draw, for instance prompt="a red circle moves left"')
    return [Wish(prompt)] if isinstance(prompt, str) else [Wish(str(item)) for item in prompt]


def of_file(file: Path, task: Task) -> list[Wish]:
    """Return what a file says; see above."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines cuts at letters of a prompt too
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"prompts_file={file}: {reason}; give a text file, or JSON lines (.jsonl)") from error
    numbered = [(f"prompts_file={file}: line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"prompts_file={file}: holds no prompt; write one a line")
    if file.suffix.lower() != ".jsonl":
        return [Wish(line.strip(), place=place) for place, line in numbered]
    return [of_line(place, line, task) for place, line in numbered]


def of_line(place: str, line: str, task: Task) -> Wish:
    """Return what a line of JSON says."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, at letter {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f'{place} is not JSON ({reason}); write a whole object a line: {{"prompt": "…"}}') from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigError(f'{place}: write an object with a text as its prompt: {{"prompt": "…"}}')
    hints = {name: kind for name, kind in typing.get_type_hints(type(task)).items() if name not in ("name", "files")}
    known = {**OWN, **hints}
    for key, value in row.items():
        if key != "prompt" and key not in known:
            raise ConfigError(f"{place}: {key}: no such key of task={task.name}; {suggest(key, ('prompt', *known))}")
        if key != "prompt" and not fits(value, known[key]):
            raise ConfigError(f"{place}: {key}={value!r}: must be {in_words(known[key])}")
    own = {key: value for key, value in row.items() if key in OWN}
    return Wish(row["prompt"], own, {key: value for key, value in row.items() if key in hints}, place)
