"""The clips that an evaluation draws: the worst, the best and some between, each as a video and as a strip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from soratrain.batch import to_uint8
from soratrain.compared import Column, beside, draw
from soratrain.media import write_video
from soratrain.sheet import pick
from soratrain.stages.clips import Clip
from soratrain.stages.pace import progress
from soratrain.stages.rebuild import Rebuild
from soratrain.stages.sample_files import slug
from soratrain.stages.vae_summary import Measured, phase_of

STRIP = 6  # frames of a picture


def draw_clips(
    folder: Path, rebuild: Rebuild, clips: Sequence[Clip], measured: Sequence[Measured], count: int
) -> list[str]:
    """Draw `count` clips, as PNG and (videos) MP4, each rebuilt once more; return the paths."""
    order = np.argsort([np.nan_to_num(one.mean("psnr"), nan=-np.inf) for one in measured])
    ranks = pick(np.arange(len(order)), count) if count else np.arange(0)
    made = []
    with progress() as bar:
        task = bar.add_task("draw", total=int(sum(clips[order[rank]].bucket.frames for rank in ranks)))
        for rank in ranks:
            clip, one = clips[order[rank]], measured[order[rank]]
            place = "only" if len(order) == 1 else {0: "worst", len(order) - 1: "best"}.get(int(rank), "middle")
            path = folder / f"{rank + 1:03d}-{place}-{slug(clip.name)}"
            frames = pick(np.arange(clip.bucket.frames), STRIP)
            kept: dict[int, Column] = {}
            pairs = watched(rebuild, clip, one, set(frames.tolist()), kept, lambda: bar.advance(task))
            if clip.bucket.frames > 1:
                write_video(path.with_suffix(".mp4"), beside(pairs), float(clip.fps))
                made.append(str(path.with_suffix(".mp4")))
            for _ in pairs:  # an image has no video
                continue
            figures = "   ".join(f"{name.upper()} {one.mean(name):.4g}" for name in one.frames)
            notes = [f"{clip.bucket}   {figures}   {place} of {len(order)} clips by PSNR (rank {rank + 1})"]
            draw(path.with_suffix(".png"), clip.name, notes, [kept[number] for number in sorted(kept)])
            made.append(str(path.with_suffix(".png")))
    return made


def watched(
    rebuild: Rebuild, clip: Clip, one: Measured, wanted: set[int], kept: dict[int, Column], step: Callable[[], None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield a clip's frames and reconstructions one by one, uint8 `[H, W, 3]`; those `wanted` are kept."""
    number = 0
    for original, rebuilt in rebuild(clip):
        for pair in zip(original.cpu().numpy(), to_shown(rebuilt).cpu().numpy(), strict=True):
            if number in wanted:
                phase = phase_of(number, rebuild.stride[0])
                note = f"{one.frames['psnr'][number]:.1f} dB" + (f"  {phase}" if number else "")
                kept[number] = Column(f"frame {number}", note, *pair)
            yield pair
            step()
            number += 1


def to_shown(rebuilt: Tensor) -> Tensor:
    """Return a reconstruction `[n, 3, H, W]` as it is shown, uint8 `[n, H, W, 3]`; black where it is no number."""
    return to_uint8(rebuilt.nan_to_num(-1.0, -1.0, -1.0).transpose(0, 1)[None])[0]
