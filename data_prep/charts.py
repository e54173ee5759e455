"""The two charts of report.html, as HTML whose lengths are styles: they need no script and follow the page's width."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from soratrain.amounts import counted


def bars(title: str, counts: Sequence[tuple[str, int]], total: int) -> str:
    """Return a chart of horizontal bars; nothing where there is nothing to show."""
    if not counts:
        return ""
    most = max(count for _, count in counts) or 1
    lines = "".join(
        f"<span>{html.escape(name)}</span><i><b style='width:{100 * count / most:.1f}%'></b></i>"
        f"<span class=count>{count:,}</span>"
        for name, count in counts
    )
    shown = sum(count for _, count in counts)
    rest = f"<p class=rest>{counted(total - shown, 'others')}</p>" if total > shown else ""
    return f"<section class=chart><h3>{html.escape(title)}</h3><div class=bars>{lines}</div>{rest}</section>"


def funnel(steps: Sequence[dict[str, Any]]) -> str:
    """Return the steps one below the other: what entered, what left, and what was dropped why."""
    parts = []
    for step in steps:
        most = max(step["in"], 1)
        notes = [f"{count:,} {name}" for name, count in step["how"].items()]
        why = "".join(f"<li>{count:,} dropped: {html.escape(name)}</li>" for name, count in listed(step["dropped"]))
        parts.append(
            f"<div class=step><div class=name>{html.escape(step['step'])}</div>"
            f"<div class=track><b style='width:{100 * step['out'] / most:.1f}%'></b>"
            f"<span>{html.escape(counted(step['in'], step['unit']))} in, {step['out']:,} out</span></div>"
            f"<div class=notes>{html.escape(', '.join(notes))}<ul>{why}</ul></div></div>"
        )
    return "".join(parts)


def listed(dropped: dict[str, int], most: int = 8) -> list[tuple[str, int]]:
    """Return the commonest reasons, and one line for the others."""
    reasons = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in reasons[most:])
    return reasons[:most] + ([("other reasons", rest)] if rest else [])
