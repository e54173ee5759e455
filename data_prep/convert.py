"""One form for every picture: upright, square pixels, even sides, progressive, 8-bit 4:2:0, BT.709, limited range."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import av

from data_prep import hdr
from data_prep.alpha import laid
from data_prep.media import UPRIGHT
from data_prep.records import Picture

# Of each display matrix (a, b, c, d): x' = a·x + c·y, y' = b·x + d·y, y pointing down.
FILTERS: dict[tuple[int, int, int, int], tuple[tuple[str, str], ...]] = {
    UPRIGHT: (),
    (0, 1, -1, 0): (("transpose", "dir=clock"),),
    (0, -1, 1, 0): (("transpose", "dir=cclock"),),
    (-1, 0, 0, -1): (("hflip", ""), ("vflip", "")),
    (-1, 0, 0, 1): (("hflip", ""),),
    (1, 0, 0, -1): (("vflip", ""),),
    (0, 1, 1, 0): (("transpose", "dir=cclock_flip"),),
    (0, -1, -1, 0): (("transpose", "dir=clock_flip"),),
}
MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}  # H.273
SPACES = {"bt601": "smpte170m", "fcc": "fcc", "smpte240m": "smpte240m", "bt2020": "bt2020nc"}  # for `colorspace`
UNSTATED = "bt601"  # what FFmpeg, and so every Python decoder, assumes where no matrix is stated, at any size
THE_SAME = "irange=tv:range=tv:itrc=bt709:trc=bt709:iprimaries=bt709:primaries=bt709"
SCALING = "bicubic+accurate_rnd+full_chroma_int"
RGB = ("rgb", "bgr", "gbr", "pal", "argb", "abgr", "0rgb", "0bgr")


def size_of(picture: Picture) -> tuple[int, int]:
    """Return (width, height) with square pixels and even sides, before any turn; the longer side is never shrunk."""
    width, height = picture.width, picture.height
    if picture.aspect > 1:
        width = round(width * picture.aspect / 2) * 2
    elif picture.aspect < 1:
        height = round(height / picture.aspect / 2) * 2
    return width - width % 2, height - height % 2


def only_matrix(picture: Picture) -> bool:
    """Return whether a picture has its form but for its sides, its turn and the matrix of its colours."""
    plain = picture.pix_fmt == "yuv420p" and not picture.full_range
    return plain and picture.aspect == 1 and picture.transfer not in hdr.NAMES


def converted(frames: Iterable[av.VideoFrame], picture: Picture, time_base: Any) -> Iterator[av.VideoFrame]:
    """Yield as many frames as come in, upright, of even size, yuv420p, BT.709 in limited range."""
    graph = av.filter.Graph()
    graph.threads = 1
    if picture.alpha == "laid on white":
        frames, picture = map(laid, frames), replace(picture, pix_fmt="rgb24")
    for step, frame in enumerate(frames):
        if step == 0:
            configure(graph, picture, frame, time_base)
        frame.pts = step
        graph.vpush(frame)
        yield from pulled(graph)
    graph.vpush(None)
    yield from pulled(graph)


def configure(graph: Any, picture: Picture, frame: av.VideoFrame, time_base: Any) -> None:
    """Build the chain of filters: deinterlace, square and even, 8-bit 4:2:0 in BT.709, then turn upright."""
    width, height = size_of(picture)
    which = "all" if picture.alpha == "laid on white" else "interlaced"  # laid frames do not say what they are
    chain = [("bwdif", f"mode=send_frame:deint={which}")] if picture.interlaced else []
    if picture.aspect == 1 and (width, height) != (picture.width, picture.height):
        chain.append(("crop", f"w={width}:h={height}:x=0:y=0:exact=1"))
    matrix = MATRICES.get(picture.matrix, UNSTATED)
    ranges = f"in_range={'full' if picture.full_range else 'limited'}:out_range=limited"
    matrices = f"in_color_matrix={matrix}:out_color_matrix=bt709"
    if picture.pix_fmt.startswith(RGB):
        ranges, matrices = "out_range=limited", "out_color_matrix=bt709"
    if picture.transfer in hdr.NAMES:
        signal = f"{ranges.split(':')[0]}:{matrices.split(':')[0]}:flags={SCALING}"
        chain.append(("scale", f"w={width}:h={height}:{signal}"))
        chain.append(("format", "pix_fmts=gbrp16"))
        chain.append(("lut3d", str(hdr.table_file(picture.transfer))))
        width, height, ranges, matrices = 0, 0, "out_range=limited", "out_color_matrix=bt709"  # 0 is what comes in
    if matrix in SPACES and only_matrix(picture):  # right to the nearest level, and 20 times as fast as by way of RGB
        chain.append(("colorspace", f"ispace={SPACES[matrix]}:space=bt709:{THE_SAME}"))
    else:
        chain.append(("scale", f"w={width}:h={height}:{ranges}:{matrices}:flags={SCALING}"))
    chain.append(("format", "pix_fmts=yuv420p"))
    chain += FILTERS[picture.turn]
    last = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base=str(time_base),
        pixel_aspect="1/1",
        colorspace=str(int(frame.colorspace)),
        range=str(int(frame.color_range)),
    )
    for name, arguments in [*chain, ("buffersink", "")]:
        if name == "lut3d":
            node = graph.add(name, file=arguments, interp="tetrahedral")
        else:
            node = graph.add(name, arguments) if arguments else graph.add(name)
        last.link_to(node)
        last = node
    graph.configure()


def pulled(graph: Any) -> Iterator[av.VideoFrame]:
    """Yield the frames that a graph has ready."""
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return
