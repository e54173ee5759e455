"""Every damage of another's tars has a reason of its own when they are indexed, and costs what is damaged."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from prep_clips import moving, picture, write
from test_prep_tars import as_video2dataset, failures_of

import data_prep.indexed as indexed_module
from data_prep.__main__ import main
from data_prep.encode import encode_png
from data_prep.indexed import APART, Found, TarUnit
from data_prep.members import Member
from data_prep.pack import Report, read_report, read_samples
from data_prep.workers import Limits, do_units
from soratrain.data.caption_table import open_captions
from soratrain.data.reading import read_manifest
from soratrain.data.shards import ShardReader

OURS = "0123456789abcdef" * 2
NAN = "its K.json holds NaN or Infinity, which are not JSON"
Members = Sequence[tuple[str, bytes]]


def tar_of(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000.25
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("clip") / "a.mp4", moving(5)).read_bytes()


def indexed(folder: Path, *argv: str) -> dict[str, dict[str, Any]]:
    """Index a folder; return its funnel by step."""
    assert main(["task=index", f"input={folder}", *argv]) == 0
    return {row["step"]: row for row in json.loads((folder / "stats.json").read_text())["funnel"]}


def captions(folder: Path) -> dict[str, list[str]]:
    """Return the captions of every sample, in the order of the manifest."""
    if not (folder / "captions").exists():
        return {}
    found = open_captions(folder / "captions")
    rows = read_manifest(folder).rows()
    return {str(number): [item["text"] for item in found.get(row.key)] for number, row in enumerate(rows)}


BESIDE = {  # what is wrong beside a clip: the member, what it holds, the reason, and the captions that are left
    "invalid JSON": ("json", b'{"caption": "a', "its K.json is not JSON", []),
    "NaN": (
        "json",
        b'{"caption": "a dog", "x": NaN}',
        NAN,
        ["a dog"],
    ),
    "Infinity": ("json", b'{"x": -Infinity}', "its K.json holds NaN or Infinity, which are not JSON", []),
    "a list": ("json", b'["a dog"]', "its K.json holds a list, not an object", []),
    "a number": ("json", b'{"caption": 7}', "its caption in .json cannot be read: its caption is not a string", []),
    "bytes": ("txt", b"\xff\xfe", "its caption in .txt cannot be read: it is not UTF-8", []),
}


def test_what_is_wrong_beside_a_clip_costs_that_and_not_the_clip(tmp_path: Path, clip: bytes) -> None:
    members = [("good.mp4", clip), ("good.txt", b"a cat")]
    for name, (ending, data, _, _) in BESIDE.items():
        members += [(f"{name}.{ending}", data), (f"{name}.mp4", clip)]
    tar_of(tmp_path / "x.tar", members)
    funnel = indexed(tmp_path)
    assert failures_of(tmp_path) == {f"x.tar/{name}": reason for name, (_, _, reason, _) in BESIDE.items()}
    assert funnel["index"]["out"] == funnel["index"]["in"] == 7 and funnel["index"]["dropped"] == {}
    reasons = Counter(f"used, though {reason}" for _, _, reason, _ in BESIDE.values())
    assert funnel["index"]["how"] == reasons
    assert list(captions(tmp_path).values()) == [["a cat"], *(left for *_, left in BESIDE.values())]
    readable = [row.json_length > 0 for row in read_manifest(tmp_path).rows()]
    assert readable == [False, False, False, False, False, True, False]  # what the loader would refuse is left out


LOST = {  # samples that are lost, with their reasons
    "broken media": ([("k.mp4", b"broken" * 100)], "not a video or image that FFmpeg can read"),
    "empty media": ([("k.mp4", b"")], "the file is empty (zero bytes)"),
    "no media": ([("k.txt", b"x"), ("k.json", b"{}")], "has no video or image, only json, txt"),
    "two videos": ([("k.mp4", b"1"), ("k.webm", b"2")], "has 2 videos, mp4 and webm: which one is meant is not known"),
    "two images": ([("k.jpg", b"1"), ("k.png", b"2")], "has 2 images, jpg and png: which one is meant is not known"),
    "our JSON": ([(f"{OURS}.json", b"{"), (f"{OURS}.mp4", b"1")], "its K.json is not JSON"),
    "our NaN": (
        [(f"{OURS}.json", b'{"schema": 1, "prep": NaN}'), (f"{OURS}.mp4", b"1")],
        NAN,
    ),
    "not as ours": (
        [(f"{OURS}.json", b'{"schema": 1, "prep": {}}'), (f"{OURS}.mp4", b"1")],
        "its K.json is not as data_prep writes it (KeyError('video'))",
    ),
}


def test_what_is_wrong_with_a_sample_costs_that_sample(tmp_path: Path, clip: bytes) -> None:
    tar_of(tmp_path / "good.tar", [("a.mp4", clip)])
    for name, (members, _) in LOST.items():
        tar_of(tmp_path / f"{name}.tar", [*members, ("z.mp4", clip)])
    funnel = indexed(tmp_path)
    assert {uri.split(".tar/")[0]: why for uri, why in failures_of(tmp_path).items()} == {
        name: why for name, (_, why) in LOST.items()
    }
    assert funnel["index"]["dropped"] == Counter(why for _, why in LOST.values())
    assert len(read_manifest(tmp_path)) == 1 + len(LOST)


def test_a_picture_beside_a_video_is_left_alone(tmp_path: Path, clip: bytes) -> None:
    tar_of(tmp_path / "x.tar", [("k.jpg", encode_png(picture())), ("k.mp4", clip)])
    indexed(tmp_path)
    assert [(row.kind, row.ext) for row in read_manifest(tmp_path).rows()] == [("video", "mp4")]
    assert failures_of(tmp_path) == {}


TARS: dict[str, tuple[Callable[[bytes], bytes], str, str, int]] = {  # the tar, whose reason, the reason, samples left
    "gzip": (gzip.compress, "gzip.tar", "is compressed with gzip", 0),
    "empty": (lambda _: bytes(10240), "empty.tar", "is an empty tar", 0),
    "zero": (lambda _: b"", "zero.tar", "is an empty tar", 0),
    "noise": (lambda data: os.urandom(len(data)), "noise.tar", "is not a tar", 0),
    "header": (lambda data: data[: second(data) - 700], "header.tar", "is cut off in the middle of a header", 1),
    "body": (lambda data: data[: second(data) + 700], "body.tar/b.mp4", "the tar is cut off in the middle of it", 1),
    "inside": (lambda data: data[: second(data) - 512] + b"\xff" * 512 + data[second(data) :],
               "inside.tar", "is damaged at byte", 1),
}  # fmt: skip


def second(data: bytes) -> int:
    """Return where the bytes of the second member begin."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmember("b.mp4").offset_data


def test_what_is_wrong_with_a_tar_costs_what_is_damaged(tmp_path: Path, clip: bytes) -> None:
    whole = tar_of(tmp_path / "whole.tar", [("a.mp4", clip), ("b.mp4", clip)]).read_bytes()
    for name, (act, *_) in TARS.items():
        (tmp_path / f"{name}.tar").write_bytes(act(whole))
    funnel = indexed(tmp_path)
    found = failures_of(tmp_path)
    for uri, reason in ((uri, reason) for _, uri, reason, _ in TARS.values()):
        assert found.pop(uri).startswith(reason)
    assert found == {}
    left = Counter(row.shard.removesuffix(".tar") for row in read_manifest(tmp_path).rows())
    assert left == {"whole": 2} | {name: count for name, (*_, count) in TARS.items() if count}
    assert funnel["read"]["in"] == 8 and funnel["read"]["out"] == 4
    assert sum(funnel["read"]["dropped"].values()) == 4 and funnel["read"]["dropped"]["is an empty tar"] == 2
    assert funnel["read"]["how"] == {
        "is cut off in the middle of a header": 1,
        "is damaged": 1,
        "the tar is cut off in the middle of it": 1,
    }


def test_of_a_key_that_stands_twice_the_first_is_used_and_named(tmp_path: Path, clip: bytes) -> None:
    write(tmp_path / "own.mp4", moving(12))
    assert main([f"input={tmp_path / 'own.mp4'}", f"output={tmp_path / 'built'}"]) == 0
    folder = tmp_path / "tars"
    folder.mkdir()
    for name in ("own1", "own2"):
        (folder / f"{name}.tar").write_bytes((tmp_path / "built/shard-000000.tar").read_bytes())
    tar_of(folder / "far.tar", [("k.mp4", clip), ("k.txt", b"first"), ("m.mp4", clip), ("k.mp4", clip)])
    tar_of(folder / "member.tar", [("k.mp4", clip), ("k.mp4", clip), ("k.txt", b"of the second")])
    apart = [("k.txt", b"lost"), ("n.txt", b"x"), ("k.mp4", clip), ("n.mp4", clip), ("k.json", b"{}")]
    tar_of(folder / "apart.tar", apart)
    funnel = indexed(folder)
    rows = list(read_manifest(folder).rows())
    assert Counter(row.shard for row in rows) == {"far.tar": 2, "member.tar": 1, "own1.tar": 1, "apart.tar": 2}
    found = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    reasons = {(item["uri"], item["reason"]) for item in found}
    place = {row.shard: row.media_offset for row in reversed(rows)}
    key = next(row.key for row in rows if row.shard == "own1.tar")
    none = "has no video or image, only txt"
    assert reasons == {
        ("far.tar/k", f"has the key of far.tar/k (byte {place['far.tar']}), which is used"),
        ("member.tar/k", f"repeats member mp4 of member.tar/k (byte {place['member.tar']}), which is used"),
        (f"own2.tar/{key}", f"has the key of own1.tar/{key} (byte {place['own1.tar']}), which is used"),
        ("apart.tar/k", none),
        ("apart.tar/n", none),
        ("apart.tar/k", APART),
        ("apart.tar/n", APART),
    }
    assert funnel["index"]["dropped"] == {
        "has the key of another": 2,
        "repeats a member of the sample before": 1,
        none: 2,
        APART: 1,
    }
    assert funnel["index"]["how"] == {f"used, though {APART}": 2}
    assert funnel["index"]["in"] - funnel["index"]["out"] == 6 and funnel["index"]["out"] == len(rows)
    assert "of the second" not in str(captions(folder))


def test_video2datasets_own_layout_is_indexed_with_its_captions(tmp_path: Path, clip: bytes) -> None:
    as_video2dataset(tmp_path, "00000", {"000000000": (clip, "a  cat,\n三只猫"), "000000001": (clip, None)})
    as_video2dataset(tmp_path, "00001", {"000010000": (clip, "a dog")})
    indexed(tmp_path)
    assert list(captions(tmp_path).values()) == [["a cat, 三只猫"], [], ["a dog"]]
    reader = ShardReader(tmp_path)
    for row in read_manifest(tmp_path).rows():
        assert json.loads(reader.read(row.shard, row.json_offset, row.json_length))["status"] == "success"
    assert failures_of(tmp_path) == {}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_any_number_of_workers_and_any_interruption_give_the_same_bytes(
    tmp_path: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / name for name in "abc"):
        folder.mkdir()
        for number in range(5):
            more = [("x.mp4", b"broken"), ("y.txt", b"x")] if number % 2 else []
            tar_of(folder / f"{number}.tar", [("k.mp4", clip), ("k.txt", b"a cat"), *more, ("z.mp4", clip)])
    indexed(tmp_path / "a", "workers=1")
    indexed(tmp_path / "b", "workers=4")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.index.merge", interrupted)
        assert main(["task=index", f"input={tmp_path / 'c'}", "workers=2"]) == 130
    assert not (tmp_path / "c/dataset.json").exists()
    for number in (1, 4):  # as if it had been stopped in the middle of them
        (tmp_path / f"c/.building/units/00000{number}.json").unlink()
    later = time.time() + 5  # and one was written again since
    os.utime(tmp_path / "c/0.tar", (later, later))
    indexed(tmp_path / "c", "workers=2")
    assert "continuing, 2 of 5 tars read" in capsys.readouterr().out
    one, four, resumed = ({**files_of(tmp_path / name), "dataset.json": described(tmp_path / name)} for name in "abc")
    assert one == four == resumed and "manifest/part-00000.parquet" in one


def described(folder: Path) -> bytes:
    """Return dataset.json without the folder's own name."""
    dataset = json.loads((folder / "dataset.json").read_text())
    return json.dumps([dataset["shards"], dataset["totals"], dataset["listing"]]).encode()


class Trapped(TarUnit):
    """A tar of which one sample crashes the decoder."""

    def samples(self, report: Report, skips: Mapping[int, str] | None = None) -> Iterator[Found]:
        look = indexed_module.look

        def trapped(media: Member) -> Any:
            if media.name == "b.mp4":
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                os.kill(os.getpid(), signal.SIGSEGV)
            return look(media)

        indexed_module.look = trapped  # type: ignore[assignment]
        yield from super().samples(report, skips)


def test_a_sample_that_crashes_the_decoder_costs_itself_alone(tmp_path: Path, clip: bytes) -> None:
    unit = Trapped(tar_of(tmp_path / "x.tar", [(f"{name}.mp4", clip) for name in "abc"]))
    do_units(tmp_path, [unit], [0], processes=1, limits=Limits(), done=lambda number: None)
    assert [record["uri"] for _, record, _ in read_samples(tmp_path, 0)] == ["x.tar/a", "x.tar/c"]
    report = read_report(tmp_path, 0)
    assert [(item.uri, item.reason) for item in report.failures] == [("x.tar/b", "the decoder crashed (signal 11)")]
    assert report.tallies["index"].dropped == {"the decoder crashed (signal 11)": 1}
