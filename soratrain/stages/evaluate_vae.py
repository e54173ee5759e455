"""stage=evaluate target=vae: how near an autoencoder's reconstructions are to the clips, frame by frame.

Clips are streamed, so that memory does not grow with their duration. The first pass measures; the second draws the
worst clip, the best and some between, which are known only then.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor, nn

from soratrain.data.atomic import replacing
from soratrain.data.buckets import parse_size
from soratrain.errors import ConfigError, DataError
from soratrain.frechet import ClipFeatures, frechet_distance
from soratrain.quality import perceptual, psnr, ssim
from soratrain.stages.clips import Clip, Fit, candidates
from soratrain.stages.pace import progress
from soratrain.stages.rebuild import Rebuild, check_size
from soratrain.stages.vae_pictures import draw_clips, to_shown
from soratrain.stages.vae_summary import Measured, plain, show, summarise, write_csv

log = logging.getLogger(__name__)


class EvaluateVAE:
    """The job.

    Args:
        out: the stage's folder; gets `report.json`, `metrics.csv`, `clips.csv` and `clips/*.mp4|png`.
        vae: folder of the weights, of any net with the face of `VAE`.
        shards: folders or URLs of shards, or plain folders of videos.
        clips: how many to measure, drawn by `seed`; one that cannot be used is counted, and another taken.
        min_frames, max_frames: of a clip as measured; null for no bound. min_frames=1 takes images too.
        size: `WIDTHxHEIGHT` to which clips are scaled down and cropped; null leaves each its own.
        shown: clips that are drawn.
        lpips: paths `vgg` and `lin` of LPIPS's weights; null leaves it out.
        fvd: `i3d`, the path of I3D as TorchScript (null leaves rFVD out), and `frames` of each clip that it sees.
        pixels_per_batch, precision: see Rebuild.
        device: `auto` takes CUDA where there is one.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        *,
        out: str,
        vae: str,
        shards: str | list[str],
        clips: int,
        min_frames: int | None,
        max_frames: int | None,
        size: str | None,
        shown: int,
        seed: int,
        lpips: dict[str, str | None],
        fvd: dict[str, Any],
        pixels_per_batch: int = 1 << 22,
        precision: str = "32-true",
        device: str = "auto",
    ) -> None:
        least = {"clips": (clips, 1), "shown": (shown, 0), "pixels_per_batch": (pixels_per_batch, 1)}
        for name, (value, bound) in least.items():
            if value < bound:
                raise ConfigError(f"stage.job.{name}={value} must be at least {bound}")
        if max_frames is not None and max_frames < (min_frames or 1):
            raise ConfigError(f"stage.job.max_frames={max_frames} must be at least min_frames={min_frames or 1}")
        if bool(lpips["vgg"]) != bool(lpips["lin"]):
            given, lacking = ("vgg", "lin") if lpips["vgg"] else ("lin", "vgg")
            raise ConfigError(f"lpips.{given} is given and lpips.{lacking} is not; LPIPS needs both files")
        self.out, self.vae = Path(out), vae
        self.places = [shards] if isinstance(shards, str) else list(shards)
        self.clips, self.min_frames, self.max_frames = clips, min_frames or 1, max_frames
        self.size = parse_size(size) if size else None
        self.shown, self.seed, self.lpips, self.fvd = shown, seed, lpips, fvd
        self.pixels_per_batch, self.precision = pixels_per_batch, precision
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.perceptual: nn.Module | None = None
        self.features: ClipFeatures | None = None

    def __call__(self) -> dict[str, Any]:
        """Measure, draw and write everything; return the chief figures.

        Raises:
            DataError: the weights hold what is not a number, or no clip can be measured.
            ConfigError: the net is no autoencoder, or `size` does not fit its stride.
        """
        rebuild = Rebuild(self.vae, self.device, self.pixels_per_batch, self.precision)
        if self.size:
            check_size(self.size, rebuild.stride)
        self.load_judges()
        fit = Fit(rebuild.stride, self.min_frames, self.max_frames, self.size)
        taken, measured, passed, heads = self.measure(rebuild, fit)
        left_out = Counter(reason for _, reason in passed)
        if not measured:
            reasons = "; ".join(f"{count} × {reason}" for reason, count in left_out.most_common(3))
            raise DataError(
                f"inputs.shards={', '.join(self.places)}: no clip can be measured ({reasons or 'there is none'}); give"
                f" other clips, or lower stage.job.min_frames={self.min_frames}"
            )
        time = rebuild.stride[0]
        rows = summarise(measured, time)
        report: dict[str, Any] = {
            "vae": self.vae,
            "shards": self.places,
            "rule": str(fit),
            "spread": "standard deviation over clips",
            "clips": counted(taken, left_out),
            "left_out": [{"clip": name, "reason": reason} for name, reason in passed],
            "rows": rows,
            "rfvd": self.distance(heads),
            "cost": rebuild.cost(),
            "not_finite": not_finite(measured),
            "pictures": draw_clips(self.out / "clips", rebuild, taken, measured, self.shown),
        }
        write_csv(self.out, rows, measured, time)
        with replacing(self.out / "report.json") as path:
            path.write_text(json.dumps(plain(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        show(Console(soft_wrap=True, highlight=False), plain(report))
        chief = {name: rows[0][name]["mean"] for name in measured[0].frames}
        rfvd = {"rfvd": report["rfvd"]["value"]} if report["rfvd"] else {}
        return plain({**chief, **rfvd, "clips": len(measured), "report": str(self.out / "report.json")})

    def load_judges(self) -> None:
        """Load the networks that judge, as far as their weights are given, and say which are not."""
        vgg, lin = self.lpips["vgg"], self.lpips["lin"]
        if vgg and lin:
            from soratrain.models.lpips import load_lpips

            self.perceptual = load_lpips(vgg, lin).to(self.device)
        if self.fvd["i3d"]:
            self.features = ClipFeatures(self.fvd["i3d"], self.fvd["frames"], self.device)
        off = {"LPIPS (lpips.vgg=FILE lpips.lin=FILE)": self.perceptual, "rFVD (fvd.i3d=FILE)": self.features}
        if missing := [name for name, judge in off.items() if judge is None]:
            log.info("off, since their weights are not given: %s", ", ".join(missing))

    def measure(
        self, rebuild: Rebuild, fit: Fit
    ) -> tuple[list[Clip], list[Measured], list[tuple[str, str]], list[tuple[Tensor, Tensor]]]:
        """Return the clips that were measured, their figures, which others were not and why, and rFVD's features."""
        taken: list[Clip] = []
        measured: list[Measured] = []
        passed: list[tuple[str, str]] = []
        features: list[tuple[Tensor, Tensor]] = []
        with progress() as bar:
            task = bar.add_task("measure", total=self.clips)
            for clip in candidates(self.places, fit, self.seed):
                if isinstance(clip, tuple):
                    passed.append(clip)
                    log.debug("%s is left out: %s", *clip)
                    continue
                if len(taken) == 1:
                    rebuild.restart()
                try:
                    found, heads = self.measure_clip(rebuild, clip, partial(told, bar, task, clip))
                except DataError as error:
                    log.warning("clip %s is left out: %s", clip.name, error)
                    passed.append((clip.name, "cannot be decoded"))
                    continue
                taken.append(clip)
                measured.append(found)
                if self.features is not None and len(heads[0]) == self.features.frames:
                    original, rebuilt = map(self.features, heads)
                    whole = np.isfinite(found.frames["psnr"][: self.features.frames]).all()
                    features.append((original, rebuilt if whole else rebuilt * torch.nan))
                bar.advance(task)
                if len(taken) == self.clips:
                    break
            bar.update(task, total=len(taken))  # there may be no more
        return taken, measured, passed, features

    def measure_clip(
        self, rebuild: Rebuild, clip: Clip, watch: Callable[[int], None]
    ) -> tuple[Measured, tuple[Tensor, Tensor]]:
        """Return a clip's figures, and the frames of both sides that rFVD sees; `watch` is told the frames done."""
        found: dict[str, list[Tensor]] = {}
        heads: tuple[list[Tensor], list[Tensor]] = [], []
        wanted = self.features.frames if self.features is not None else 0
        for original, rebuilt in rebuild(clip):
            finite = rebuilt.isfinite().flatten(1).all(1)
            seen = to_shown(rebuilt)
            for name, values in self.metrics(original, seen).items():
                found.setdefault(name, []).append(torch.where(finite, values.double(), torch.nan).cpu())
            for side, frames in zip(heads, (original, seen), strict=True):
                side.append(frames[:wanted].cpu())
            wanted -= min(len(original), wanted)
            watch(sum(map(len, found["psnr"])))
        figures = {name: torch.cat(values).numpy() for name, values in found.items()}
        return Measured(clip.name, clip.bucket, figures), (torch.cat(heads[0]), torch.cat(heads[1]))

    @torch.no_grad()
    def metrics(self, original: Tensor, rebuilt: Tensor) -> dict[str, Tensor]:
        """Return each metric of uint8 frames `[N, H, W, 3]`, `[N]`."""
        found = {"psnr": psnr(original, rebuilt), "ssim": ssim(original, rebuilt)}
        if self.perceptual is not None:
            found["lpips"] = perceptual(self.perceptual, original, rebuilt)
        return found

    def distance(self, features: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any] | None:
        """Return rFVD and what to think of it; None where it is off."""
        if self.features is None:
            return None
        clips, frames = len(features), self.features.frames
        found: dict[str, Any] = {"value": None, "clips": clips, "frames": frames, "note": ""}
        if clips < 2:
            return found | {"note": f"only {clips} clips have {frames} frames; two are the least"}
        original, rebuilt = (torch.stack(side) for side in zip(*features, strict=True))
        size = original.shape[1]
        if clips <= size:
            found["note"] = f"too few clips: {size} features need over {size} for a covariance of full rank"
        value = frechet_distance(original, rebuilt) if rebuilt.isfinite().all() else float("nan")
        return found | {"value": value, "features": size}


def told(bar: Progress, task: TaskID, clip: Clip, frames: int) -> None:
    """Show how far a clip has come."""
    bar.update(task, description=f"measure, frame {frames} of {clip.bucket.frames}")


def counted(clips: Sequence[Clip], left_out: Counter[str]) -> dict[str, Any]:
    """Return how many clips were measured, what was cut off them, and why others were not."""
    scaled = [clip for clip in clips if clip.scaled]
    pixels = sum(clip.source.height * clip.source.width for clip in clips if not clip.scaled)
    kept = sum(clip.bucket.height * clip.bucket.width for clip in clips if not clip.scaled)
    return {
        "measured": len(clips),
        "left_out": dict(left_out.most_common()),
        "frames": sum(clip.bucket.frames for clip in clips),
        "frames_not_used": sum(clip.source.frames - clip.bucket.frames for clip in clips),
        "trimmed": sum(clip.source.frames > clip.bucket.frames for clip in clips),
        "cropped": sum(clip.source[:2] != clip.bucket[:2] for clip in clips if not clip.scaled),
        "pixels_cropped": 1 - kept / pixels if pixels else 0.0,
        "scaled": len(scaled),
    }


def not_finite(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return the clips in whose reconstruction some value is not a number: how many frames, and the first."""
    found = []
    for clip in measured:
        wrong = np.flatnonzero(~np.isfinite(clip.frames["psnr"]))
        if len(wrong):
            found.append({"clip": clip.name, "frames": len(wrong), "first": int(wrong[0])})
    return found
