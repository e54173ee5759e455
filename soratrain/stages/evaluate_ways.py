"""stage=evaluate target=ways: every way to sample, scored on the embedded world, whose truth is known.

Clips of each way are judged by the oracle; the first frames given, so is where the object goes. Joints are held against
the jumps between frames of true clips, and what is given must stay what it is, to the bit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from data_prep.world import World
from soratrain.data.atomic import replacing
from soratrain.diffusion.generator import Generator
from soratrain.diffusion.sampler import Sampler
from soratrain.diffusion.ways import TIME
from soratrain.errors import ConfigError
from soratrain.stages.evaluate import SPLITS
from soratrain.stages.evaluate_ways_cases import WAYS, Case, Maker
from soratrain.stages.evaluate_ways_drawn import Drawn, draw_cases
from soratrain.stages.evaluate_ways_scores import joint, score, trajectory
from soratrain.stages.evaluate_ways_shown import draw_sheet, show
from soratrain.stages.pace import progress
from soratrain.stages.vae_summary import plain

log = logging.getLogger(__name__)


class EvaluateWays:
    """The job.

    Args:
        out: the stage's folder; gets `report.json`, `contact_sheet.png`, and in `inputs/` the files that were given.
        vae, dit: folders with the weights.
        preset, world_seed: of the world; its scenes must show one object each.
        ways: which to score; none: trajectories alone.
        clips: of each way and split.
        trajectories: clips of each split, number of given frames and number of frames after them; 0 for none.
        given: how many of the first frames are given, each 1 (animate) or 1 + 4k (extend).
        after: how many frames later the object's place is compared, each a multiple of 4.
        window: frames of a window where a way rolls.
        edit, refine: how much is drawn anew, in (0, 1].
        shown: clips of each way and split on the sheet.
        sampler: how clips are drawn.
        precision: `bf16-mixed` runs the nets under autocast, `32-true` does not.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        *,
        out: str,
        vae: str,
        dit: str,
        preset: str,
        world_seed: int,
        ways: Sequence[str],
        clips: int,
        trajectories: int,
        given: Sequence[int],
        after: Sequence[int],
        window: int,
        edit: float,
        refine: float,
        shown: int,
        seed: int,
        sampler: Sampler,
        precision: str = "32-true",
        device: str = "auto",
    ) -> None:
        for name, value, least in (("clips", clips, 1), ("trajectories", trajectories, 0), ("shown", shown, 0)):
            if value < least:
                raise ConfigError(f"stage.job.{name}={value} must be at least {least}")
        for way in ways:
            if way not in WAYS:
                raise ConfigError(f"stage.job.ways: {way!r} is no way to sample that is scored; use {', '.join(WAYS)}")
        for name, values, first in (("given", given, 1), ("after", after, TIME), ("window", [window], 1 + TIME)):
            for value in values:
                if value < first or (value - first) % TIME:
                    rule = f"{first}, {first + TIME}, {first + 2 * TIME}, …"
                    raise ConfigError(f"stage.job.{name}={value}: use one of {rule}")
        for name, strength in (("edit", edit), ("refine", refine)):
            if not 0 < strength <= 1:
                raise ConfigError(
                    f"stage.job.{name}={strength} must lie in (0, 1]: the noise level from which it is drawn"
                )
        if preset != "demo":
            raise ConfigError(f"stage.job.preset={preset}: its scenes show several objects; use demo, which shows one")
        if not ways and not (trajectories and given and after):
            raise ConfigError("stage.job.ways is empty and so are the trajectories: nothing is left to score")
        self.out, self.vae, self.dit = Path(out), vae, dit
        self.world = World(preset=preset, seed=world_seed)
        self.ways, self.clips, self.trajectories = list(ways), clips, trajectories
        self.given, self.after, self.window = list(given), list(after), window
        self.edit, self.refine, self.shown = edit, refine, shown
        self.seed, self.sampler, self.precision = seed, sampler, precision
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)

    def __call__(self) -> dict[str, Any]:
        """Draw, score and write everything; return the chief figures."""
        generate = Generator.load(self.vae, self.dit, device=self.device, precision=self.precision)
        strengths = {"edit": self.edit, "refine": self.refine}
        maker = Maker(self.world, self.out / "inputs", self.window, patch=generate.dit.patch, **strengths)
        ways = {(way, split): maker.cases(way, split, self.clips) for way in self.ways for split in SPLITS}
        pairs = [(given, after) for given in self.given for after in self.after] if self.trajectories else []
        paths = {(*pair, split): maker.continued(split, *pair, self.trajectories) for pair in pairs for split in SPLITS}
        generate.check_prompts([case.prompt for cases in ways.values() for case in cases], self.sampler)
        drawn = self.draw(generate, [case for part in (ways, paths) for cases in part.values() for case in cases])
        found = iter(drawn)
        clips = {key: [next(found) for _ in cases] for key, cases in ways.items()}
        moved = {key: [next(found) for _ in cases] for key, cases in paths.items()}

        def rebuild(frames: np.ndarray) -> np.ndarray:
            count = len(frames)
            whole = np.concatenate((frames, frames[: -(count - 1) % TIME]))  # a loop's truth goes on where it began
            return generate.decode(generate.encoded(whole))[:count]

        trajectories = [
            {"given": key[0], "after": key[1], "split": key[2], **trajectory(some, rebuild)}
            for key, some in moved.items()
        ]
        report = plain(
            {
                "vae": self.vae,
                "dit": self.dit,
                "precision": self.precision,
                "sampler": {"steps": self.sampler.steps, "guidance_scale": self.sampler.guidance_scale},
                "ways": [{"way": way, "split": split, **score(some, rebuild)} for (way, split), some in clips.items()],
                "trajectories": trajectories,
                "windows": joint(drawn, lambda one: [(int(end) - 1, int(end)) for end in one.windows]),
            }
        )
        with replacing(self.out / "report.json") as path:
            path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        sheet = self.out / "contact_sheet.png"
        if self.shown:
            draw_sheet(sheet, clips, moved, self.shown)
        show(Console(highlight=False), report)
        latents = [row["clean"]["latent"] for row in report["ways"] if row["clean"]["latent"] is not None]
        return {
            "clips": len(drawn),
            "clean_latents_change": max(latents, default=None),
            "report": str(self.out / "report.json"),
            **({"contact_sheet": str(sheet)} if self.shown else {}),
        }

    def draw(self, generate: Generator, cases: Sequence[Case]) -> list[Drawn]:
        """Return the cases drawn, in their order."""
        with progress() as bar:
            line = bar.add_task("draw", total=len(cases))
            return draw_cases(generate, cases, self.sampler, self.seed, lambda done: bar.advance(line, done))
