"""Numbers as people read them while something is at work."""

from __future__ import annotations


def short(value: float) -> str:
    """Return a rate with three digits and a unit: 12.3k."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:  # which three digits round up
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def size(count: float) -> str:
    """Return a number of bytes with three digits and a unit: 12.3 MB."""
    text = short(count)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def memory(count: float) -> str:
    """Return a number of bytes of memory with three digits and a unit, in powers of 1024: 12.3 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 999.5:  # which three digits round up
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.0f} GiB" if count >= 999.5 else f"{count:.3g} GiB"


def duration(seconds: float) -> str:
    """Return a time as h:mm:ss."""
    whole = max(round(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def noun(count: int, plural: str) -> str:
    """Return what a number of things is called, in the singular where it is one."""
    first, space, rest = plural.partition(" ")
    return (first.removesuffix("s") if count == 1 else first) + space + rest


def counted(count: int, plural: str) -> str:
    """Return a number of things with their name: 1 clip, 12,000 clips."""
    return f"{count:,} {noun(count, plural)}"
