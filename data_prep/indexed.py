"""The samples of one tar as task=index finds them: manifest rows of media that stay where they are."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from data_prep import pulse
from data_prep.kinds import kind_of
from data_prep.media import UPRIGHT, Unusable, decoded, opened, turn_of, video_stream
from data_prep.members import File, Member
from data_prep.pack import Report
from data_prep.records import SCHEMA, Caption, Failure, Kind, Sample, dumps
from data_prep.sidecars import read_captions
from data_prep.tars import Group, groups, texts
from soratrain.data.decode import number_of
from soratrain.data.members import json_object
from soratrain.data.shards import KEY
from soratrain.errors import DataError

APART = "the members of its sample stand apart in the tar; make the tar with --sort=name"
STEPS = ("read", "index")
PART = 1 << 20  # bytes read at once
TROUBLE = (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError)


@dataclass(frozen=True)
class Found(Sample):
    """A sample whose media stay in their tar: `columns` is its row of the manifest, `record` what the merge needs."""

    columns: dict[str, Any] | None = None

    def row(self) -> dict[str, Any]:
        """Return its row of the manifest."""
        assert self.columns is not None
        return self.columns


@dataclass(frozen=True)
class TarUnit:
    """All samples of one tar."""

    path: Path
    size: int = 1

    def name(self, file: int) -> str:
        """Return the tar's name and which sample it is."""
        return self.path.name if file == pulse.NOWHERE else f"{self.path.name} sample {file + 1:,}"

    def samples(self, report: Report, skips: Mapping[int, str] | None = None) -> Iterator[Found]:
        """Yield the samples that can be used; what cannot is recorded with its reason."""
        tars, tally = report.tally("read", "tars"), report.tally("index", "samples")
        tars.entered += 1
        endings: dict[str, set[str]] = {}  # of each name so far
        for number, group in enumerate(groups(self.path, self.path.name, report, "read")):
            tally.entered += 1
            uri = f"{self.path.name}/{group.name}"
            before = endings.setdefault(group.name, set())
            apart = bool(before) and before.isdisjoint(group.members)
            before.update(group.members)
            pulse.at(number)
            try:
                if skips and number in skips:
                    raise Unusable(skips[number])
                if apart and not any(kinds(group).values()):
                    raise Unusable(APART)
                found, flaws = describe(group, uri)
                flaws += [APART] if apart else []
            except Unusable as error:
                report.failures.append(Failure(uri, "index", str(error)))
                tally.dropped[str(error)] += 1
                continue
            finally:
                pulse.at(pulse.NOWHERE)
            report.failures += [Failure(uri, "index", flaw, "the sample without it") for flaw in flaws]
            for flaw in flaws:
                tally.how[f"used, though {flaw}"] += 1
            tally.left += 1
            report.seconds += found.record["seconds"]
            yield found
        self.count(report)
        with suppress(OSError), open(self.path, "rb") as file:  # it has its reason already
            report.sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def count(self, report: Report) -> None:
        """Count the tar itself, with what is wrong with it."""
        tars, samples = report.tallies["read"], report.tallies["index"]
        reasons = [failure.reason for failure in report.failures if failure.step == "read"]
        if samples.entered:
            tars.left += 1
            tars.how.update({reason.split(", after")[0].split(" at byte")[0] for reason in reasons})
        elif reasons:
            tars.dropped[reasons[0]] += 1
        else:
            reason = "holds no files with an ending"
            report.failures.append(Failure(self.path.name, "read", reason))
            tars.dropped[reason] += 1


def describe(group: Group, uri: str) -> tuple[Found, list[str]]:
    """Return a sample, and what had to be left out of it.

    Raises:
        Unusable: it has no media member, several, or one that cannot be used as it is.
    """
    ending = media_of(group)
    media, beside = group.members[ending], group.members.get("json")
    record, flaw = record_of(beside) if beside else ({}, "")
    known = bool(KEY.fullmatch(group.name))
    if flaw and known:  # it is ours: under another key it would be another sample
        raise Unusable(flaw)
    own = ours(record, group.name)
    flaws = [flaw] if flaw else []
    captions: list[Caption] = []
    if own:
        facts, rate, key, scores = told(record, ending, group.name)
    else:
        files = [file for file in texts(group, ending, alone=True) if file != beside or not flaw or record]
        captions, wrong = read_captions(files)
        flaws += [f"its caption in {Path(name).suffix} cannot be read: {why}" for name, why in wrong]
        facts, rate = look(media)
        key = hashlib.blake2b(f"{media.tar.name}\x1f{group.name}".encode(), digest_size=16).hexdigest()
        scores = {}
    place = {"shard": media.tar.name, "media_offset": media.offset, "media_length": media.length, "crc32": crc(media)}
    kept = beside if beside and not flaw else None
    place |= {"json_offset": kept.offset, "json_length": kept.length} if kept else {}
    place = {"json_offset": media.offset, "json_length": 0} | place
    ext = ending.rpartition(".")[2]
    row = {"key": key, "ext": ext, **place, **facts, "scores": dumps(scores)}
    row |= {"fps_num": rate.numerator, "fps_den": rate.denominator}
    needed: dict[str, Any] = {
        "uri": uri,
        "repeats": group.repeats,
        "captions": [asdict(item) for item in dict.fromkeys(captions)],
    }
    needed["seconds"] = float(facts["frames"] / rate) if facts["kind"] == "video" else 0.0
    return Found(key, facts["kind"], ext, b"", needed, columns=row), flaws


def kinds(group: Group) -> dict[str, Kind | None]:
    """Return what each member of a sample is by its ending, where that is media."""
    return {ending: kind_of(member, listed=False) for ending, member in group.members.items()}


def media_of(group: Group) -> str:
    """Return the ending of a sample's media: its video, or its image where it has none. Raises Unusable."""
    what = kinds(group)
    kind: Kind = "video" if "video" in what.values() else "image"
    found = [ending for ending in what if what[ending] == kind]
    if not found:
        raise Unusable(f"has no video or image, only {', '.join(sorted(group.members))}")
    if len(found) > 1:
        raise Unusable(f"has {len(found)} {kind}s, {' and '.join(sorted(found))}: which one is meant is not known")
    return found[0]


def record_of(member: Member) -> tuple[dict[str, Any], str]:
    """Return K.json, and what is wrong with it; what is wrong may be only that it holds NaN or Infinity."""
    data = member.read_bytes()
    try:
        return json_object(data), ""
    except DataError as error:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return {}, "its K.json is not JSON"
        if isinstance(value, dict):
            return value, "its K.json holds NaN or Infinity, which are not JSON"
        return {}, str(error)


def told(record: dict[str, Any], ending: str, name: str) -> tuple[dict[str, Any], Fraction, str, dict[str, Any]]:
    """Return kind and size, rate, key and scores of a sample of ours, from its K.json. Raises Unusable."""
    try:
        video, kind = record["video"], "video" if ending == "mp4" else "image"
        facts = {"kind": kind, **{column: int(video[column]) for column in ("w", "h", "frames")}}
        rate, key, scores = Fraction(*video["fps"]), record["key"], dict(record["scores"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise Unusable(f"its K.json is not as data_prep writes it ({error!r})") from error
    if key != name:
        raise Unusable(f"its K.json is of sample {key}")
    return facts, rate, key, scores


def ours(record: Any, name: str) -> bool:
    """Return whether a K.json was written by data_prep."""
    return (
        isinstance(record, dict) and record.get("schema") == SCHEMA and bool(KEY.fullmatch(name)) and "prep" in record
    )


def crc(file: File) -> int:
    """Return the CRC-32 of a file, which is read in parts."""
    value = 0
    with file.open("rb") as opened_file:
        while part := opened_file.read(PART):
            value = zlib.crc32(part, value)
            pulse.beat()
    return value


def look(media: File, rate: Fraction | None = None) -> tuple[dict[str, Any], Fraction]:
    """Return kind, size and frame count of a media member, and its rate, by decoding all of it.

    Frames are counted as the loader does, by the clock: where timestamps have a gap, the frame before it counts on.

    Args:
        rate: to count by; by default the one that the container states.

    Raises:
        Unusable: it cannot be decoded, or is stored turned, which the loader would not see.
    """
    damages: list[str] = []
    try:
        with opened(media) as container:
            stream = video_stream(container)
            rate = rate or Fraction(stream.average_rate or stream.guessed_rate or 1).limit_denominator(1001)
            origin, last = stream.start_time, None
            frames, turn, width, height = 0, UPRIGHT, 0, 0
            for frame in decoded(container, stream, damages.append):
                if frames == 0:
                    turn, width, height = turn_of(frame), frame.width, frame.height
                frames, last = frames + 1, frame.pts
                origin = last if origin is None else origin
            codec = stream.codec_context.name
            shown = frames if last is None else number_of(last - origin, stream.time_base, rate) + 1
    except TROUBLE as error:
        raise Unusable(f"cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if damages or not frames:
        raise Unusable(damages[0] if damages else "no frame could be decoded")
    if turn != UPRIGHT:
        raise Unusable("is stored turned; make new shards of it with task=build")
    if codec in ("mjpeg", "png", "webp") and frames == 1:
        return {"kind": "image", "w": width, "h": height, "frames": 1}, Fraction(1)
    return {"kind": "video", "w": width, "h": height, "frames": shown}, rate
