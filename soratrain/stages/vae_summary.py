"""From one number a frame to a table: means over clips with their spread, by place in time and by size.

A clip's mean comes first and clips count alike, however long they are. Frame 0 is encoded alone and is sharper than
the rest, so it stands apart; the others go by their index modulo the VAE's stride in time, that is by their place in
the latent frame that covers them. What is not a number stays so: a mean over it is not one either.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from soratrain.amounts import counted
from soratrain.data.assignment import Bucket
from soratrain.data.atomic import replacing

NAMES = {"psnr": "PSNR dB", "ssim": "SSIM", "lpips": "LPIPS"}
NAMED = 3  # clips that are left out and named, of each reason
DIGITS = {"psnr": 2, "ssim": 4, "lpips": 4}


@dataclass(frozen=True)
class Measured:
    """One clip's figures: `frames` holds by metric one number a frame, `[T]`, not finite where the picture is not."""

    name: str
    bucket: Bucket
    frames: Mapping[str, np.ndarray]

    def mean(self, metric: str) -> float:
        """Return the mean over all its frames."""
        return float(self.frames[metric].mean())


def phase_of(frame: int, time: int) -> str:
    """Return a frame's place in the latent that covers it, as the table calls it."""
    if frame == 0:
        return "first frame"
    return f"{time}k+{frame % time}" if frame % time else f"{time}k"


def phases(frames: int, time: int) -> dict[str, np.ndarray]:
    """Return the frames of a clip by their place in time, in the order of the table: a latent's last frame last."""
    index = np.arange(frames)
    names = np.array([phase_of(frame, time) for frame in range(frames)])
    found = {"all frames": index, "first frame": index[:1]}
    return found | {name: index[names == name] for name in (phase_of(frame, time) for frame in range(1, time + 1))}


def summarise(clips: Sequence[Measured], time: int) -> list[dict[str, Any]]:
    """Return a row for all frames, the first, each phase and each bucket, with mean and spread of each metric.

    `spread` is the standard deviation over clips, None where there is one clip.
    """
    rows = []
    parts = [phases(clip.bucket.frames, time) for clip in clips]
    for name in parts[0]:
        rows.append(row("time", name, [(clip, part[name]) for clip, part in zip(clips, parts, strict=True)]))
    for bucket in sorted({clip.bucket for clip in clips}):
        same = [(clip, np.arange(bucket.frames)) for clip in clips if clip.bucket == bucket]
        rows.append(row("bucket", str(bucket), same))
    return [found for found in rows if found["frames"]]


def row(kind: str, name: str, parts: Sequence[tuple[Measured, np.ndarray]]) -> dict[str, Any]:
    """Return the figures of some frames of some clips; clips without such frames are not in it."""
    parts = [(clip, where) for clip, where in parts if len(where)]
    found: dict[str, Any] = {"kind": kind, "name": name, "clips": len(parts)}
    found["frames"] = sum(len(where) for _, where in parts)
    for metric in parts[0][0].frames if parts else ():
        means = [float(clip.frames[metric][where].mean()) for clip, where in parts]
        spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
        found[metric] = {"mean": float(np.mean(means)), "spread": spread}
    return found


def plain(value: Any) -> Any:
    """Return `value` with None for each number that is not finite: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Mapping[str, Any]], title: str, *, spread: bool = True, counts: bool = True) -> Table:
    """Return the rows for a terminal; a narrow one goes without the spread, a very narrow one without the counts."""
    metrics = [name for name in NAMES if name in rows[0]]
    shown = Table(title=title, title_justify="left")
    shown.add_column("", no_wrap=True)
    for heading in (*(NAMES[name] for name in metrics), *(("clips", "frames") if counts else ())):
        shown.add_column(heading, justify="right", no_wrap=True)
    kind = rows[0]["kind"]
    for item in rows:
        if item["kind"] != kind:
            shown.add_section()
            kind = item["kind"]
        cells = [cell(item[name], DIGITS[name], spread) for name in metrics]
        shown.add_row(item["name"], *cells, *((f"{item['clips']:,}", f"{item['frames']:,}") if counts else ()))
    return shown


def cell(figure: Mapping[str, float | None], digits: int, spread: bool) -> str:
    """Return `mean ± spread`."""
    mean, width = figure["mean"], figure["spread"]
    if mean is None or not math.isfinite(mean):
        return "[red]NaN[/]"
    return f"{mean:.{digits}f}" + (f" ± {width:.{digits}f}" if spread and width is not None else "")


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Print the report, its table as wide as the terminal allows."""
    rows, title = report["rows"], f"reconstructions by {report['vae']}"
    tries = [table(rows, title), table(rows, title, spread=False), table(rows, title, spread=False, counts=False)]
    endless = console.options.update(max_width=1000)
    needed = [console.measure(each, options=endless).maximum for each in tries]
    chosen = next((number for number, width in enumerate(needed) if width <= console.width), len(tries) - 1)
    console.print(tries[chosen])
    console.print("means over clips" + ("; the whole table is in metrics.csv" if chosen else " ± standard deviation"))
    for line in remarks(report):
        console.print(line)


def remarks(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield in words what is not in the table."""
    for broken in report["not_finite"]:
        where = f"{broken['frames']} frames, the first is {broken['first']}"
        yield f"[red]NOT A NUMBER[/] in the reconstruction of {broken['clip']}: {where}; no mean over them is one"
    clips, cost, rfvd = report["clips"], report["cost"], report["rfvd"]
    yield f"rule: {report['rule']}"
    if unused := clips["frames_not_used"]:
        yield f"  beyond it: {counted(unused, 'frames')} of {counted(clips['trimmed'], 'clips')}"
    if clips["cropped"]:
        yield f"  cropped: {counted(clips['cropped'], 'clips')}, {clips['pixels_cropped']:.2%} of all pixels"
    for reason, count in clips["left_out"].items():
        names = [each["clip"] for each in report["left_out"] if each["reason"] == reason]
        more = f" and {len(names) - NAMED:,} more, in report.json" if len(names) > NAMED else ""
        yield f"  {count:,} left out: {reason} ({escape(', '.join(names[:NAMED]))}{more})"
    if rfvd:
        value = "none" if rfvd["value"] is None else f"{rfvd['value']:.4g}"
        note = f" ({rfvd['note']})" if rfvd["note"] else ""
        yield f"rFVD {value} over {rfvd['frames']} frames of {rfvd['clips']:,} clips{note}"
    yield (
        f"compression of these clips {cost['values_ratio']:.3g}:1 in values ({cost['values_ratio_of_long_clips']:.3g}:1"
        f" of long ones), {cost['bits_ratio']:.3g}:1 in bits (8-bit pixels, 16-bit latents);"
        f" {cost['parameters'] / 1e6:.4g} M parameters"
    )
    yield (
        f"{cost['frames_per_s']:.4g} frames/s there and back (encode {cost['encode_frames_per_s']:.4g}, decode"
        f" {cost['decode_frames_per_s']:.4g}) on {cost['device']} in {cost['precision']}"
    )
    for path in report["pictures"]:
        yield f"  {path}"


def write_csv(folder: Path, rows: Sequence[Mapping[str, Any]], clips: Sequence[Measured], time: int) -> None:
    """Write `metrics.csv`, the table, and `clips.csv`, a line a clip."""
    metrics = list(clips[0].frames)
    lines = [
        {key: item[key] for key in ("kind", "name", "clips", "frames")}
        | {name: item[name]["mean"] for name in metrics}
        | {f"{name}_spread": item[name]["spread"] for name in metrics}
        for item in rows
    ]
    write(folder / "metrics.csv", lines)
    each = []
    for clip in clips:
        found: dict[str, Any] = {"clip": clip.name, "bucket": str(clip.bucket)}
        for name in metrics:
            for part, where in phases(clip.bucket.frames, time).items():
                found[f"{name} {part}"] = float(clip.frames[name][where].mean()) if len(where) else None
        each.append(found)
    write(folder / "clips.csv", each)


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys as CSV."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
