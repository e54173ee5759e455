"""The picture of a sweep: the figure against what was swept over, its course over steps, and the runs, best first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from soratrain.chart import FAINT, INK, PANEL, Chart, Panel, Scale, is_wide, shade, short
from soratrain.data.atomic import replacing
from soratrain.sheet import BAD, GOOD
from soratrain.sweep_runs import Outcome

Area = tuple[float, float, float, float]  # left, top, right, bottom
WIDTH, EDGE, BETWEEN, TALL, TOP, LINE = 1280, 24, 20, 400, 84, 26  # pixels
MOST = 24  # runs that are listed
STATES = {
    "done": GOOD,
    "diverged": BAD,
    "running": "#f5b83d",
    "waiting": FAINT,
    "unfinished": FAINT,
    "failed": BAD,
}


def draw(path: Path, title: str, runs: Sequence[Outcome], keys: Sequence[str], name: str) -> None:
    """Draw the runs of a sweep to a PNG.

    Args:
        runs: best first, those without a figure last.
        keys: that were swept over, those with most values first.
        name: of the figure that runs are compared by; less is better.
    """
    listed = list(runs[:MOST])
    more = len(runs) > MOST
    chart = Chart(WIDTH, TOP + TALL + BETWEEN + 52 + LINE * (len(listed) + more) + EDGE)
    colours = {id(run): colour for run, colour in zip(runs, colours_of(runs, keys), strict=True)}
    chart.text((EDGE, EDGE - 4), title, 22)
    chart.text((EDGE, EDGE + 26), summary(runs, name), 14, FAINT)
    half = (WIDTH - 2 * EDGE - BETWEEN) / 2
    left = (EDGE, TOP, EDGE + half, TOP + TALL)
    right = (EDGE + half + BETWEEN, TOP, WIDTH - EDGE, TOP + TALL)
    against(chart, left, runs, keys, name, colours)
    courses(chart, right, runs, name, colours)
    table(chart, TOP + TALL + BETWEEN, listed, keys, name, colours)
    if more:
        chart.text((EDGE + 16, TOP + TALL + BETWEEN + 52 + LINE * MOST), f"and {len(runs) - MOST} more", 13, FAINT)
    with replacing(path) as temporary:
        chart.finished().save(temporary, format="PNG")


def summary(runs: Sequence[Outcome], name: str) -> str:
    """Return in one line how many runs there are in which state, and which is best."""
    counts = {state: sum(run.state == state for run in runs) for state in STATES}
    parts = [f"{count} {state}" for state, count in counts.items() if count]
    done = [run for run in runs if math.isfinite(run.metric(name))]
    best = f"; least {name}: {short(done[0].metric(name))} in {done[0].folder.name}" if done else ""
    return f"{len(runs)} runs: {', '.join(parts)}{best}"


def numbers(runs: Sequence[Outcome], key: str) -> list[float] | None:
    """Return the values of a key in order, or None where they are not all numbers."""
    try:
        return sorted({float(run.values[key]) for run in runs if key in run.values})
    except ValueError:
        return None


def colours_of(runs: Sequence[Outcome], keys: Sequence[str]) -> list[str]:
    """Return a colour for each run: by the first key's values in order, or by place where there is no key."""
    if not keys:
        return [shade(0.5) for _ in runs]
    known = numbers(runs, keys[0])
    values = [str(value) for value in known] if known else sorted({run.values.get(keys[0], "") for run in runs})
    place = {value: index / max(len(values) - 1, 1) for index, value in enumerate(values)}
    named = [run.values.get(keys[0], "") for run in runs]
    return [shade(place.get(str(float(value)) if known and value else value, 0.5)) for value in named]


def against(
    chart: Chart, area: Area, runs: Sequence[Outcome], keys: Sequence[str], name: str,
    colours: Mapping[int, str],
) -> None:  # fmt: skip
    """Draw the figure against one key, or against two as a heat map."""
    done = [run for run in runs if math.isfinite(run.metric(name))]
    if not done or not keys:
        chart.box(area, PANEL, 8)
        why = "no run is done" if not done else "nothing was swept over"
        chart.text(((area[0] + area[2]) / 2, (area[1] + area[3]) / 2), why, 15, FAINT, "mm")
        return
    everywhere = [key for key in keys if all(key in run.values for run in done)]  # a sweep may be widened by a key
    two = [key for key in everywhere if len(numbers(done, key) or []) > 1 and key != "seed"][:2]
    if len(two) == 2:
        heat_map(chart, area, done, two, name)
        return
    key = two[0] if two else keys[0]
    values, known = numbers(done, key), key in two
    names = [] if known else sorted({run.values.get(key, "-") for run in done})
    y = Scale.around([run.metric(name) for run in done])
    x = Scale.around(values or [], log=is_wide(values or [])) if known else Scale(-0.5, len(names) - 0.5)
    marks = [(value, short(value)) for value in values or []] if known else list(enumerate(cut(n, 16) for n in names))
    panel = Panel(chart, area, f"{name} by {key}", x, y, below=key, marks=marks if len(marks) <= 8 else ())

    def place(run: Outcome) -> float:
        return float(run.values[key]) if known else float(names.index(run.values.get(key, "-")))

    for group in grouped(done, key):
        means = {place(run): fmean(r.metric(name) for r in group if place(r) == place(run)) for run in group}
        if known:
            panel.curve(sorted(means.items()), FAINT, 1.4)
    for run in done:
        best = run is done[0]
        chart.dot(
            panel.at(place(run), run.metric(name)), colours[id(run)], 6 if best else 4.5, ring=INK if best else None
        )


def grouped(runs: Sequence[Outcome], key: str) -> list[list[Outcome]]:
    """Return the runs that differ in `key` and the seed only, together."""
    found: dict[tuple[tuple[str, str], ...], list[Outcome]] = {}
    for run in runs:
        rest = tuple(sorted((name, value) for name, value in run.values.items() if name not in (key, "seed")))
        found.setdefault(rest, []).append(run)
    return list(found.values())


def heat_map(chart: Chart, area: Area, runs: Sequence[Outcome], keys: Sequence[str], name: str) -> None:
    """Draw the mean figure of the runs of each pair of values; the best has a border."""
    across, down = (numbers(runs, key) or [] for key in keys)
    chart.box(area, PANEL, 8)
    chart.text((area[0] + 16, area[1] + 12), f"{name} by {keys[0]} and {keys[1]}", 15)
    left, top, right, bottom = area[0] + 86, area[1] + 64, area[2] - 20, area[3] - 44
    wide, tall = (right - left) / len(across), (bottom - top) / len(down)
    cells: dict[tuple[float, float], list[float]] = {}
    for run in runs:
        cells.setdefault((float(run.values[keys[0]]), float(run.values[keys[1]])), []).append(run.metric(name))
    means = {place: fmean(values) for place, values in cells.items()}
    scale = Scale.around(list(means.values()), margin=0.0)
    chart.text((area[0] + 16, top - 8), cut(keys[1], 40), 12, FAINT, "ld")
    for column, value in enumerate(across):
        chart.text((left + (column + 0.5) * wide, bottom + 6), short(value), 12, FAINT, "ma")
    chart.text((right, area[3] - 8), keys[0], 12, FAINT, "rd")
    for row, value in enumerate(reversed(down)):
        chart.text((left - 8, top + (row + 0.5) * tall), short(value), 12, FAINT, "rm")
        for column, other in enumerate(across):
            mean = means.get((other, value))
            box = (
                left + column * wide + 1,
                top + row * tall + 1,
                left + (column + 1) * wide - 1,
                top + (row + 1) * tall - 1,
            )
            if mean is None:
                chart.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), "-", 13, FAINT, "mm")
                continue
            if mean == min(means.values()):
                chart.box((box[0] - 3, box[1] - 3, box[2] + 3, box[3] + 3), INK, 4)
            chart.box(box, shade(scale.place(mean)), 3)
            chart.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), short(mean), 13, "#14161a", "mm")


def courses(
    chart: Chart,
    area: Area,
    runs: Sequence[Outcome],
    name: str,
    colours: Mapping[int, str],
) -> None:
    """Draw the figure, or the loss, of every run over its steps."""
    column = name if max((len(run.curve(name)) for run in runs), default=0) > 2 else "loss"
    curves = [(run, thinned(run.curve(column))) for run in runs]
    curves = [(run, points) for run, points in curves if points]
    if not curves:
        chart.box(area, PANEL, 8)
        chart.text(((area[0] + area[2]) / 2, (area[1] + area[3]) / 2), "no run has made a step", 15, FAINT, "mm")
        return
    every = [value for _, points in curves for _, value in points]
    last = max(step for _, points in curves for step, _ in points)
    panel = Panel(chart, area, f"{column} over steps", Scale(0, last * 1.02), Scale.around(every), below="step")
    for run, points in reversed(curves):  # the best one on top
        panel.curve(points, colours[id(run)], 2.6 if run is runs[0] else 1.5)
        if run.state in ("failed", "diverged"):
            chart.dot(panel.at(*points[-1]), BAD, 4)


def thinned(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """Return a curve of at most `most` points, each the mean of its neighbours."""
    size = -(-len(points) // most) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], fmean(value for _, value in part)) for part in parts]


def table(
    chart: Chart, top: float, runs: Sequence[Outcome], keys: Sequence[str], name: str, colours: Mapping[int, str]
) -> None:
    """List the runs with what was swept over, their state and their figure."""
    shown = list(keys[:4])
    wide = min(230.0, (WIDTH - 2 * EDGE - 560) / max(len(shown), 1))
    places = [EDGE + 46, *(EDGE + 170 + wide * index for index in range(len(shown)))]
    figure, state = places[-1] + (wide if shown else 124), places[-1] + (wide if shown else 124) + 120
    chart.box((EDGE, top, WIDTH - EDGE, top + 44 + LINE * len(runs) + 8), PANEL, 8)
    for at, words in zip([*places, figure, state], ["run", *shown, name, "state"], strict=True):
        chart.text((at, top + 12), cut(words, 30), 13, FAINT)
    for row, run in enumerate(runs):
        y = top + 42 + LINE * row
        chart.line([(EDGE + 16, y + 9), (EDGE + 36, y + 9)], colours[id(run)], 4)
        chart.text((places[0], y), run.folder.name, 14)
        for at, key in zip(places[1:], shown, strict=True):
            chart.text((at, y), cut(run.values.get(key, "-"), 24), 14)
        value = run.metric(name)
        best = row == 0 and math.isfinite(value)
        chart.text((figure, y), short(value) if math.isfinite(value) else "-", 14, GOOD if best else INK)
        words = f"{run.state}{f', {run.note}' if run.note else ''}"
        room = int((WIDTH - EDGE - 12 - state) / max(chart.length(words, 13), 1) * len(words))
        chart.text((state, y), cut(words, max(room, 4)), 13, STATES[run.state])


def cut(words: str, most: int) -> str:
    """Return a text, cut with an ellipsis where it has more than `most` characters."""
    return words if len(words) <= most else words[: most - 1] + "…"
