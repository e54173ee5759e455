"""captions.html: clips that play, beside them true captions and the captioner's, wrong words marked; one file alone."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.world import judge
from data_prep.world.reading import plain_text
from soratrain.amounts import counted
from soratrain.data.atomic import replacing
from soratrain.stages.evaluate_captioner_clips import true_captions
from soratrain.stages.evaluate_captioner_frame import PAGE
from soratrain.stages.evaluate_captioner_gallery import SMALL, Entry, Gallery, playable
from soratrain.stages.evaluate_captioner_scores import Told
from soratrain.stages.evaluate_captioner_shown import (
    MEANING,
    NAMES,
    chief_of,
    figure,
    label,
    recall_rows,
    remarks,
    said_in,
    text_rows,
    world_rows,
)
from soratrain.stages.evaluate_captioner_text import WORD, words

HIDDEN = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
SHOWN = dict.fromkeys(HIDDEN, "\ufffd")  # control characters, and what turns the direction of writing


def marked(text: str, told: Told) -> tuple[str, bool]:
    """Return a caption with its wrong words marked, as HTML, and whether any is.

    Where the truth is known, wrong is what contradicts it; else words are marked that no true caption of the clip has,
    of whatever style. An empty caption contradicts nothing.
    """
    text = plain_text(text).translate(SHOWN)
    if not text:
        return "<span class=soft>(nothing)</span>", False
    if told.truth is not None:
        spans, kind = list(judge(text, told.truth).wrong), ""
    else:
        known, kind = {word for _, true in told.captions for word in words(true)}, " class=new"
        found = [match.span() for match in WORD.finditer(text)] if known else []
        spans = [(start, end) for start, end in found if not known.issuperset(words(text[start:end]))]
    pieces, at = [], 0
    for start, end in spans:
        start = max(start, at)
        if end > start:
            pieces += [html.escape(text[at:start]), f"<mark{kind}>", html.escape(text[start:end]), "</mark>"]
            at = end
    return "".join([*pieces, html.escape(text[at:])]), bool(spans)


def card(entry: Entry, drawn: bool, short_bytes: int) -> str:
    """Return a clip with its captions."""
    told, rows, bad = entry.told, [], False
    for style, text in told.texts.items():
        true = true_captions(told.captions, style, short_bytes)
        said, wrong = marked(text, told)
        bad |= wrong
        shown = [html.escape(plain_text(other).translate(SHOWN)) for other in true] or ["–"]
        beside = "".join(f"<p class=true dir=auto>{other}</p>" for other in shown)
        ours = f"<p class=ours dir=auto>{said}</p>"
        rows.append(f"<div class=said><b>{html.escape(style)}</b><div>{beside}</div>{ours}</div>")
    frames, height, width = entry.size
    length = f" · {counted(frames, 'frames')} at {entry.fps:.4g}/s" if frames > 1 else " · image"
    small = " small" if max(height, width) < SMALL else ""
    name = told.name if len(told.name) < 24 else f"{told.name[:12]}…"
    about = f"{html.escape(name)}<br>{width}×{height}{length}<br>{'drawn by lot' if drawn else 'among the worst'}"
    kinds = f"clip{small}{' bad' if bad else ''}"
    return (
        f'<article class="{kinds}"><div class=seen>{playable(entry)}<small>{about}</small></div>'
        f"<div>{chips(told)}<div class='said head'><span></span><span>true</span><span>captioner</span></div>"
        f"{''.join(rows)}</div></article>"
    )


def chips(told: Told) -> str:
    """Return what the fullest caption says rightly and wrongly, where the truth is known."""
    if told.truth is None or not told.texts:
        return ""
    style = "long" if "long" in told.texts else list(told.texts)[-1]
    judged = judge(told.texts[style], told.truth)
    found = [(NAMES[name], judged.scores[name] == 1) for name in NAMES if name in judged.scores]
    found += [(f"{judged.invented} invented", False)] if judged.invented else []
    marks = "".join(
        f'<span class="chip{"" if right else " no"}">{name} {"✓" if right else "✗"}</span>' for name, right in found
    )
    return f"<div class=chips><span class='chip plain'>{html.escape(style)}</span>{marks}</div>"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; rows that are set in stand beside the captioner's own."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr class={'beside' if row[0].startswith(' ') else 'ours'}>"
        + "".join(f"<td>{html.escape(cell.strip())}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<div class=box><table><caption>{html.escape(title)}</caption><tr>{head}</tr>{body}</table></div>"


def tables(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tables of the report."""
    if rows := list(world_rows(report)):
        yield table("% named rightly, on new scenes of the world", ["", *NAMES.values(), "invented"], rows)
    columns = ["", "BLEU-4", "CIDEr-D", "ROUGE-L", "words", "vocabulary", "type/token", "repeated %", "empty %"]
    yield table("Beside the true captions", columns, list(text_rows(report)))
    if rows := list(recall_rows(report)):
        columns = ["", "clips", "clip→text @1", "@5", "@10", "text→clip @1", "@5", "@10", "chance @1"]
        yield table("Recall, % among clips of distinct captions", columns, rows)


def tiles(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the chief figures and what they are, of the last set of clips."""
    last, style = chief_of(report)
    found, of = last["styles"][style], label(last, style)
    if world := found["world"]:
        for name in ("color", "shape", "number", "motion", "invented"):
            if name in said_in(world) and (share := world["ours"].get(name)) is not None:
                yield f"{100 * share:.1f} %", f"{NAMES.get(name, name)} · {of}"
    for name, title in (("bleu_4", "BLEU-4"), ("cider_d", "CIDEr-D"), ("rouge_l", "ROUGE-L")):
        if found["scores"] and not found["world"]:
            yield figure(found["scores"][name]), f"{title} · {of}"
    if pooled := last["recall"].get(style):
        yield f"{100 * pooled['video_to_text']['at_1']:.1f} %", f"clip→text @1 of {pooled['clips']} · {of}"


def legend(report: Mapping[str, Any]) -> str:
    """Return what the marks mean."""
    known = [bool(item["styles"][report["styles"][0]]["world"]) for item in report["sets"]]
    found = ["<span><mark>marked</mark> contradicts what is to be seen</span>"] if any(known) else []
    found += [] if all(known) else ["<span><mark class=new>marked</mark> in no true caption of the clip</span>"]
    return "".join(found)


def write_page(path: Path, report: Mapping[str, Any], gallery: Gallery) -> Path:
    """Write the page and return its path."""
    sections = []
    for item in report["sets"]:
        entries = gallery.of(item["name"])
        shown = f"{counted(item['clips'], 'clips')}, {len(entries)} shown"
        cards = "".join(card(entry, drawn, gallery.short_bytes) for entry, drawn in entries)
        kind = "Clips of" if item["name"] == "shards" else "The world:"
        sections.append(f"<h2>{kind} {html.escape(item['title'])}</h2><p class=soft>{shown}</p>{cards}")
    page = PAGE.substitute(
        title=html.escape(str(report["captioner"])),
        tiles="".join(
            f"<div class=tile><b>{value}</b><span>{html.escape(name)}</span></div>" for value, name in tiles(report)
        ),
        tables="".join(tables(report)),
        remarks="<br>".join(map(html.escape, remarks(report))),
        meaning=html.escape(MEANING).replace("\n", "<br>") if any(world_rows(report)) else "",
        legend=legend(report),
        sets="".join(sections),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path
