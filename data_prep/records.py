"""The typed records that pass from step to step, and `K.json`, what a shard says about each of its samples.

ingest gives a `Source`, probe a `Probe` of it, shots its `Span`s, transcode a `Sample` for each; pack writes samples.
Frames are counted as they are shown; times are seconds from the first frame.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, Literal

from data_prep.alpha import Alpha
from data_prep.members import File

SCHEMA = 1  # of K.json, dataset.json and stats.json

Kind = Literal["video", "image"]
How = Literal["copied", "remuxed", "encoded"]  # a media member came to be


FROM_NAME = "filename"  # the `model` of a caption that is only the words of a file's name


@dataclass(frozen=True)
class Caption:
    """One text about a sample; `type` is one of gt, short, long, camera, tags."""

    type: str
    text: str
    model: str = ""
    rev: str = ""
    lang: str = ""


@dataclass(frozen=True)
class Source:
    """One input file. `uri` is how the user would name it: its path below the input folder, or as it was given.

    A file inside a tar is named by both: `shards/00000.tar/000000017.mp4`.
    """

    uri: str
    path: File
    kind: Kind
    captions: tuple[Caption, ...] = ()


@dataclass(frozen=True)
class Picture:
    """How the stored pixels become the picture that is meant.

    Attributes:
        width, height: stored size in pixels.
        pix_fmt: FFmpeg's name of the pixel format.
        turn: display matrix as (a, b, c, d), each -1, 0 or 1: shown = stored · [[a, b], [c, d]].
        aspect: width of a pixel divided by its height.
        interlaced: whether any frame is made of two fields.
        full_range: whether black is 0 and white 255, rather than 16 and 235.
        matrix, transfer: H.273 codes of the matrix and the transfer characteristic; 2 is unspecified.
        alpha: what becomes of its transparency; empty where it has none.
    """

    width: int
    height: int
    pix_fmt: str
    turn: tuple[int, int, int, int] = (1, 0, 0, 1)
    aspect: Fraction = Fraction(1)
    interlaced: bool = False
    full_range: bool = False
    matrix: int = 2
    transfer: int = 2
    alpha: Alpha = ""

    @property
    def sideways(self) -> bool:
        """Whether the turn exchanges width and height."""
        return self.turn[0] == 0


@dataclass(frozen=True)
class Cut:
    """A new shot begins at `frame`, which differs by `content` (of 255) from the one before."""

    frame: int
    content: float


@dataclass(frozen=True)
class Probe:
    """What decoding every frame of a source showed.

    Attributes:
        id: hash of the file's bytes, in hex.
        times: when each frame is shown, increasing, `times[0] == 0`.
        end: when the last frame ends.
        rate: the constant rate (frames/s) that the timestamps follow, or the one chosen for those that follow none.
        constant: whether they follow it.
        gop: the most frames from one key frame to the next.
        headed: whether the first frame shown is a key frame; it is not where an edit list hides those before it.
        streams: how many streams the file has, of any type.
        damage: why only a leading part could be decoded, in plain words; empty where all could.
        cuts: where new shots seem to begin, in order.
    """

    id: str
    container: str
    codec: str
    stream: int
    streams: int
    picture: Picture
    times: tuple[float, ...]
    end: float
    rate: Fraction
    constant: bool
    gop: int
    headed: bool = True
    damage: str = ""
    cuts: tuple[Cut, ...] = ()


@dataclass(frozen=True)
class Span:
    """Frames [first, stop) of a source, shown from `start` to `end` seconds; `whole` where these are all of it."""

    first: int
    stop: int
    start: float
    end: float
    whole: bool


@dataclass(frozen=True)
class Sample:
    """One clip or image as it goes into a shard: `record` is K.json, `media` the bytes of `K.<ext>`.

    `why` is why it had to be encoded, for the summary alone; empty where that goes without saying.
    """

    key: str
    kind: Kind
    ext: str
    media: bytes
    record: dict[str, Any]
    why: str = ""

    @property
    def how(self) -> How:
        """How the media came to be: the file itself, its packets in another container, or encoded anew."""
        how: How = self.record["video"]["how"]
        return how

    def row(self) -> dict[str, Any]:
        """Return the manifest columns that do not depend on where the sample is packed."""
        video = self.record["video"]
        return {
            "key": self.key,
            "kind": self.kind,
            "ext": self.ext,
            "w": video["w"],
            "h": video["h"],
            "frames": video["frames"],
            "fps_num": video["fps"][0],
            "fps_den": video["fps"][1],
            "scores": dumps(self.record["scores"]),
        }


@dataclass(frozen=True)
class Failure:
    """Something that did not get in, and why. `used` says what got in all the same, if anything did."""

    uri: str
    step: str
    reason: str
    used: str = ""


@dataclass
class Tally:
    """What entered and left one step, and why the rest did not."""

    step: str
    unit: str
    entered: int = 0
    left: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    how: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Add another tally of the same step."""
        self.entered += other.entered
        self.left += other.left
        self.dropped.update(other.dropped)
        self.how.update(other.how)

    def as_dict(self) -> dict[str, Any]:
        """Return the form that stats.json holds."""
        row: dict[str, Any] = {"step": self.step, "unit": self.unit, "in": self.entered, "out": self.left}
        return row | {"dropped": dict(sorted(self.dropped.items())), "how": dict(sorted(self.how.items()))}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Tally:
        """Undo `as_dict`."""
        return cls(row["step"], row["unit"], row["in"], row["out"], Counter(row["dropped"]), Counter(row["how"]))


def dumps(value: Any) -> str:
    """Return `value` as JSON, always the same text for the same value."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def key_of(source_id: str, start_us: int, end_us: int) -> str:
    """Return a sample's key: 32 hex digits from what the source holds and which part of it is meant."""
    return hashlib.blake2b(f"{source_id}\x1f{start_us}\x1f{end_us}".encode(), digest_size=16).hexdigest()


def make_sample(
    *,
    source: dict[str, Any],
    kind: Kind,
    ext: str,
    media: bytes,
    video: dict[str, Any],
    captions: tuple[Caption, ...],
    prep: dict[str, Any],
    how: How = "encoded",
) -> Sample:
    """Return a sample with its key and K.json; `source` has id, uri, start_us, end_us and license."""
    key = key_of(source["id"], source["start_us"], source["end_us"])
    record = {
        "schema": SCHEMA,
        "key": key,
        "source": source,
        "video": video | {"how": how},
        "scores": {},
        "captions": [asdict(caption) for caption in captions],
        "prep": prep,
    }
    return Sample(key, kind, ext, media, record)
