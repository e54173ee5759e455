"""Promises of the oracle: how well it reads true, damaged and wrong clips."""

from __future__ import annotations

import io
from dataclasses import replace

import av
import numpy as np
import pytest

from data_prep.world import Scene, World, agreement, cut_off, measure, render, trajectories
from data_prep.world.motion import place_of
from data_prep.world.scene import Sprite
from data_prep.world.seen import BACKGROUNDS, COLORS, VOCABULARIES, Seen, Thing
from data_prep.world.segment import connected

SIDE, FRAMES = 48, 9


def damaged(clip: np.ndarray, seed: int) -> np.ndarray:
    """Return a clip after a Gaussian blur of sigma 1, noise of sigma 8, and H.264 at crf 23."""
    taps = np.exp(-(np.arange(-3, 4) ** 2) / 2)
    taps /= taps.sum()
    blurred = clip.astype(np.float64)
    for axis in (1, 2):
        pad = [(3, 3) if axis == other else (0, 0) for other in range(4)]
        wide = np.moveaxis(np.pad(blurred, pad, mode="edge"), axis, 0)
        blurred = np.moveaxis(sum(tap * wide[i : i + clip.shape[axis]] for i, tap in enumerate(taps)), 0, axis)
    noise = np.random.default_rng(seed).normal(0, 8, clip.shape)
    noisy = np.clip(blurred + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=8, options={"crf": "23", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        for frame in noisy:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        output.mux(stream.encode())
    file.seek(0)
    with av.open(file) as source:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)])


def accuracy(preset: str, count: int, *, damage: bool) -> dict[str, float]:
    """Return the mean agreement of what is read with the truth, over scenes of training and held-out combinations."""
    scores: dict[str, list[float]] = {}
    for split in ("train", "heldout"):
        for index in range(count // 2):
            scene = World(preset).scene(index, split)
            clip = damaged(render(scene), index) if damage else render(scene)
            for name, score in agreement(measure(clip, preset), scene.truth).items():
                scores.setdefault(name, []).append(score)
    return {name: float(np.mean(values)) for name, values in scores.items()}


def drawn(
    color: str = "red", shape: str = "circle", background: str = "black", way: tuple[float, float] = (18, 0)
) -> Scene:
    """Return a scene of one object that moves by `way` (x, y) pixels, through the frame's middle."""
    along = np.linspace(-0.5, 0.5, FRAMES)[:, None]
    path = SIDE / 2 + along * np.array([way])
    return Scene(
        height=SIDE,
        width=SIDE,
        frames=FRAMES,
        fps=8.0,
        background=BACKGROUNDS[background],
        sprites=(Sprite(shape, COLORS[color], 10.5, path),),
        truth=Seen(background, (Thing(color, shape),)),
        wording=0,
    )


def test_true_demo_clips_are_read_rightly() -> None:
    scores = accuracy("demo", 120, damage=False)
    assert set(scores) == {"background", "number", "camera", "color", "shape", "motion", "lasts"}
    assert min(scores.values()) >= 0.98, scores


def test_blurred_noisy_compressed_demo_clips_are_read_rightly() -> None:
    scores = accuracy("demo", 60, damage=True)
    assert min(scores.values()) >= 0.95, scores


def test_true_clips_of_the_full_world_are_read_rightly() -> None:
    scores = accuracy("full", 20, damage=False)
    assert min(scores.values()) >= 0.95, scores


@pytest.mark.full
def test_many_clips_of_the_full_world_are_read_rightly_even_when_damaged() -> None:
    clean = accuracy("full", 160, damage=False)
    assert min(clean.values()) >= 0.98, clean
    scores = accuracy("full", 100, damage=True)
    assert min(scores.values()) >= 0.95, scores


@pytest.mark.parametrize("color", VOCABULARIES["demo"].colors)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_colour_is_told_on_every_background(color: str, background: str) -> None:
    seen = measure(render(drawn(color, background=background)))
    assert (seen.background, [thing.color for thing in seen.objects]) == (background, [color])
    seen = measure(damaged(render(drawn(color, background=background)), 0))
    assert (seen.background, [thing.color for thing in seen.objects]) == (background, [color])


@pytest.mark.parametrize("shape", VOCABULARIES["full"].shapes)
def test_every_shape_is_told_even_pale(shape: str) -> None:
    clip = render(drawn("blue", shape, "white"))
    pale = (128 + (clip.astype(float) - 128) * 0.6).astype(np.uint8)
    for frames in (clip, pale, damaged(clip, 0)):
        assert measure(frames, "full").objects[0].shape == shape


@pytest.mark.parametrize(
    ("way", "motion"),
    [((0, 0), "still"), ((1.5, 1), "still"), ((-18, 1), "left"), ((18, 0), "right"), ((0, -18), "up")]
    + [((2, 18), "down"), ((15, 14), None)],
)
def test_motions_are_told_and_a_diagonal_is_none_of_them(way: tuple[float, float], motion: str | None) -> None:
    assert measure(render(drawn(way=way))).objects[0].motion == motion


def test_a_clip_played_backwards_shows_the_opposite_motion() -> None:
    assert measure(render(drawn(way=(18, 0)))[::-1]).objects[0].motion == "left"


def test_a_fall_without_a_rebound_is_no_bounce() -> None:
    scene = next(s for i in range(400) if (s := World().scene(i)).truth.objects[0].motion == "bounces")
    clip = render(scene)
    assert measure(clip).objects[0].motion == "bounces"
    assert measure(clip[:5]).objects[0].motion == "down"


def test_a_wrong_object_is_no_agreement() -> None:
    truth = replace(drawn().truth, objects=(Thing("red", "circle", "right", lasts=True),))
    right = agreement(measure(render(drawn())), truth)
    assert set(right.values()) == {1.0}
    for name, wrong in {
        "color": drawn("green"),
        "shape": drawn(shape="square"),
        "motion": drawn(way=(0, 18)),
        "background": drawn(background="navy"),
    }.items():
        scores = agreement(measure(render(wrong)), truth)
        assert {key for key, score in scores.items() if score < 1} == {name}


def test_a_vanished_object_is_noticed() -> None:
    clip = render(drawn(way=(4, 0)))
    clip[5:7] = clip[0, 0, 0]
    assert measure(clip).objects[0].lasts is False
    clip[:] = clip[0, 0, 0]
    assert measure(clip).objects == ()
    assert agreement(measure(clip), drawn().truth)["color"] == 0


def test_an_object_that_passes_behind_another_has_not_vanished() -> None:
    hidden = [s for i in range(90) if (s := World("full").scene(i)).behind]
    assert hidden
    assert all(thing.lasts for scene in hidden[:5] for thing in measure(render(scene), "full").objects)


def test_a_second_object_from_nowhere_is_counted() -> None:
    one, other = drawn("red", way=(0, 0)), drawn("blue", way=(0, 0))
    left, right = (
        replace(s.sprites[0], radius=7, path=s.sprites[0].path + [[x, 0]]) for s, x in ((one, -12), (other, 12))
    )
    assert measure(render(replace(one, sprites=(left, right)))).number == 2
    twin = replace(right, color=left.color)
    assert measure(render(replace(one, sprites=(left, twin)))).number == 2


def test_grey_blobs_have_no_colour_and_noise_no_object_of_a_known_shape() -> None:
    scene = drawn()
    grey = replace(scene, sprites=(replace(scene.sprites[0], color=(150, 150, 150)),))
    assert [thing.color for thing in measure(render(grey)).objects] == [None]
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    assert all(thing.shape is None for thing in measure(noise).objects)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("preset", ["demo", "full"])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 48, 48), (2, 7, 9), (3, 16, 64), (9, 48, 48)])
def test_no_clip_makes_the_oracle_fail(preset: str, size: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    ramp = np.broadcast_to(np.linspace(0, 255, size[2]).astype(np.uint8)[:, None], (*size, 3))
    blocks = rng.integers(0, 256, (size[0], size[1] // 8 + 1, size[2] // 8 + 1, 3), dtype=np.uint8)
    clips = [
        *(np.full((*size, 3), level, np.uint8) for level in (0, 90, 255)),
        rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        (rng.random((*size, 1)) < 0.5).astype(np.uint8).repeat(3, -1) * 255,
        blocks.repeat(8, 1).repeat(8, 2)[:, : size[1], : size[2]],
        ramp,
    ]
    for clip in clips:
        seen = measure(clip, preset)
        assert all(thing.motion is None for thing in seen.objects) or size[0] > 1


def test_trajectories_are_exact_to_a_third_of_a_pixel() -> None:
    for index in range(30):
        scene = World().scene(index)
        path = trajectories(render(scene))[scene.truth.objects[0].color or ""]
        np.testing.assert_allclose(path, scene.sprites[0].path, atol=0.33)


def test_connected_parts_are_told_apart() -> None:
    rows = ["##..#", "#...#", "###.#", "..#..", "#.###"]
    mask = np.array([[letter == "#" for letter in row] for row in rows])
    labels = connected(np.stack([mask, ~mask]))
    assert len(np.unique(labels[0][mask])) == 3 and (labels[0] > 0).tolist() == mask.tolist()
    assert labels[0][0, 0] == labels[0][4, 4] != labels[0][0, 4]
    spiral = np.array([[c == "#" for c in row] for row in ["#####", "....#", "###.#", "#...#", "#####"]])
    assert len(np.unique(connected(spiral[None])[0][spiral])) == 1


def test_places_are_thirds_of_the_picture() -> None:
    assert place_of(np.array([1.0, 47.0]), 48, 90) == ("bottom", "left")
    assert place_of(np.array([45.0, 24.0]), 48, 90) == ("middle", "middle")
    assert place_of(np.array([90.0, -1.0]), 48, 90) == ("top", "right")


def test_agreement_pairs_objects_by_what_they_are_and_not_by_their_order() -> None:
    red, blue = Thing("red", "circle", "left"), Thing("blue", "square", "up")
    truth = Seen("black", (red, blue))
    assert set(agreement(Seen("black", (blue, red)), truth).values()) == {1.0}
    assert agreement(Seen("black", (blue,)), truth)["color"] == 0.5
    assert agreement(Seen("black", (replace(red, motion="up"), blue)), truth)["motion"] == 0.5


def test_an_object_that_the_frames_edge_cuts_is_seen_and_no_true_clip_has_one():
    scenes = [World().scene(index) for index in range(40)]
    clips = [render(scene) for scene in scenes]
    assert not any(cut_off(clip) for clip in clips)
    wide = next(clip for clip, scene in zip(clips, scenes, strict=True) if scene.width > scene.height)
    places = trajectories(wide)
    edge = int(np.nanmin([path[:, 0].min() for path in places.values()]))  # through the object's middle
    assert cut_off(wide[:, :, edge:])
