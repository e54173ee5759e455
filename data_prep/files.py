"""Files as a source of samples: probe, shots and transcode for each, one file's trouble never touching another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import av

from data_prep import pulse
from data_prep.alpha import WHY
from data_prep.encode import Encoding
from data_prep.media import Unusable
from data_prep.pack import Report
from data_prep.probe import probe
from data_prep.records import FROM_NAME, Caption, Failure, Sample, Source
from data_prep.score import score
from data_prep.shots import CutFinder, Cutting, spans
from data_prep.stills import still
from data_prep.transcode import transcode
from soratrain.amounts import counted

COUNTED = {"probe": "files", "transcode": "clips"}
SEVERAL = "its caption describes the whole file, which became several clips"
TROUBLE = (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError)


@dataclass(frozen=True)
class FileUnit:
    """Some of the input's files."""

    sources: tuple[Source, ...]
    cutting: Cutting
    encoding: Encoding
    license: str
    prep: dict[str, Any]

    @property
    def size(self) -> int:
        """How many files it has."""
        return len(self.sources)

    def name(self, file: int) -> str:
        """Return the name of one of them."""
        return "" if file == pulse.NOWHERE else self.sources[file].uri

    def samples(self, report: Report, skips: Mapping[int, str] | None = None) -> Iterator[Sample]:
        """Yield the samples of each file; what cannot be used is recorded with its reason."""
        for number, source in enumerate(self.sources):
            work = FileWork(self, source, report)
            if skips and number in skips:
                work.left_out(skips[number])
                continue
            pulse.at(number)
            yield from self.of(work)
            pulse.at(pulse.NOWHERE)

    def of(self, work: FileWork) -> Iterator[Sample]:
        """Yield the samples of one file."""
        try:
            yield from work.image() if work.source.kind == "image" else work.video()
        except Unusable as error:
            work.failed(str(error))
        except TROUBLE as error:
            work.failed(f"cannot be converted: {type(error).__name__}: {' '.join(str(error).split())}")


class FileWork:
    """One file on its way through the steps."""

    def __init__(self, unit: FileUnit, source: Source, report: Report) -> None:
        self.unit, self.source, self.report = unit, source, report
        self.step = "probe"
        self.expected, self.made = 1, 0

    def left_out(self, reason: str) -> None:
        """Record that this file is not even opened, since it brought a process down before."""
        self.report.tally("probe", COUNTED["probe"]).entered += 1
        self.failed(reason)

    def failed(self, reason: str) -> None:
        """Record why this file, or the rest of it, is not used."""
        used = f"its first {counted(self.made, 'clips')}" if self.made else ""
        self.report.failures.append(Failure(self.source.uri, self.step, reason, used))
        self.report.tally(self.step, COUNTED[self.step]).dropped[reason] += self.expected - self.made

    def image(self) -> Iterator[Sample]:
        """Yield an image as a sample."""
        probed = self.report.tally("probe", "files")
        probed.entered += 1
        sample = still(self.source, license=self.unit.license, prep=self.unit.prep)
        probed.left += 1
        written = self.report.tally("transcode", "clips")
        written.entered += 1
        self.step = "transcode"
        yield self.finished(sample)

    def video(self) -> Iterator[Sample]:
        """Yield a video's clips."""
        unit, source, report = self.unit, self.source, self.report
        probed = report.tally("probe", "files")
        probed.entered += 1
        if unit.cutting.detect:
            finder = CutFinder(unit.cutting)
            found = probe(source, finder.watch, finder.cuts)
        else:
            found = probe(source, lambda _: None, tuple)
        probed.left += 1
        self.expected = 0
        report.seconds += found.end
        clips, dropped = spans(found, unit.cutting)
        shots = report.tally("shots", "clips")
        shots.entered += len(clips) + dropped.total()
        shots.left += len(clips)
        shots.dropped.update(dropped)
        if found.damage:
            used = f"the {found.end:.3g} s before it" if clips else ""
            report.failures.append(Failure(source.uri, "probe", found.damage, used))
            probed.how["damaged"] += 1
        if clips and found.picture.alpha in WHY:
            report.failures.append(Failure(source.uri, "probe", WHY[found.picture.alpha], "the picture without it"))
        if not clips:
            if not found.damage:
                reason = f"every part is shorter than shots.min_seconds={unit.cutting.min_seconds:g}"
                report.failures.append(Failure(source.uri, "shots", reason))
            return
        captions = for_clips(source, len(clips), report)
        self.step, self.expected = "transcode", len(clips)
        report.tally("transcode", "clips").entered += len(clips)
        made = transcode(source, found, clips, captions, encoding=unit.encoding, license=unit.license, prep=unit.prep)
        for sample in made:
            yield self.finished(sample)

    def finished(self, sample: Sample) -> Sample:
        """Score a sample, count it and return it."""
        video = sample.record["video"]
        scores = score(sample.media, fps=video["fps"][0] / video["fps"][1], image=sample.kind == "image")
        sample = replace(sample, record=sample.record | {"scores": scores})
        written = self.report.tally("transcode", "clips")
        written.left += 1
        written.how[f"{sample.how}: {sample.why}" if sample.why else sample.how] += 1
        self.made += 1
        return sample


def for_clips(source: Source, clips: int, report: Report) -> tuple[Caption, ...]:
    """Return the captions for each of a file's clips: the file's own, if it is one clip or they are only its name."""
    if clips > 1 and any(caption.model != FROM_NAME for caption in source.captions):
        report.failures.append(Failure(source.uri, "shots", SEVERAL, "the clips without that caption"))
        return ()
    return source.captions


def file_units(
    sources: list[Source], *, cutting: Cutting, encoding: Encoding, license: str, prep: dict[str, Any]
) -> list[FileUnit]:
    """Return the units of work of some files; their number does not depend on how many processes there are."""
    size = min(max(len(sources) // 1000, 1), 64)
    return [
        FileUnit(tuple(sources[first : first + size]), cutting, encoding, license, prep)
        for first in range(0, len(sources), size)
    ]
