"""Does a plain config value fit a parameter's annotation, and how is that annotation said to people."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a plain config value can be passed for `annotation`; annotations of objects are not judged."""
    if annotation in (inspect.Parameter.empty, Any):
        return True
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (str, bool):
        return isinstance(value, annotation)
    if origin in (list, tuple, typing.Sequence):
        return isinstance(value, list | tuple)
    return True


def in_words(annotation: Any) -> str:
    """Return a type as people say it."""
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(in_words(option) for option in options)
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(map(repr, options))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return str(words.get(annotation) or getattr(annotation, "__name__", annotation))
