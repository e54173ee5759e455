"""The world: an endless, seeded sequence of scenes in each of three splits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.world import demo, full
from data_prep.world.captions import describe
from data_prep.world.scene import Scene
from data_prep.world.seen import Seen
from soratrain.errors import ConfigError

PRESETS = ("demo", "full")
SPLITS = ("train", "seen", "heldout")


@dataclass(frozen=True)
class Prompt:
    """A prompt for evaluation: what to generate, at which size, and what should then be seen."""

    text: str
    truth: Seen
    height: int
    width: int
    frames: int
    fps: float


@dataclass(frozen=True)
class World:
    """A seeded world; cheap to make and to send to another process.

    Scene i of a split is a pure function of (preset, seed, split, i). The splits: "train"; "seen", new scenes of
    combinations that occur in training; "heldout", combinations that never occur in training. In the demo preset
    combinations come in shuffled rounds of clips and of stills, so that all occur about equally often.

    Raises:
        ConfigError: the preset is not known.
    """

    preset: str = "demo"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"a world preset={self.preset!r} does not exist; use one of {', '.join(PRESETS)}")

    def rng(self, split: str, *numbers: int) -> np.random.Generator:
        """Return the generator of one split's item.

        Raises:
            ConfigError: the split is not known.
        """
        if split not in SPLITS:
            raise ConfigError(f"a world split {split!r} does not exist; use one of {', '.join(SPLITS)}")
        key = (PRESETS.index(self.preset), self.seed, SPLITS.index(split), *numbers)
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))

    def scene(self, index: int, split: str = "train") -> Scene:
        """Return scene `index` of a split."""
        rng = self.rng(split, 0, index)
        if self.preset == "full":
            return full.sample(rng, held=split == "heldout")
        height, width = demo.SIZES[rng.choice(len(demo.SIZES), p=demo.SIZE_SHARES)]
        frames = int(rng.choice(demo.FRAMES, p=demo.FRAME_SHARES))
        choices = demo.combinations(held=split == "heldout", still=frames == 1)
        return demo.sample(rng, self.pick(choices, index, split), height, width, frames)

    def pick(self, choices: list[demo.Combination], index: int, split: str) -> demo.Combination:
        """Return the choice whose turn it is: rounds hold every choice once, in a new order each.

        Clips and stills have rounds of their own, of different lengths, in which `index` skips the other's turns; so a
        choice comes about as often as any other, not exactly so.
        """
        turn, position = divmod(index, len(choices))
        return choices[self.rng(split, 1, len(choices), turn).permutation(len(choices))[position]]

    def clip(self, index: int, split: str = "heldout", frames: int | None = None) -> Scene:
        """Return scene `index` of those for evaluation, which no training clip shows: a clip, never a still.

        Args:
            frames: of it; None takes the usual length. What moves goes as far in any number of frames.
        """
        rng = self.rng(split, 2, index)
        if self.preset == "full":
            return full.sample(rng, held=split == "heldout", frames=frames or 17)
        height, width = demo.SIZES[rng.choice(len(demo.SIZES), p=demo.SIZE_SHARES)]
        combination = self.pick(demo.combinations(held=split == "heldout"), index, split)
        return demo.sample(rng, combination, height, width, frames or demo.FRAMES[0])

    def prompts(self, count: int, split: str = "heldout", style: str = "short") -> list[Prompt]:
        """Return `count` prompts for full-length clips of a split, with the truth that they ask for."""
        prompts = []
        for index in range(count):
            scene = self.clip(index, split)
            text = describe(scene, style)
            prompts.append(Prompt(text, scene.truth, scene.height, scene.width, scene.frames, scene.fps))
        return prompts

    def chance(self) -> dict[str, float]:
        """Return how often a blind guess is right, by attribute."""
        return full.chance() if self.preset == "full" else demo.chance()
