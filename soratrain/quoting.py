"""Quote command-line values that Hydra's grammar refuses: commas, quotes, brackets, any script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'', re.DOTALL)


def quote_value(value: str) -> str:
    """Return `value` as one quoted Hydra string; a value that is one already is returned unchanged.

    In Hydra's grammar only a backslash that stands before a quote (or at the end) is special; `${` would be read as
    an interpolation, so it is escaped as well.
    """
    if QUOTED.fullmatch(value):
        return value
    escaped = re.sub(r'(\\*)"', lambda match: match.group(1) * 2 + '\\"', value)
    escaped = re.sub(r"(\\+)$", lambda match: match.group(1) * 2, escaped)
    return f'"{literal(escaped)}"'


def literal(text: str) -> str:
    """Return a text that OmegaConf reads as `text` itself, though it may hold `${`."""
    return re.sub(r"(\\*)\$\{", lambda match: match.group(1) * 2 + "\\${", text)


def quote_list(value: str) -> str:
    """Return `[a, b]` with each item quoted; anything else as one quoted string."""
    if not (value.startswith("[") and value.endswith("]")):
        return quote_value(value)
    items = re.findall(rf"\s*({QUOTED.pattern}|[^,]+)", value[1:-1], re.DOTALL)
    return "[" + ",".join(quote_value(item.strip()) for item in items) + "]"


def quote(argv: Sequence[str], keys: Sequence[str], lists: Sequence[str] = ()) -> list[str]:
    """Return `argv` with the values of `keys` quoted for Hydra.

    Args:
        keys: key names or patterns (`inputs.*`). `null` stays bare for every key but `prompt`, which takes any text.
        lists: those of the keys that also take `[a, b]`.

    Quoting twice changes nothing: child processes are started with the argv that was quoted here.
    """
    result = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        name = key.lstrip("+")
        wanted = bool(equals) and any(fnmatchcase(name, pattern) for pattern in keys)
        bare = value == "null" and name != "prompt"
        quoted = quote_list if name in lists else quote_value
        result.append(f"{key}={quoted(value)}" if wanted and not bare else argument)
    return result
