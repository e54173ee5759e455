"""stage=recaption: clips that cannot be shown cost themselves alone."""

from __future__ import annotations

from fractions import Fraction

import data_tiny
from chat_server import looking, said
from recaption_job import job, listed


def test_a_clip_without_frames_is_listed_and_the_others_are_described(tmp_path):
    video = data_tiny.pixels(1, 16, 16, 5)
    fields = data_tiny.fields(16, 16, 5, "mp4")
    good = data_tiny.mp4(video, Fraction(8))
    data_tiny.write(tmp_path / "shards", [(fields, good), (fields, b""), (fields, good)])
    with looking(lambda body: said("A grey wall.")) as server:
        figures = job(tmp_path / "shards", tmp_path / "out", server.url)()
    assert figures["unreadable"] == 1 and figures["captions"] == 4
    (failure,) = listed(tmp_path / "out")
    assert failure["key"] == data_tiny.key(1) and failure["final"] and failure["style"] == ""


def test_a_rate_of_zero_costs_a_video_itself_and_an_image_nothing(tmp_path):
    shapes = [(data_tiny.fields(16, 16, 1, "png"), data_tiny.png(data_tiny.pixels(0, 16, 16, 1)[0]))]
    shapes += [
        (data_tiny.fields(16, 16, count, "mp4"), data_tiny.mp4(data_tiny.pixels(1, 16, 16, count), Fraction(8)))
        for count in (5, 101)
    ]
    still = [({**fields, "fps_num": 0}, media) for fields, media in shapes]
    data_tiny.write(tmp_path / "shards", [*shapes[1:], *still])
    with looking(lambda body: said("A grey wall.")) as server:
        figures = job(tmp_path / "shards", tmp_path / "out", server.url)()
    assert figures["unreadable"] == 2 and figures["captions"] == 6
