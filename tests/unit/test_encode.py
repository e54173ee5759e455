"""Promises of the stage that encodes clips into latents."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from torch import Tensor

from data_prep.encode import Encoding, encode_png, encode_rgb
from soratrain.batch import to_pixels
from soratrain.data.buckets import Native
from soratrain.data.datamodule import LatentData, VideoData
from soratrain.data.decode import load_clip
from soratrain.data.manifest import write_manifest
from soratrain.data.members import read_members
from soratrain.data.reading import read_manifest
from soratrain.data.remote import Remote
from soratrain.data.shards import ShardReader, ShardWriter
from soratrain.distributed.fit import fit
from soratrain.distributed.trainer import build_trainer
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.text import ByteTextEncoder, TextTokens
from soratrain.models.vae import VAE
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.encode import Encode
from soratrain.stages.encoding import AROUND, DTYPES, ClipEncoder
from soratrain.stages.pace import in_bytes
from soratrain.stages.vae import VAEStage

FACTORY = partial(
    VAE,
    latent_channels=4,
    channels=[8, 16],
    time_strides=[2],
    space_strides=[2],
    encoder_blocks=[0, 1],
    decoder_blocks=[1, 1],
    time_kernels=[1, 3],
    front_strides=[2, 4],
)
SIZES = [(9, 32, 48), (7, 32, 48), (1, 32, 32), (17, 16, 32), (9, 32, 48), (1, 32, 32)]  # frames, height, width


def write_shards(folder: Path, damaged: int | None = None, sizes: Sequence[tuple[int, int, int]] = SIZES) -> None:
    """Write six clips into two shards; of `SIZES`, clip 1 has 7 frames, which are trimmed to 5."""
    rows = []
    for part in range(2):
        with ShardWriter(folder, prefix=f"part{part}") as writer:
            for index in range(3 * part, 3 * part + 3):
                frames, height, width = sizes[index]
                generator = np.random.default_rng(index)
                low = generator.integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
                video = low.repeat(8, 1).repeat(8, 2)
                ext = "mp4" if frames > 1 else "png"
                media = encode_rgb(video, Fraction(8), Encoding())[0] if frames > 1 else encode_png(video[0])
                key = hashlib.sha256(bytes([index])).hexdigest()[:32]
                header = {"key": key, "captions": [{"type": "gt", "text": f"clip {index}"}]}
                stored = media[:-40] + bytes(40) if index == damaged else media
                placed = writer.write(key, {"json": json.dumps(header).encode(), ext: stored})
                rows.append(
                    {
                        "key": key,
                        "shard": placed.shard,
                        "kind": "video" if frames > 1 else "image",
                        "ext": ext,
                        "w": width,
                        "h": height,
                        "frames": frames,
                        "fps_num": 8,
                        "fps_den": 1,
                        "json_offset": placed.members["json"][0],
                        "json_length": placed.members["json"][1],
                        "media_offset": placed.members[ext][0],
                        "media_length": placed.members[ext][1],
                        "crc32": zlib.crc32(media),
                        "scores": "{}",
                    }
                )
    write_manifest(folder, rows)


def write_vae(folder: Path, seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    vae = FACTORY().eval()
    vae.latent_mean.uniform_(-1, 1)
    vae.latent_std.uniform_(0.5, 2)
    weights.save(folder, "vae", vae, FACTORY, {})
    return vae


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards")
    write_vae(tmp_path / "vae")
    return tmp_path


def job(place: Path, **options: Any) -> Encode:
    folders = {name: str(place / name) for name in ("out", "shards", "vae")}
    return Encode(**{**folders, "buckets": Native(), **options})


def stored(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Tensor], Any]]:
    """Return header, tensors and manifest row of each latent by key."""
    manifest, reader = read_manifest(folder), ShardReader(folder)
    found = {}
    for row in manifest.rows():
        header, media = read_members(reader, row)
        found[row.key] = header, safetensors.torch.load(media), row
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


@torch.no_grad()
def test_each_clip_s_latent_is_what_the_vae_gives_for_it_alone(place: Path) -> None:
    result = job(place)()
    vae, manifest, reader = write_vae(place / "vae"), read_manifest(place / "shards"), ShardReader(place / "shards")
    latents = stored(place / "out")
    assert result["clips"] == len(latents) == 6 and result["not_encoded"] == 0
    for source in manifest.rows():
        header, tensors, row = latents[source.key]
        bucket = (source.h, source.w, 1 + (source.frames - 1) // 4 * 4)
        assert (row.h, row.w, row.frames) == bucket and row.fps == 8 and row.ext == "safetensors"
        bucketed = Native().assign(manifest, lambda _: 1).buckets
        chosen = next(item for item in bucketed if tuple(item) == bucket)
        media = read_members(reader, source)[1]
        clip = load_clip(media, fps=Fraction(8), frames=source.frames, bucket=chosen)
        pixels = to_pixels(torch.from_numpy(clip)[None])
        torch.testing.assert_close(tensors["latent"].float(), vae.encode(pixels)[0], rtol=1e-2, atol=1e-2)
        assert set(tensors) == {"latent", *(f"tail{frames}" for frames in (1, 5) if frames <= bucket[2])}
        for frames in (1, 5):
            if frames <= bucket[2]:
                tail = vae.encode(pixels[:, :, -frames:])[0]
                torch.testing.assert_close(tensors[f"tail{frames}"].float(), tail, rtol=1e-2, atol=1e-2)
        assert tensors["latent"].dtype == torch.bfloat16
        assert header["captions"] == read_members(reader, source)[0]["captions"]


def test_frames_beyond_one_plus_4k_are_counted(place: Path) -> None:
    assert job(place)()["frames_trimmed"] == 2
    assert json.loads((place / "out" / "dataset.json").read_text())["totals"]["frames_trimmed"] == 2


def test_a_clip_that_is_too_large_is_encoded_in_pieces_with_the_same_latent(place: Path) -> None:
    job(place, dtype="fp16")()
    job(place, dtype="fp16", out=str(place / "pieces"), pixels_per_batch=1)()
    whole, pieces = stored(place / "out"), stored(place / "pieces")
    for key in whole:
        assert whole[key][1].keys() == pieces[key][1].keys()
        for name in whole[key][1]:
            torch.testing.assert_close(whole[key][1][name].float(), pieces[key][1][name].float(), rtol=0, atol=4e-3)


def test_a_run_that_was_stopped_goes_on_at_the_next_shard(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job(place, out=str(place / "straight"))()
    original, calls = Encode._encode_shard, []

    def stop_at_second(self: Encode, work: Any, number: int) -> Any:
        calls.append(number)
        if number == 1 and len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, work, number)

    monkeypatch.setattr(Encode, "_encode_shard", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        job(place)()
    assert not json.loads((place / "out" / "dataset.json").read_text())["complete"]
    job(place)()
    assert calls == [0, 1, 1]
    assert contents(place / "out") == contents(place / "straight")
    job(place)()
    assert calls == [0, 1, 1]
    assert json.loads((place / "out" / "dataset.json").read_text())["complete"]


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_a_batch_gives_each_clip_what_it_gives_alone(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DTYPES, "fp16", torch.float32)  # before rounding
    torch.manual_seed(0)
    vae, cpu = FACTORY().eval(), torch.device("cpu")
    videos = [np.random.default_rng(index).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8) for index in range(5)]
    encoding = ClipEncoder(tail_frames=[1, 5, 9], dtype="fp16", pixels_per_batch=1 << 22, autocast=autocast)
    together, alone = encoding(vae, videos, cpu), [encoding(vae, [video], cpu)[0] for video in videos]
    for batched, single in zip(together, alone, strict=True):
        assert batched.keys() == single.keys() == {"latent", "tail1", "tail5", "tail9"}
        for name in batched:
            torch.testing.assert_close(batched[name], single[name], rtol=1e-5, atol=1e-5)


def test_what_it_will_take_is_said_before_it_begins_and_is_exact(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="soratrain"):
        job(place, tail_frames=[1, 5, 9], pixels_per_batch=1)()
    held = sum(tensor.nbytes for _, tensors, _ in stored(place / "out").values() for name, tensor in tensors.items())
    said = [record.message for record in caplog.records]
    beyond = "2 frames beyond each clip's 1 + 4k, at most 17, are left out"
    about = in_bytes(held + 6 * AROUND)
    assert said[0] == f"6 clips of 4 sizes, {in_bytes(held)} of latents, about {about} on disk; {beyond}"
    written = 0
    for file in (place / "out").glob("*.tar"):
        with tarfile.open(file) as tar:
            written += sum(512 + -(-member.size // 512) * 512 for member in tar)
    assert written - held == pytest.approx(6 * AROUND, rel=0.5)
    assert sum("more at" in line and "clips/s" in line for line in said) == 1


@pytest.mark.parametrize("what", ["vae", "shards", "transform", "text"])
def test_latents_of_something_else_are_refused(place: Path, what: str) -> None:
    job(place)()
    options: dict[str, Any] = {}
    if what == "vae":
        write_vae(place / "vae", seed=1)
    elif what == "shards":
        path = place / "shards" / "manifest" / "part-00000.parquet"
        pq.write_table(pq.read_table(path).slice(0, 5), path)
    elif what == "text":
        options["text"] = partial(ByteTextEncoder, dim=8, table=64)
    else:
        options["tail_frames"] = [1]
    with pytest.raises(DataError, match=f"another .*{what}.*fresh=true"):
        job(place, **options)()


def test_a_decoder_that_was_trained_on_leaves_latents_valid(place: Path) -> None:
    vae = write_vae(place / "vae")
    job(place)()
    with torch.no_grad():
        next(vae.decoder.parameters()).add_(1)
    weights.save(place / "vae", "vae", vae, FACTORY, {})
    assert job(place)()["clips"] == len(SIZES)


def test_an_unreadable_clip_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(tmp_path / "shards", damaged=3)
    write_vae(tmp_path / "vae")
    result = job(tmp_path)()
    assert (result["clips"], result["not_encoded"]) == (5, 1)
    assert "CRC-32" in caplog.text


def test_workers_change_nothing(place: Path) -> None:
    job(place)()
    job(place, out=str(place / "two"), workers=2)()
    assert contents(place / "out") == contents(place / "two")


def test_the_settings_for_stores_reach_the_reader(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = ShardReader.__init__

    def noted(self: ShardReader, folder: Any, remote: Any = None, **options: Any) -> None:
        seen.append(remote)
        original(self, folder, remote, **options)

    monkeypatch.setattr(ShardReader, "__init__", noted)
    settings = Remote(retries=3)
    job(place, remote=settings)()
    assert seen and all(remote is settings for remote in seen)


def test_too_many_unreadable_clips_are_an_error_whichever_call_met_them(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise DataError("it is gone")

    monkeypatch.setattr("soratrain.stages.latents.load_clip", none)
    with pytest.raises(DataError, match="cannot be read, more than max_bad=0.01"):
        job(place)()
    with pytest.raises(DataError, match="cannot be read"):
        job(place)()
    assert not json.loads((place / "out" / "dataset.json").read_text())["complete"]


def test_tokens_of_the_captions_are_stored_and_come_with_their_caption(place: Path) -> None:
    encoder = ByteTextEncoder(dim=8, table=64, max_tokens=16)
    job(place, text=partial(ByteTextEncoder, dim=8, table=64, max_tokens=16))()
    data = LatentData(latents=str(place / "out"), seed=0, max_steps=4, batch_size=2, max_batch_size=2)
    for batch in islice(iter(data.items()), 4):
        told, expected = TextTokens.joined(batch.text), encoder.tokenize(batch.captions)
        assert all(caption.startswith("clip ") for caption in batch.captions)
        assert told.lengths == expected.lengths
        assert torch.equal(told.rows, expected.rows) and torch.equal(told.starts, expected.starts)


def test_captions_that_are_cut_are_counted_over_the_whole_run_however_it_is_cut_up(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = partial(ByteTextEncoder, dim=8, table=64, max_tokens=2)  # an opening and "clip", without the number
    assert job(place, out=str(place / "straight"), text=text)()["texts_cut"] == 6
    assert "6 captions are longer than text.max_tokens and were cut" in caplog.text
    original = Encode._encode_shard

    def stop_at_second(self: Encode, work: Any, number: int) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return original(self, work, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Encode, "_encode_shard", stop_at_second)
        job(place, text=text)()
    assert [job(place, text=text, pixels_per_batch=1)()["texts_cut"] for _ in range(2)] == [6, 6]
    assert contents(place / "out") == contents(place / "straight")
    assert job(place, out=str(place / "long"), text=partial(text, max_tokens=3))()["texts_cut"] == 0
    assert "texts_cut" not in job(place, out=str(place / "none"))()


@pytest.mark.parametrize("tail", [[4], [1, 0], [True]])
def test_tails_that_cannot_be_encoded_are_refused(place: Path, tail: list[int]) -> None:
    with pytest.raises(ConfigError, match="tail_frames"):
        job(place, tail_frames=tail)


@pytest.mark.parametrize(("option", "value"), [("dtype", "int8"), ("pixels_per_batch", 0)])
def test_settings_that_cannot_work_are_refused(place: Path, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option):
        job(place, **{option: value})


def test_a_trained_vae_s_weights_hold_the_statistics_of_the_clips_it_trained_on(place: Path) -> None:
    optimizer, steps = OptimizerFactory(name="muon", lr=1e-3), 3
    stage = VAEStage(net=FACTORY, optimizer=optimizer, schedule=Schedule(), max_steps=steps, statistics_batches=64)
    data = VideoData(shards=str(place / "shards"), buckets=Native(), seed=0, max_steps=steps, batch_size=1)
    fit(build_trainer(out=place / "run", max_steps=steps, accelerator="cpu", ema=0.9), stage, data)
    job(place, vae=str(place / "run"), dtype="fp16")()
    latents = [tensors["latent"].float().flatten(1) for _, tensors, _ in stored(place / "out").values()]
    joined = torch.cat(latents, dim=1)
    assert joined.mean(1).abs().max() < 0.3 and (joined.std(1) - 1).abs().max() < 0.3
