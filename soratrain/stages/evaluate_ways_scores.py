"""What drawn clips are worth: agreement with what was wanted, places beside two baselines, and jumps at joints.

Places are what the oracle reads, in pixels and in shares of the frame's shorter side. A model must beat the last given
frame, copied, and the object going on at the mean speed that it had in the given frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.world import measure, trajectories
from soratrain.stages.evaluate import mean_agreement
from soratrain.stages.evaluate_ways_cases import Case
from soratrain.stages.evaluate_ways_drawn import Drawn

TYPICAL = 0.95  # of the true jumps lie below the one that a joint is held against


def places(frames: np.ndarray, color: str | None) -> np.ndarray:
    """Return where the object of a colour is seen, else the largest, `[T, 2]` (x, y) in pixels; NaN where none is."""
    found = trajectories(frames)
    return found.get(color, next(iter(found.values()), np.full((len(frames), 2), np.nan)))  # type: ignore[arg-type]


def seen_places(case: Case, frames: np.ndarray) -> np.ndarray:
    """Return where the object of a case is seen in a clip."""
    return places(frames, case.wanted.objects[0].color)


def copied(seen: np.ndarray, after: int) -> np.ndarray:
    """Return the last of the places `[N, 2]`, `after` times."""
    return np.repeat(seen[-1:], after, 0)


def going_on(seen: np.ndarray, after: int) -> np.ndarray:
    """Return places `[after, 2]` that follow `[N, 2]` at their mean speed; with one place, it stays."""
    speed = (seen[-1] - seen[0]) / max(len(seen) - 1, 1)
    return seen[-1] + speed * np.arange(1, after + 1)[:, None]


def mean(values: Sequence[float] | np.ndarray) -> float:
    """Return the mean of those that are numbers; NaN where there are none."""
    found = np.asarray(values, float)
    found = found[np.isfinite(found)]
    return float(found.mean()) if len(found) else float("nan")


def trajectory(drawn: Sequence[Drawn], rebuild: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """Return the errors of the object's place in the last drawn frame and over all, and what stays of the object.

    Beside them stand the two baselines; `oracle`, which reads the true rendering, and `vae`, what is left of that by
    the autoencoder: nobody can be nearer. A clip in which no object is seen is `lost`, and in no mean.

    Args:
        rebuild: gives a clip `[T, H, W, 3]` as the autoencoder shows it.
    """
    rows = []
    for one in drawn:
        case, given = one.case, int(one.case.given.sum())
        truth = case.scene.sprites[0].path[given:]
        seen = seen_places(case, case.truth[:given])
        tries = {
            "drawn": seen_places(case, one.frames)[given:],
            "copy": copied(seen, len(truth)),
            "velocity": going_on(seen, len(truth)),
            "oracle": seen_places(case, case.truth)[given:],
            "vae": seen_places(case, rebuild(case.truth))[given:],
        }
        gaps = {name: np.linalg.norm(path - truth, axis=1) for name, path in tries.items()}
        rows.append((case.wanted.objects[0].motion, min(case.truth.shape[1:3]), gaps))
    motions = sorted({str(motion) for motion, _, _ in rows})
    kept = mean_agreement(
        [measure(one.frames[one.case.given.sum() :]) for one in drawn], [one.case.wanted for one in drawn]
    )
    return {
        **errors(rows),
        "kept": {name: kept[name] for name in ("color", "shape")},
        "by_motion": {name: errors([row for row in rows if row[0] == name]) for name in motions},
    }


def errors(rows: Sequence[tuple[str | None, int, Mapping[str, np.ndarray]]]) -> dict[str, Any]:
    """Return means over clips: in the last frame in pixels and in shares of the side, and over all frames."""
    found: dict[str, Any] = {"clips": len(rows), "lost": mean([float(np.isnan(row[2]["drawn"][-1])) for row in rows])}
    for name in rows[0][2]:
        found[name] = {
            "px": mean([gaps[name][-1] for _, _, gaps in rows]),
            "side": mean([gaps[name][-1] / side for _, side, gaps in rows]),
            "px_all_frames": mean([mean(gaps[name]) for _, _, gaps in rows]),
            "px_by_frame": [mean(column) for column in np.stack([gaps[name] for _, _, gaps in rows], axis=1)],
        }
    return found


def joints_of(case: Case) -> list[tuple[int, int]]:
    """Return the pairs of frames between which what is given meets what is drawn."""
    given, count = case.given, len(case.given)
    found = [(at, at + 1) for at in range(count - 1) if given[at] != given[at + 1]]
    return [*found, (count - 1, 0)] if case.way == "loop" else found


def jumps(case: Case, frames: np.ndarray, pairs: Sequence[tuple[int, int]]) -> tuple[list[float], list[float]]:
    """Return how far pairs of frames differ: in levels, the mean over all pixels, and the object's place in pixels."""
    seen = seen_places(case, frames)
    levels = [float(np.abs(frames[b].astype(float) - frames[a]).mean()) for a, b in pairs]
    return levels, [float(np.linalg.norm(seen[b] - seen[a])) for a, b in pairs]


def joint(
    drawn: Sequence[Drawn],
    pairs: Callable[[Drawn], Sequence[tuple[int, int]]],
    rebuild: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, Any] | None:
    """Return how the jumps at joints stand to those between frames of the true clips; None where there is no joint.

    Args:
        pairs: gives the frames on both sides of each joint.
        rebuild: gives a clip as the autoencoder shows it: `vae` says how the joints of the true clips do, so shown.
    """
    at = [jumps(one.case, one.frames, pairs(one)) for one in drawn]
    if not any(levels for levels, _ in at):
        return None
    shown = None if rebuild is None else [jumps(one.case, rebuild(one.case.truth), pairs(one)) for one in drawn]
    true = []
    for one in drawn:
        count = len(one.case.truth)
        steps = [(step, step + 1) for step in range(count - 1)] + ([(count - 1, 0)] if one.case.way == "loop" else [])
        true.append(jumps(one.case, one.case.truth, steps))
    found: dict[str, Any] = {"joints": sum(len(levels) for levels, _ in at)}
    for index, name in enumerate(("pixels", "place")):
        values = np.concatenate([pair[index] for pair in at])
        usual = np.concatenate([pair[index] for pair in true])
        bound = float(np.nanquantile(usual, TYPICAL))
        found[name] = {
            "within": float((values <= bound).mean()),  # an object that is lost is not within
            "median": mean([np.median(values)]),
            "largest": mean([values.max()]),
            "true_median": float(np.nanmedian(usual)),
            "bound": bound,
        }
        if shown is not None:
            found[name]["vae"] = float((np.concatenate([pair[index] for pair in shown]) <= bound).mean())
    return found


def decibels(pairs: Sequence[tuple[np.ndarray | None, np.ndarray]]) -> float:
    """Return the PSNR of the mean squared error over all clips: of some that do not move, a mixture makes no error."""
    errors = [np.mean((clip.astype(float) - other) ** 2) for clip, other in pairs if clip is not None]
    return float(10 * np.log10(255.0**2 / max(float(np.mean(errors)), 1e-10)))


def score(drawn: Sequence[Drawn], rebuild: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """Return all figures of one way and split. The oracle judges what was drawn, without what was given.

    Args:
        rebuild: gives a clip as the autoencoder shows it.
    """
    wanted = [one.case.wanted for one in drawn]
    latent = [one.latent for one in drawn if one.latent is not None]
    pixels = [one.pixels for one in drawn if one.pixels is not None]
    found: dict[str, Any] = {
        "clips": len(drawn),
        "agreement": mean_agreement([measure(one.frames[~one.case.given]) for one in drawn], wanted),
        "ceiling": mean_agreement([measure(one.case.truth[~one.case.given]) for one in drawn], wanted),
        "joint": joint(drawn, lambda one: joints_of(one.case), rebuild),
        "clean": {
            "latent": max(latent, default=None),
            "pixels": max(pixels, default=None),
            "pixels_compared": sum(one.promised for one in drawn),
        },
    }
    way = drawn[0].case.way
    if way not in ("t2v", "loop"):  # where nothing says where the object is to be
        found["place_px"] = mean([away(one, one.frames) for one in drawn])
    if min(one.noise for one in drawn) < 1:
        found["noise"] = mean([one.noise for one in drawn])
    if way.startswith("refine"):
        found["psnr"] = decibels([(one.frames, one.case.truth) for one in drawn])
        found["psnr_before"] = decibels([(one.case.source, one.case.truth) for one in drawn])
        found["psnr_vae"] = decibels([(rebuild(one.case.truth), one.case.truth) for one in drawn])
    return found


def away(one: Drawn, frames: np.ndarray) -> float:
    """Return the mean distance of the object from its true path over the drawn frames, in pixels."""
    gaps = np.linalg.norm(seen_places(one.case, frames) - one.case.scene.sprites[0].path, axis=1)
    return mean(gaps[~one.case.given])
