"""Clips of the same prompts, drawn again and again as training goes, by what stage=sample draws with."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import lightning as L
import numpy as np

from soratrain.callbacks import loggers
from soratrain.callbacks.apart import apart
from soratrain.callbacks.ema import EMA
from soratrain.callbacks.metrics import Metrics
from soratrain.callbacks.step import StepCallback
from soratrain.diffusion.generator import Generator
from soratrain.diffusion.sampler import Sampler
from soratrain.diffusion.sizes import check_fps, check_prompt, check_size
from soratrain.distributed.checkpoint import gather
from soratrain.distributed.mesh import Mesh
from soratrain.errors import ConfigError, UserError
from soratrain.media import write_image, write_video
from soratrain.models.autoencoders import load_vae
from soratrain.models.patchify import STRIDE
from soratrain.sheet import Row, contact_sheet
from soratrain.stages.base import TrainStage
from soratrain.stages.dit import DiTStage
from soratrain.stages.sample import parse_size
from soratrain.stages.sample_files import slug

log = logging.getLogger(__name__)


class Previews(StepCallback):
    """Draws every `every` steps and at the last, with the averaged weights where there is an average.

    A prompt's clip is what stage=sample would draw with these weights. Rank 0 draws alone, except under ZeRO-3, where
    no rank has the whole net, and where ranks share their tokens. The VAE is in memory only while clips are drawn.

    Args:
        out: the stage's folder; clips and a contact sheet go to `samples/`.
        metrics: whose clock is set back: the time is not counted in the training's speed. Its phases are told how far
            it has come.
        ema: the average, if any.
        precision: `32-true` or `bf16-mixed`.
        every: steps; 0 never draws.
        prompts: what to draw.
        size: `WIDTHxHEIGHT` in pixels.
        frames: 1 for an image, else 1 + 4k.
        fps: frames per second.
        seed: with the prompt, settles the noise.
        sampler: how clips are drawn.
        vae: folder of the VAE.
        patch: latent positions of a token.
        batch: most clips drawn at once.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        *,
        out: Path,
        metrics: Metrics,
        ema: EMA | None,
        precision: str,
        every: int,
        prompts: str | Sequence[str],
        size: str,
        frames: int,
        fps: float,
        seed: int,
        sampler: Sampler,
        vae: str,
        patch: Sequence[int] = (1, 2, 2),
        batch: int = 4,
    ) -> None:
        super().__init__()
        if every < 0:
            raise ConfigError(f"validation.sample_every={every}: must be at least 0; 0 draws nothing")
        self.prompts = [prompts] if isinstance(prompts, str) else [str(prompt) for prompt in prompts]
        self.every = every if self.prompts else 0
        with named("validation.size, validation.frames"):
            self.height, self.width = parse_size(size)
            check_size(self.height, self.width, frames, patch)
        with named("validation.fps"):
            check_fps(fps)
        with named("validation.prompts"):
            for prompt in self.prompts:
                check_prompt(prompt, sampler.guidance_scale)
        self.folder, self.metrics, self.ema, self.precision = Path(out) / "samples", metrics, ema, precision
        self.frames, self.fps, self.seed = frames, fps, seed
        self.sampler, self.vae, self.batch = sampler, vae, batch

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that clips can be drawn, before hours have gone by.

        Raises:
            ConfigError: they cannot, and why.
        """
        super().on_train_start(trainer, pl_module)
        if not self.every:
            return
        assert isinstance(pl_module, DiTStage)
        reason = ""
        if trainer.is_global_zero:
            try:
                with apart():
                    generate = self.generator(pl_module)
                    generate.check(self.prompts, self.height, self.width, self.frames, self.sampler)
                    if generate.vae.latent_channels != pl_module.dit.channels or generate.vae.stride[0] != STRIDE[0]:
                        reason = f"inputs.vae={self.vae} is not the VAE that the latents were made with"
            except UserError as error:
                reason = str(error)
        if reason := gather(reason)[0]:
            raise ConfigError(f"validation: no samples can be drawn: {reason}; validation.sample_every=0 does without")

    def on_step(self, trainer: L.Trainer, stage: TrainStage) -> None:
        if self.every and (self.step % self.every == 0 or self.step >= stage.max_steps):
            assert isinstance(stage, DiTStage)
            began = time.monotonic()
            together = getattr(trainer.strategy, "zero_stage_3", False) or Mesh.of(trainer).sequence > 1
            clips: list[np.ndarray] = []
            with self.ema.in_place(trainer) if self.ema else nullcontext():
                drawing = trainer.is_global_zero or together
                with apart(stage.dit, stage.text) if drawing else nullcontext():
                    generate = self.generator(stage) if drawing else None
                    for start in range(0, len(self.prompts), self.batch):
                        if generate is not None:
                            clips += self.draw(generate, self.prompts[start : start + self.batch])
                        gather(None)  # no rank waits for another for longer than a batch takes
                        self.metrics.throughput.phases.move()
                    del generate
            if trainer.is_global_zero:
                self.write(trainer, clips)
                log.info("samples at step %d: %s; %.1f s", self.step, self.sheet, time.monotonic() - began)
            self.metrics.throughput.began += time.monotonic() - began

    def generator(self, stage: DiTStage) -> Generator:
        """Return what draws with the weights that the stage has now."""
        return Generator(
            load_vae(self.vae, stage.device),
            stage.dit,
            stage.text,
            objective=stage.objective,
            caption_dropout=stage.conditioning.caption_dropout,
            batch=self.batch,
            precision=self.precision,
        )

    def draw(self, generate: Generator, prompts: Sequence[str]) -> list[np.ndarray]:
        """Return a clip for each prompt, uint8 `[T, H, W, 3]`."""
        return generate(
            prompts,
            height=self.height,
            width=self.width,
            frames=self.frames,
            fps=self.fps,
            seed=self.seed,
            sampler=self.sampler,
        )

    @property
    def sheet(self) -> Path:
        """The contact sheet of this step."""
        return self.folder / f"{self.step:08d}.png"

    def write(self, trainer: L.Trainer, clips: Sequence[np.ndarray]) -> None:
        """Write a file for each clip, then the contact sheet, and hand all of them to the loggers."""
        files = []
        for prompt, clip in zip(self.prompts, clips, strict=True):
            path = self.folder / f"{self.step:08d}-{slug(prompt)}.{'png' if self.frames == 1 else 'mp4'}"
            if self.frames == 1:
                write_image(path, clip[0])
            else:
                write_video(path, clip, self.fps)
            files.append(path)
        rows = [Row(prompt, clip) for prompt, clip in zip(self.prompts, clips, strict=True)]
        weights = "averaged weights" if self.ema else "trained weights"
        contact_sheet(self.sheet, f"step {self.step}", [(f"{weights}, seed {self.seed}", rows)], columns=1)
        for logger in trainer.loggers:
            loggers.show_files(logger, self.step, "samples", files, self.prompts)
            loggers.show_files(logger, self.step, "samples/sheet", [self.sheet])


@contextmanager
def named(keys: str) -> Iterator[None]:
    """Say of what is refused inside the block which keys of the config it is of."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{keys}: {error}") from error
