"""Tiny shards for the loader's tests: clips whose every frame says which clip and which frame it is."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import safetensors.torch
import torch

from soratrain.data.manifest import Manifest, write_manifest
from soratrain.data.shards import ShardWriter


def key(number: int) -> str:
    return f"{number:032x}"


def grey(clip: int, frame: int) -> int:
    """The grey level of a frame: 12 a clip apart, frames in steps that the codec keeps apart."""
    return 20 + (37 * clip + 11 * frame) % 200


def pixels(clip: int, height: int, width: int, frames: int) -> np.ndarray:
    video = np.empty((frames, height, width, 3), np.uint8)
    for frame in range(frames):
        video[frame] = grey(clip, frame)
    return video


def mp4(video: np.ndarray, fps: Fraction) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "4", "g": "16"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def png(image: np.ndarray) -> bytes:
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1)
    return b"".join(map(bytes, [*codec.encode(av.VideoFrame.from_ndarray(image, format="rgb24")), *codec.encode(None)]))


def captions(number: int) -> list[dict[str, str]]:
    return [
        {"type": style, "text": f"{style} original {number}", "model": "world", "rev": "0", "lang": "en"}
        for style in ("short", "long")
    ]


def write(folder: Path, samples: Sequence[tuple[dict, bytes]], max_bytes: int = 1 << 20) -> None:
    rows = []
    with ShardWriter(folder, max_bytes) as writer:
        for number, (fields, media) in enumerate(samples):
            header = json.dumps({"schema": 1, "key": key(number), "captions": captions(number)}).encode()
            placed = writer.write(key(number), {"json": header, fields["ext"]: media})
            json_place, media_place = placed.members["json"], placed.members[fields["ext"]]
            rows.append(
                fields
                | {"key": key(number), "shard": placed.shard, "crc32": zlib.crc32(media), "scores": "{}"}
                | dict(zip(("json_offset", "json_length"), json_place, strict=True))
                | dict(zip(("media_offset", "media_length"), media_place, strict=True))
            )
    write_manifest(folder, rows)


def fields(height: int, width: int, frames: int, ext: str, fps: Fraction = Fraction(8)) -> dict:
    kind = "image" if frames == 1 else "video"
    rate = {"fps_num": fps.numerator, "fps_den": fps.denominator}
    return {"kind": kind, "ext": ext, "w": width, "h": height, "frames": frames} | rate


def write_clips(folder: Path, shapes: Sequence[tuple[int, int, int]], fps: Fraction = Fraction(8), **kwargs) -> Path:
    """Write clips of the given (height, width, frames); one frame makes an image."""
    samples = []
    for number, (height, width, frames) in enumerate(shapes):
        video = pixels(number, height, width, frames)
        media, ext = (png(video[0]), "png") if frames == 1 else (mp4(video, fps), "mp4")
        samples.append((fields(height, width, frames, ext, fps), media))
    write(folder, samples, **kwargs)
    return folder


def write_latents(
    folder: Path, shapes: Sequence[tuple[int, int, int]], channels: int = 4, tails: Sequence[int] = (), stride: int = 8
) -> Path:
    """Write latents of clips of the given (height, width, frames), filled with their number; tails with 0.5 more."""
    samples = []
    for number, (height, width, frames) in enumerate(shapes):
        latent = torch.full((channels, 1 + (frames - 1) // 4, height // stride, width // stride), float(number))
        ends = {f"tail{tail}": latent[:, : 1 + (tail - 1) // 4].contiguous() + 0.5 for tail in tails if tail <= frames}
        media = safetensors.torch.save({name: held.bfloat16() for name, held in {"latent": latent, **ends}.items()})
        samples.append((fields(height, width, frames, "safetensors"), media))
    write(folder, samples)
    return folder


def manifest(shapes: Sequence[tuple[int, int, int]], fps: int = 8, per_shard: int | None = None) -> Manifest:
    """A manifest of samples of the given (height, width, frames) that nothing stands behind."""
    count = len(shapes)
    shard = np.arange(count) // (per_shard or max(1, count))
    sizes = np.array(shapes, dtype=np.int32).reshape(count, 3)
    zeros = np.zeros(count, dtype=np.int64)
    return Manifest(
        folder="nowhere",
        key=np.array([key(number).encode() for number in range(count)], dtype="S32"),
        shards=tuple(f"shard-{number:06d}.tar" for number in range(1 + int(shard.max(initial=0)))),
        shard=shard,
        exts=("mp4",),
        ext=zeros,
        image=sizes[:, 2] == 1,
        h=sizes[:, 0],
        w=sizes[:, 1],
        frames=sizes[:, 2],
        fps_num=np.full(count, fps, dtype=np.int32),
        fps_den=np.ones(count, dtype=np.int32),
        json_offset=zeros,
        json_length=zeros,
        media_offset=zeros,
        media_length=zeros,
        crc32=zeros,
    )
