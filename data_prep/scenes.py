"""The embedded world as a source of samples: scene i of a world becomes sample i, always the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from data_prep.encode import Encoding, encode_png, encode_rgb
from data_prep.pack import Report
from data_prep.records import Caption, Sample, make_sample

LICENSE = "Apache-2.0"  # the world is part of this project


@dataclass(frozen=True)
class SceneUnit:
    """Scenes [first, stop) of a world's training split."""

    preset: str
    seed: int
    first: int
    stop: int
    encoding: Encoding
    prep: dict[str, Any]

    @property
    def size(self) -> int:
        """How many samples it will give."""
        return self.stop - self.first

    def name(self, file: int) -> str:
        """Return which scenes they are."""
        return f"scenes {self.first} to {self.stop - 1}"

    def samples(self, report: Report, skips: Mapping[int, str] | None = None) -> Iterator[Sample]:
        """Render and encode each scene."""
        from data_prep.world import World

        world = World(preset=self.preset, seed=self.seed)
        rendered = report.tally("render", "clips")
        for index in range(self.first, self.stop):
            sample = scene_sample(world, index, self)
            rendered.entered += 1
            rendered.left += 1
            rendered.how["image" if sample.kind == "image" else "video"] += 1
            report.seconds += (sample.record["source"]["end_us"] / 1e6) * (sample.kind == "video")
            yield sample


def scene_sample(world: Any, index: int, unit: SceneUnit) -> Sample:
    """Return scene `index` as a sample: H.264 if it moves, PNG if it is a single image; two captions of its own."""
    from data_prep.world import describe, render
    from data_prep.world.captions import STYLES

    scene = world.scene(index, split="train")
    pixels = render(scene)
    frames, height, width = pixels.shape[:3]
    rate = Fraction(scene.fps).limit_denominator(1001)
    still = frames == 1
    media, gop = (encode_png(pixels[0]), 1) if still else encode_rgb(pixels, rate, unit.encoding)
    video = {
        "w": width,
        "h": height,
        "fps": [rate.numerator, rate.denominator],
        "frames": frames,
        "codec": "png" if still else "h264",
        "pix_fmt": "rgb24" if still else "yuv420p",
        "gop": gop,
        "orig": {"codec": "rendered", "w": width, "h": height, "frames": frames},
    }
    name = f"{unit.preset}/{unit.seed}/{index}"
    return make_sample(
        source={
            "id": f"world/{name}",
            "uri": f"world:{name}",
            "start_us": 0,
            "end_us": round(frames / rate * 1_000_000),
            "license": LICENSE,
        },
        kind="image" if still else "video",
        ext="png" if still else "mp4",
        media=media,
        video=video,
        captions=tuple(
            Caption(style, text, model="world", lang="en") for style in STYLES if (text := describe(scene, style=style))
        ),
        prep=unit.prep,
    )


def scene_units(*, preset: str, seed: int, clips: int, encoding: Encoding, prep: dict[str, Any]) -> list[SceneUnit]:
    """Return the units of work of a world; their number does not depend on how many processes there are."""
    from data_prep.world import World

    World(preset=preset, seed=seed)  # raises ConfigError for a preset that is not known
    size = min(max(clips // 64, 25), 1000)
    return [SceneUnit(preset, seed, first, min(first + size, clips), encoding, prep) for first in range(0, clips, size)]
