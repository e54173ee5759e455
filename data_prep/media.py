"""Opening and decoding files of any kind, with every failure turned into one reason in plain words.

Files are opened as Python file objects, so that no name means anything to FFmpeg (`%d`, `{1..2}`, a leading dash).
Decoders get one thread: the processes already use every core, and errors come at the same frame each time.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import av
from av.codec.codec import UnknownCodecError
from av.stream import Disposition

from data_prep import pulse
from data_prep.members import File, Member

UPRIGHT = (1, 0, 0, 1)
STRICT = {"err_detect": "explode"}  # or damage would be painted over in silence
LIBVPX = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # identities of Matroska's elements (RFC 9559)
GIF_END = b";"
HEAD = 256  # bytes in which a Matroska's segment begins
BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"}


class Unusable(Exception):
    """A file, or a part of one, that cannot be used; the message says why in plain words."""


@contextmanager
def opened(path: File) -> Iterator[Any]:
    """Yield the PyAV container of a file. Raises Unusable where it is not a readable video or image."""
    try:
        size = length_of(path)
        file = path.open("rb")
    except FileNotFoundError as error:
        raise Unusable("there is no such file") from error
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from error
    with file:
        if size == 0:
            raise Unusable("the file is empty (zero bytes)")
        try:
            container = av.open(file, "r", metadata_errors="replace")
        except (av.FFmpegError, ValueError, OSError) as error:
            raise Unusable(why_not_opened(path)) from error
        with container:
            yield container


def length_of(path: File) -> int:
    """Return how many bytes a file has.

    Raises:
        Unusable: it is none.
        OSError: it is not there, or may not be looked at.
    """
    if isinstance(path, Member):
        return path.length
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for somebody to write into it
        raise Unusable("is not a file but a pipe, a socket or a device")
    return found.st_size


def why_not_opened(path: File) -> str:
    """Return the likely reason why FFmpeg could not open a file."""
    kinds = [kind for kind, _, _ in boxes(path)]
    if kinds[:1] and kinds[0] in (b"ftyp", b"mdat", b"wide") and b"moov" not in kinds:
        return "its index (moov) is missing: the recording was not finished, or the end of the file is cut off"
    return "not a video or image that FFmpeg can read"


def boxes(path: File) -> list[tuple[bytes, int, int]]:
    """Return (type, offset, length) of an MP4's top-level boxes (ISO/IEC 14496-12, 4.2); empty for other files."""
    found: list[tuple[bytes, int, int]] = []
    size = length_of(path)
    with path.open("rb") as file:
        offset = 0
        while offset + 8 <= size:
            file.seek(offset)
            length, kind = struct.unpack(">I4s", file.read(8))
            if not found and kind not in BOXES:
                break
            if length == 1:
                (length,) = struct.unpack(">Q", file.read(8).rjust(8, b"\0"))
            elif length == 0:
                length = size - offset
            found.append((kind, offset, length))
            if length < 8:
                break
            offset += length
    return found


def cut_off(path: File) -> bool:
    """Return whether an MP4's boxes or a Matroska's segment go on after the last byte, or a GIF lacks its end."""
    size = length_of(path)
    with path.open("rb") as file:
        head = file.read(HEAD)
        file.seek(max(size - HEAD, 0))
        tail = file.read()
    if head.startswith(b"GIF8"):
        return not tail.rstrip(b"\0").endswith(GIF_END)
    return segment_end(head) > size or any(offset + length > size for _, offset, length in boxes(path))


def segment_end(head: bytes) -> int:
    """Return where a Matroska's segment ends by its first bytes (RFC 8794, 6); 0 where that is not known."""
    if not head.startswith(EBML):
        return 0
    length, at = element_size(head, len(EBML))
    if head[at + length : at + length + 4] != SEGMENT:
        return 0
    length, at = element_size(head, at + length + 4)
    return at + length if length else 0


def element_size(data: bytes, at: int) -> tuple[int, int]:
    """Return the number of a variable length at a place, and the place behind it; 0 where it is unknown (all ones)."""
    width = 9 - data[at : at + 1].ljust(1, b"\1")[0].bit_length()
    ones = (1 << 7 * width) - 1
    value = int.from_bytes(data[at : at + width]) & ones
    return value if value < ones else 0, at + width


def video_stream(container: Any) -> Any:
    """Return the largest video stream, the first of equals, never cover art. Raises Unusable where there is none."""
    streams = [item for item in container.streams.video if not item.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({"cover art" if item.type == "video" else item.type for item in container.streams})
        raise Unusable(f"has no video stream, only {' and '.join(kinds)}" if kinds else "has no streams")
    stream = max(streams, key=area)  # and the first of equals
    if stream.codec_context is None:
        raise Unusable("its video codec is one that FFmpeg cannot decode")
    stream.codec_context.thread_count = 1
    stream.codec_context.options = STRICT
    return stream


def area(stream: Any) -> int:
    """Return how many pixels a stream says that it has; -1 where FFmpeg cannot decode it."""
    context = stream.codec_context
    return -1 if context is None else context.width * context.height


def hides_alpha(stream: Any) -> bool:
    """Return whether transparency lies beside the picture (WebM), where FFmpeg's own decoders pass over it."""
    return stream.codec_context.name in LIBVPX and stream.metadata.get("alpha_mode") == "1"


def decoder_of(stream: Any) -> Any:
    """Return what decodes a stream: libvpx where transparency lies beside the picture, if it is there; else its own."""
    own = stream.codec_context
    if not hides_alpha(stream):
        return own
    try:
        decoder = av.CodecContext.create(LIBVPX[own.name], "r")
    except UnknownCodecError:
        return own
    decoder.extradata, decoder.thread_count, decoder.options = own.extradata, 1, STRICT
    return decoder


def decoded(container: Any, stream: Any, damage: Callable[[str], None]) -> Iterator[av.VideoFrame]:
    """Yield the frames of `stream` as they are shown, up to the first that is damaged; `damage` is told why it is."""
    count, size, broken = 0, None, ""
    decoder = decoder_of(stream)
    packets = container.demux(stream)
    try:
        while not broken:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                frames = decoder.decode(packet)
            except av.EOFError:
                return
            except (av.FFmpegError, OSError) as error:
                broken = f"the stream is damaged after frame {{}} ({getattr(error, 'strerror', None) or error})"
                frames = flush(decoder)
            for frame in frames:
                size = size or (frame.width, frame.height, frame.format.name)
                if frame.is_corrupt:
                    broken = "the stream is damaged after frame {}"
                elif (frame.width, frame.height, frame.format.name) != size:
                    now = f"{frame.width}x{frame.height} {frame.format.name}"
                    broken = f"the picture changes from {size[0]}x{size[1]} {size[2]} to {now} after frame {{}}"
                else:
                    count += 1
                    pulse.beat()
                    yield frame
                    continue
                break
    finally:
        packets.close()  # left alone before its end, it would never free what it holds
        if broken:
            damage(broken.format(count))


def flush(decoder: Any) -> list[av.VideoFrame]:
    """Return the frames that a decoder still holds."""
    try:
        return list(decoder.decode(None))
    except (av.FFmpegError, OSError):
        return []


def turn_of(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Return the display matrix of a frame as (a, b, c, d), each -1, 0 or 1; one that is not a quarter turn is ignored.

    FFmpeg holds nine int32, the first two rows being a, b, u, c, d, v in 16.16 fixed point.
    """
    side_data: Any = frame.side_data  # typed as a mapping, iterates over its values
    for item in side_data:
        if item.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack_from("=5i", bytes(item))
            turn = tuple(round(value / 65536) for value in (a, b, c, d))
            if sorted(map(abs, turn)) == [0, 0, 1, 1] and turn[0] * turn[3] - turn[1] * turn[2] != 0:
                return turn  # type: ignore[return-value]
    return UPRIGHT
