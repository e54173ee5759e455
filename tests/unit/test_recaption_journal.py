"""Promises of stage=recaption about the disk: killed anywhere it goes on to the same files, and it mixes nothing."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import data_tiny
import pytest
from test_recaption import SHAPES, captioner, contents, recaption, seer, shards, texts

from soratrain.captions.journal import Journal
from soratrain.data.reading import read_manifest
from soratrain.distributed.ranks import Ranks
from soratrain.errors import DataError

__all__ = ["captioner", "seer", "shards"]


class Killed(BaseException):
    """What a process that is killed does not live to see."""


class Killer:
    """Lets a process die before its `last`-th change of the disk; it changes nothing after that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self.left = last
        for place, name in ((os, "replace"), (Path, "unlink"), (Path, "mkdir"), (Journal, "add")):
            monkeypatch.setattr(place, name, self.counted(getattr(place, name)))

    def counted(self, act: Any) -> Any:
        def counting(*given: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return act(*given, **options)

        return counting


def test_killed_before_any_change_of_the_disk_it_goes_on_to_the_same_files(
    shards, captioner, seer, tmp_path, monkeypatch
):
    recaption(shards, captioner, tmp_path / "whole", batch_size=2)()
    expected, last, out = contents(tmp_path / "whole"), 0, tmp_path / "out"
    while True:
        with monkeypatch.context() as patch:
            killer = Killer(patch, last)
            with suppress(Killed):
                recaption(shards, captioner, out / str(last), batch_size=2)()
        if killer.left >= 0:
            break
        figures = recaption(shards, captioner, out / str(last), batch_size=2)()
        found = {name: data for name, data in contents(out / str(last)).items() if not name.endswith(".tmp")}
        assert found == expected, last
        assert figures["captions"] == 2 * len(SHAPES)
        last += 1
    assert last > 20


def test_other_clips_or_sizes_of_shards_are_never_taken_for_those_described(shards, captioner, seer, tmp_path):
    recaption(shards, captioner, tmp_path / "out")()
    data_tiny.write_clips(shards, SHAPES[:5], max_bytes=12_000)  # prepared anew in the same place
    with pytest.raises(DataError, match="holds captions of other clips; use fresh=true"):
        recaption(shards, captioner, tmp_path / "out")()
    with pytest.raises(DataError, match="holds captions of other clips and styles"):
        recaption(shards, captioner, tmp_path / "out", styles=["short"])()


def spoil(folder: Path, numbers: list[int]) -> None:
    for row in read_manifest(folder).rows():
        if int(row.key, 16) in numbers:
            with open(folder / row.shard, "r+b") as file:
                file.seek(row.media_offset)
                file.write(bytes(row.media_length))


def test_clips_that_were_lost_in_earlier_calls_count_too(shards, captioner, seer, tmp_path):
    spoil(shards, [0, 1, 2, 3, 4])
    for _ in range(2):  # the second begins where the first has stopped
        with pytest.raises(DataError, match="cannot be described, more than stage.job.max_bad.* or raise max_bad"):
            recaption(shards, captioner, tmp_path / "out", batch_size=1)()
    assert len((tmp_path / "out" / "failures.jsonl").read_text().splitlines()) == 4
    figures = recaption(shards, captioner, tmp_path / "out", batch_size=1, max_bad=1.0)()
    assert figures["unreadable"] == 5 and figures["captions"] == len(texts(tmp_path / "out")) == 6


def test_many_processes_may_lose_no_more_than_one(shards, captioner, seer, tmp_path, monkeypatch):
    job, limits = recaption(shards, captioner, tmp_path / "out", max_bad=0.5), {}
    folder = job._prepare(Ranks())
    for rank in (Ranks(0, 2), Ranks(1, 2)):
        monkeypatch.setattr(job, "_bear", lambda lost, limit, rank=rank: limits.update({rank.rank: limit}))
        job._describe(folder, rank)
    assert len(limits) == 2 and sum(limits.values()) == 0.5 * len(SHAPES)


def test_what_a_killed_job_left_beside_a_finished_shard_goes(shards, captioner, seer, tmp_path):
    recaption(shards, captioner, tmp_path / "out")()
    before = contents(tmp_path / "out")
    (rev,) = (tmp_path / "out" / "captions").iterdir()
    (rev / ".part-00000.jsonl").write_text(json.dumps({"rows": [], "counts": {}, "settled": [], "failures": []}))
    (tmp_path / "out" / "captions" / ".DS_Store").write_bytes(b"")  # a file is no revision
    recaption(shards, captioner, tmp_path / "out")()
    (tmp_path / "out" / "captions" / ".DS_Store").unlink()
    assert contents(tmp_path / "out") == before
