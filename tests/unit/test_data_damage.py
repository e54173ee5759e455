"""What is wrong with shards is found where it is, has its own reason in the quarantine file, and hangs nothing."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from data_tiny import key, write_clips, write_latents
from test_data_loader import SHAPES, cached, damage, video

from soratrain.data.buckets import Table
from soratrain.data.manifest import write_manifest
from soratrain.data.reading import read_manifest
from soratrain.errors import ConfigError, DataError

VICTIM = 2
STALE = r"its bytes are not those that the manifest knows \(CRC-32\): .* written again after it was indexed"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_latents(tmp_path / "shards", SHAPES)


def overwrite(folder: Path, offset: str, data: bytes) -> None:
    row = read_manifest(folder).row(VICTIM)
    with open(folder / row.shard, "r+b") as file:
        file.seek(getattr(row, offset))
        file.write(data)


def edit(folder: Path, **values: object) -> None:
    rows = [dict(vars(row), scores="{}") for row in read_manifest(folder).rows()]
    rows[VICTIM] |= {name: rows[VICTIM][name] + value for name, value in values.items()}
    write_manifest(folder, rows)


def length(folder: Path, member: str) -> int:
    return getattr(read_manifest(folder).row(VICTIM), f"{member}_length")


WRONG = {
    "invalid JSON": (lambda folder: overwrite(folder, "json_offset", b"[{"), "K.json cannot be read"),
    "NaN in JSON": (
        lambda folder: overwrite(folder, "json_offset", b'{"fps": NaN}'.ljust(length(folder, "json"))),
        "NaN is not JSON",
    ),
    "a list as JSON": (
        lambda folder: overwrite(folder, "json_offset", b"[]".ljust(length(folder, "json"))),
        "holds a list, not an object",
    ),
    "flipped bytes": (lambda folder: overwrite(folder, "media_offset", b"\xff" * 9), "CRC-32"),
    "stale offset": (lambda folder: edit(folder, media_offset=512), "CRC-32"),
    "offset beyond the end": (lambda folder: edit(folder, media_offset=1 << 30), "ends before byte"),
    "missing member": (lambda folder: edit(folder, media_length=-length(folder, "media")), "CRC-32"),
    "not safetensors": (None, "is not a safetensors file"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_each_damage_has_its_reason_and_the_batch_stays_whole(folder, tmp_path, wrong):
    act, reason = WRONG[wrong]
    if act is None:  # the bytes are those that were packed, and were never a latent
        import zlib

        junk = b"junk".ljust(length(folder, "media"))
        overwrite(folder, "media_offset", junk)
        edit(folder, crc32=zlib.crc32(junk) - read_manifest(folder).row(VICTIM).crc32)
    else:
        act(folder)
    batches = list(cached(str(folder), quarantine=str(tmp_path / "q")).loader(0, 20))
    assert {len(batch) for batch in batches} == {2}
    assert key(VICTIM) not in {name for batch in batches for name in batch.keys}
    lines = [json.loads(line) for line in (tmp_path / "q").read_text().splitlines()]
    assert [line["key"] for line in lines] == [key(VICTIM)] and reason in lines[0]["reason"]


def test_a_truncated_shard_loses_the_samples_behind_its_end_and_no_other(folder, tmp_path):
    rows = list(read_manifest(folder).rows())
    cut = rows[-3].media_offset + 5
    os.truncate(folder / rows[0].shard, cut)
    data = cached(str(folder), quarantine=str(tmp_path / "q"), max_bad=0.5)
    keys = {name for batch in data.loader(0, 40) for name in batch.keys}
    lost = {row.key for row in rows if row.media_offset + row.media_length > cut}
    assert len(lost) == 3 and not keys & lost
    assert {json.loads(line)["key"] for line in (tmp_path / "q").read_text().splitlines()} <= lost


def rewritten(folder: Path) -> None:
    """Write the shards again with their samples in another order, as somebody's script would; no table is told."""
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = [(item, tar.extractfile(item).read()) for item in tar]  # type: ignore[union-attr]
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for item, data in sorted(members, key=lambda member: member[0].name, reverse=True):
                tar.addfile(item, io.BytesIO(data))


def test_shards_written_again_after_their_manifest_stop_the_run_with_the_reason(folder, tmp_path):
    rewritten(folder)
    with pytest.raises(DataError, match=STALE):
        list(cached(str(folder), quarantine=str(tmp_path / "q"), max_bad=0.05).loader(0, 20))
    reasons = {json.loads(line)["reason"] for line in (tmp_path / "q").read_text().splitlines()}
    assert len(reasons) == 1 and re.search(STALE, reasons.pop())


def test_the_manifest_of_another_build_stops_the_run_with_the_reason(folder, tmp_path):
    other = write_latents(tmp_path / "other", SHAPES[1:])
    shutil.rmtree(folder / "manifest")
    shutil.copytree(other / "manifest", folder / "manifest")
    with pytest.raises(DataError, match=STALE):
        list(cached(str(folder), quarantine=str(tmp_path / "q"), max_bad=0.05).loader(0, 20))


def test_a_bucket_of_one_sample_gives_it_alone(tmp_path):
    folder = write_latents(tmp_path / "one", [(32, 32, 9)] * 6 + [(48, 48, 9)])
    alone = [batch for batch in cached(str(folder)).loader(0, 12) if batch.latents[0].shape[-1] == 6]
    assert alone and all(set(batch.keys) == {key(6)} for batch in alone)


def test_a_bucket_in_which_nothing_can_be_read_is_named(tmp_path):
    folder = write_clips(tmp_path / "one", [(32, 32, 9)] * 6 + [(48, 48, 9)] * 2)
    damage(folder, [6, 7])
    with pytest.raises(DataError, match="no sample of bucket 48x48x9 can be read"):
        list(video(str(folder), max_bad=1.0, buckets=Table(table=["32x32x9", "48x48x9"])).loader(0, 12))


def test_fewer_samples_than_ranks_is_refused_and_fewer_than_a_batch_makes_it_smaller(tmp_path):
    folder = write_clips(tmp_path / "few", [(32, 32, 9)] * 3)
    with pytest.raises(ConfigError, match="fewer than the 4 ranks"):
        video(str(folder), buckets=Table(table=["32x32x9"]), canonical_ranks=4).items()
    assert all(len(batch) == 1 for batch in video(str(folder), canonical_ranks=4).loader(0, 8))
    data = video(str(folder), batch_size=8)
    assert {len(batch) for batch in data.loader(0, 4)} == {3}


def test_a_manifest_of_other_data_is_refused_by_a_checkpoint(tmp_path):
    one, other = (write_latents(tmp_path / name, [(32, 32, 9)] * count) for name, count in (("a", 6), ("b", 7)))
    with pytest.raises(ConfigError, match="it is another dataset"):
        cached(str(other)).load_state_dict(cached(str(one)).state_dict())


def test_too_much_damage_is_counted_over_the_workers_and_over_a_run_that_goes_on(folder, tmp_path):
    for row in list(read_manifest(folder).rows())[:6]:
        with open(folder / row.shard, "r+b") as file:
            file.seek(row.media_offset)
            file.write(b"\xff" * 9)
    path = tmp_path / "q"
    with pytest.raises(DataError, match="4 samples of .* cannot be read, more than data.max_bad=0.05 allows"):
        list(cached(str(folder), quarantine=str(path), workers=2, max_bad=0.05).loader(0, 40))
    found = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"key": name}) + "\n" for name in found[:3]) + '{"key": "torn')
    with pytest.raises(DataError, match=r"[45] samples"):
        list(cached(str(folder), quarantine=str(path), max_bad=0.05).loader(0, 40))
