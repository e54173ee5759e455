"""Does a plain config value fit a parameter's annotation, and how is that annotation said to people."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

MANY = {int: "whole numbers", float: "numbers", str: "texts"}


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
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (str, bool):
        return isinstance(value, annotation)
    inner = typing.get_args(annotation)
    if origin is tuple and Ellipsis not in inner:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(fits(item, inner[1]) for item in value.values())
    return True


def in_words(annotation: Any) -> str:
    """Return a type as people say it."""
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(in_words(option) for option in options)
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(map(repr, options))
    origin, inner = typing.get_origin(annotation), tuple(option for option in options if option is not Ellipsis)
    if origin in (list, tuple, Sequence):
        count = f"{len(options)} " if origin is tuple and inner == options else ""
        return f"a list of {count}{MANY.get(inner[0], 'values')}"
    if origin in (dict, Mapping):
        return f"{MANY.get(options[1], 'values')} by their names"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return str(words.get(annotation) or getattr(annotation, "__name__", annotation))
