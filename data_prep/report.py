"""report.html: one self-contained page that shows what came in, what was kept and what was not, and why.

It is made from a finished folder alone, the same each time, and stays small whatever the folder's size: pictures are of
a fixed choice of samples, histograms and tables are summed. Files that were dropped are shown where they still are.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data_prep.charts import bars, funnel
from data_prep.media import Unusable, opened, video_stream
from data_prep.output import read_lines
from data_prep.page import PAGE
from soratrain.amounts import counted, noun
from soratrain.data.atomic import replacing
from soratrain.data.reading import read_table
from soratrain.data.shards import ShardReader
from soratrain.errors import DataError

KEPT, DROPPED = 36, 36  # pictures of each
THUMB = (192, 128)  # pixels at most
REASONS, FAILURES = 20, 200  # lines listed
SCORES = ("aesthetic", "text_area", "motion", "blur", "static", "letterbox", "black")
TROUBLE = (Unusable, DataError, av.FFmpegError, OSError, ValueError, IndexError)
Row = dict[str, Any]


def write(folder: Path) -> Path:
    """Write `report.html` into a finished folder and return its path.

    Raises:
        DataError: the folder is not finished.
    """
    try:
        dataset = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        stats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"input={folder} is no folder that data_prep has finished ({error})") from error
    rows = read_table(folder).to_pylist()
    failures = read_lines(folder / "failures.jsonl")
    rated = {"rated": dataset["rated"]} if "rated" in dataset else {}
    page = PAGE.substitute(
        title=html.escape(title(folder, dataset["settings"])),
        origin=origin(dataset["settings"]),
        totals="".join(tiles(dataset["totals"], stats)),
        funnel=funnel(stats["funnel"]),
        histograms="".join(histograms(rows)),
        kept="".join(kept(folder, rows)),
        dropped="".join(dropped(dataset, failures)) or "<p>Nothing was dropped.</p>",
        failures=table(failures),
        settings=html.escape(json.dumps(dataset["settings"] | rated, indent=1, ensure_ascii=False)),
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return folder / "report.html"


def title(folder: Path, settings: Row) -> str:
    """Return what a page is called: a selection by its folder, another by its input, so that its bytes are the same."""
    selected = settings.get("task") == "select"
    return folder.resolve().name if selected else str(settings.get("input", folder.name))


def origin(settings: Row) -> str:
    """Return a line that names what a selection was made from; nothing of others, whose title tells."""
    if settings.get("task") != "select":
        return ""
    return f"<p class=origin>from {html.escape(settings['input'])}</p>"


def tiles(totals: Row, stats: Row) -> Iterator[str]:
    """Yield the figures at the top."""
    came = stats["seconds"]["in"]
    share = f"of {duration(came)} that came in" if came else ""
    for value, name, note in (
        (f"{totals['videos']:,}", noun(totals["videos"], "clips"), ""),
        (f"{totals['images']:,}", noun(totals["images"], "images"), ""),
        (duration(totals["seconds"]), "of video", share),
        (f"{totals['frames']:,}", noun(totals["frames"], "frames"), ""),
        (f"{totals['bytes'] / 1e6:,.1f} MB", "in shards", ""),
    ):
        yield f"<div class=tile><b>{value}</b><span>{name}</span><small>{note}</small></div>"


def duration(seconds: float) -> str:
    """Return a duration for people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def histograms(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a chart for each thing that is worth seeing spread out."""
    videos = [row for row in rows if row["kind"] == "video"]
    sizes = Counter(f"{row['w']}×{row['h']}" for row in rows)
    yield bars("size in pixels", sizes.most_common(10), len(rows))
    yield spread("aspect ratio", [row["w"] / row["h"] for row in rows])
    yield spread("duration in seconds", [row["frames"] * row["fps_den"] / row["fps_num"] for row in videos])
    rates = Counter(f"{row['fps_num'] / row['fps_den']:.4g}" for row in videos)
    yield bars("frames a second", sorted(rates.most_common(10), key=lambda item: float(item[0])), len(videos))
    scores = [json.loads(row["scores"]) for row in rows]
    for name in SCORES:
        yield spread(name, [item[name] for item in scores if name in item])


def spread(title: str, values: Sequence[float]) -> str:
    """Return a histogram of numbers in ten steps; nothing where there are none."""
    if not values:
        return ""
    low, high = min(values), max(values)
    if high - low < 1e-9:
        return bars(title, [(f"{low:.3g}", len(values))], len(values))
    counts, edges = np.histogram(values, bins=10, range=(low, high))
    names = [f"{a:.3g} – {b:.3g}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return bars(title, list(zip(names, counts.tolist(), strict=True)), len(values))


def kept(folder: Path, rows: Sequence[Row]) -> Iterator[str]:
    """Yield pictures of some of the samples, the same ones each time, in the order of the shards."""
    reader = ShardReader(folder)
    chosen = {row["key"] for row in sorted(rows, key=lambda row: draw(row["key"]))[:KEPT]}
    for row in (row for row in rows if row["key"] in chosen):
        try:
            picture = frame_of(reader.read(row["shard"], row["media_offset"], row["media_length"]))
        except TROUBLE:
            continue
        scores = json.loads(row["scores"])
        alike = " · like another" if "duplicate_of" in scores else ""
        note = f"{row['w']}×{row['h']} · {counted(row['frames'], 'frames')}{alike}"
        yield figure(picture, note, f"{row['key']}\n{scores_text(scores)}")


def dropped(dataset: Row, failures: Sequence[Row]) -> Iterator[str]:
    """Yield pictures, where there are any to be had, of some that were dropped, with the reason."""
    settings = dataset["settings"]
    source = Path(str(settings.get("input", "")))
    shards: dict[str, Row] = {}
    if settings.get("task") == "select" and (source / "dataset.json").is_file():
        shards = {row["key"]: row for row in read_table(source).to_pylist()}
    reader = ShardReader(source)
    for failure in sorted(failures, key=lambda item: draw(item["uri"]))[:DROPPED]:
        picture = None
        try:
            if failure["uri"] in shards:
                row = shards[failure["uri"]]
                picture = frame_of(reader.read(row["shard"], row["media_offset"], row["media_length"]))
            elif settings.get("task") == "build" and failure["step"] not in ("probe", "ingest"):
                with opened(source / failure["uri"]) as container:  # what failed in probe is not opened again
                    picture = first(container)
        except TROUBLE:
            picture = None
        yield figure(picture, failure["reason"], failure["uri"])


def draw(name: str) -> bytes:
    """Return what orders samples by chance, the same each time."""
    return hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()


def frame_of(media: bytes) -> bytes:
    """Return a JPEG of a clip's first frame."""
    with av.open(io.BytesIO(media)) as container:
        return first(container)


def first(container: Any) -> bytes:
    """Return a JPEG of a container's first frame, at most THUMB large."""
    stream = video_stream(container)
    picture = next(iter(container.decode(stream))).to_image()
    picture.thumbnail(THUMB, Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=72)
    return buffer.getvalue()


def figure(picture: bytes | None, note: str, title: str) -> str:
    """Return a picture with a note below it, and its name for who points at it."""
    shown = "<div class=none>no picture</div>"
    if picture is not None:
        shown = f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{base64.b64encode(picture).decode()}">'
    name = html.escape(title, quote=True)
    below = "" if picture is not None else f"<em>{html.escape(title)}</em>"
    return f'<figure title="{name}">{shown}<figcaption>{html.escape(note)}{below}</figcaption></figure>'


def scores_text(scores: Row) -> str:
    """Return scores for who points at a picture."""
    return ", ".join(f"{name} {value}" for name, value in scores.items() if name in SCORES)


def table(failures: Sequence[Row]) -> str:
    """Return reasons with their counts, then the first failures one by one."""
    if not failures:
        return "<p>None.</p>"
    reasons = Counter(item["reason"].split(": ")[0] for item in failures)
    lines = [f"<tr><td>{count:,}</td><td>{html.escape(why)}</td></tr>" for why, count in reasons.most_common(REASONS)]
    rows = [
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in (item["uri"], item["step"], said(item))) + "</tr>"
        for item in failures[:FAILURES]
    ]
    more = f"<p>and {len(failures) - FAILURES:,} more in failures.jsonl</p>" if len(failures) > FAILURES else ""
    head = "<tr><th>file or sample</th><th>step</th><th>reason</th></tr>"
    return (
        f"<table class=counts><tr><th>how many</th><th>reason</th></tr>{''.join(lines)}</table>"
        f"<details><summary>one by one</summary><table>{head}{''.join(rows)}</table>{more}</details>"
    )


def said(failure: Row) -> str:
    """Return a failure's reason, and what of it is used all the same."""
    return failure["reason"] + (f" (used: {failure['used']})" if failure["used"] else "")
