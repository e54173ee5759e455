"""Promises of the embedded world: its scenes, their drawing, their captions."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from data_prep.world import World, describe, read_caption, render
from data_prep.world.cast import HELD_MOTIONS, HELD_PAIRS
from data_prep.world.demo import combinations
from data_prep.world.draw import coverage
from data_prep.world.scene import Sprite
from data_prep.world.seen import BACKGROUNDS, COLORS, SHAPES, VOCABULARIES
from data_prep.world.shapes import AREAS, EXTENTS
from data_prep.world.stories import Director
from soratrain.errors import ConfigError

PRESETS = ("demo", "full")


def scenes(preset: str, split: str, count: int) -> list:
    world = World(preset)
    return [world.scene(index, split) for index in range(count)]


def stories(name: str, count: int, frames: int = 17) -> list:
    """Return `count` scenes of one of the full world's stories."""
    made = []
    for index in range(count):
        rng = np.random.default_rng(index)
        director = Director(rng, held=False, height=96, width=96, frames=frames, fps=12.0)
        made.append(director.direct(name))
    return made


@pytest.mark.parametrize("preset", PRESETS)
def test_a_scene_depends_only_on_preset_seed_split_and_index(preset: str) -> None:
    first, again = World(preset, seed=3), pickle.loads(pickle.dumps(World(preset, seed=3)))
    again.scene(9, "train")  # what was asked before changes nothing
    for split in ("train", "seen", "heldout"):
        np.testing.assert_array_equal(render(first.scene(5, split)), render(again.scene(5, split)))
        assert describe(first.scene(5, split), "long") == describe(again.scene(5, split), "long")
    others = [World(preset, seed=4).scene(5), first.scene(6), first.scene(5, "seen")]
    assert len({first.scene(5).sprites[0].path.tobytes(), *(s.sprites[0].path.tobytes() for s in others)}) == 4


def test_seen_combinations_occur_in_training_and_held_out_ones_never_do() -> None:
    def combination(scene):
        thing = scene.truth.objects[0]
        return thing.color, thing.shape, thing.motion

    train = {combination(scene) for scene in scenes("demo", "train", 600)}
    assert {combination(scene) for scene in scenes("demo", "seen", 200)} <= train
    assert not {combination(scene) for scene in scenes("demo", "heldout", 200)} & train


def test_no_seen_scene_is_a_training_scene() -> None:
    train = {scene.sprites[0].path.tobytes() for scene in scenes("demo", "train", 500)}
    assert not train & {scene.sprites[0].path.tobytes() for scene in scenes("demo", "seen", 500)}


def test_every_word_of_the_demo_is_held_out_somewhere_and_every_pair_of_words_is_seen_in_training() -> None:
    words = VOCABULARIES["demo"]
    axes = (words.colors, words.shapes, words.motions)
    for position, values in enumerate(axes):
        assert {combination[position] for combination in combinations(held=True)} == set(values)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        pairs = {(combination[first], combination[second]) for combination in combinations(held=False)}
        assert len(pairs) == len(axes[first]) * len(axes[second])
    assert len(combinations(held=False)) > 4 * len(combinations(held=True))


def test_no_training_scene_of_the_full_world_has_a_held_out_pair() -> None:
    def held(scene) -> bool:
        things = scene.truth.objects
        return any((t.color, t.shape) in HELD_PAIRS or (t.shape, t.motion) in HELD_MOTIONS for t in things)

    assert not any(map(held, scenes("full", "train", 300)))
    assert not any(map(held, scenes("full", "seen", 300)))
    assert all(map(held, scenes("full", "heldout", 300)))


@pytest.mark.parametrize("preset", PRESETS)
def test_objects_stay_in_the_picture(preset: str) -> None:
    for scene in scenes(preset, "train", 300):
        zoom = 1.0 if scene.view is None else scene.view[:, 2]
        for sprite in scene.sprites:
            if sprite.angle is not None:  # a piece of something broken
                continue
            path = scene.on_screen(sprite.path)
            left, right, up, down = (extent * sprite.radius * zoom for extent in EXTENTS[sprite.shape])
            assert (path[:, 0] - left).min() > -0.5 and (path[:, 0] + right).max() < scene.width + 0.5
            assert (path[:, 1] - up).min() > -0.5 and (path[:, 1] + down).max() < scene.height + 0.5


def test_an_object_is_drawn_where_it_is_to_a_fraction_of_a_pixel() -> None:
    for shape in SHAPES:
        path = np.array([[20.0, 18.0], [20.25, 18.6], [20.7, 18.9]])
        cover = coverage(shape, path, 9.0, 40, 44)
        x = (cover.sum(1) @ (np.arange(44) + 0.5)) / cover.sum((1, 2))
        y = (cover.sum(2) @ (np.arange(40) + 0.5)) / cover.sum((1, 2))
        np.testing.assert_allclose(np.stack([x, y], 1), path, atol=0.06)
        np.testing.assert_allclose(cover.sum((1, 2)), AREAS[shape] * 81, rtol=0.03)


def test_a_turned_square_covers_as_much_as_an_upright_one() -> None:
    path = np.repeat([[20.0, 20.0]], 2, 0)
    upright, turned = coverage("square", path, 9.0, 40, 40, angle=np.array([0.0, np.pi / 4]))
    assert abs(upright.sum() / turned.sum() - 1) < 0.02
    assert upright[20, 33] == 0 < turned[20, 30]  # its corner now points sideways


def test_colours_are_drawn_as_they_are_named() -> None:
    for scene in scenes("demo", "train", 40):
        frame, thing = render(scene)[0], scene.truth.objects[0]
        x, y = scene.sprites[0].path[0].astype(int)
        assert tuple(frame[y, x]) == COLORS[thing.color]
        assert BACKGROUNDS[scene.truth.background] in {tuple(frame[0, 0]), tuple(frame[0, -1])}


def test_motions_of_the_demo_are_clearly_visible() -> None:
    for scene in scenes("demo", "train", 300):
        motion, path = scene.truth.objects[0].motion, scene.sprites[0].path
        way = np.ptp(path, axis=0) / (scene.width, scene.height)
        if motion in (None, "still"):
            assert not way.any()
        else:
            axis = 0 if motion in ("left", "right") else 1
            assert way[axis] > 0.28 and way[1 - axis] == 0
        if motion == "bounces":
            y, lowest = path[:, 1], path[:, 1].argmax()
            assert 0 < lowest < scene.frames - 1 and y[lowest] - y[lowest:].min() > 0.28 * scene.height


def test_a_bounce_keeps_its_energy() -> None:
    for scene in stories_with("bounces"):
        y = scene.sprites[0].path[:, 1]
        speed = np.gradient(y) * scene.fps
        gravity = 4.0 * min(scene.height, scene.width)
        smooth = np.abs(np.diff(y, 2) * scene.fps**2 - gravity) < 1e-6  # away from impacts the law holds exactly
        assert smooth.sum() >= (scene.frames - 2) / 2
        inner = np.flatnonzero(smooth) + 1
        energy = speed[inner] ** 2 / 2 - gravity * y[inner]
        assert np.ptp(energy) < 1e-6 * np.abs(energy).max()


def stories_with(motion: str) -> list:
    """Return scenes of a single object in some motion."""
    found = [scene for scene in stories("solo", 150) if scene.truth.objects[0].motion == motion]
    assert found
    return found


def test_what_breaks_stays_broken() -> None:
    for scene in stories_with("breaks"):
        whole, *pieces = scene.sprites
        assert len(pieces) >= 3 and whole.present is not None
        broken = ~whole.present
        assert not broken[0] and broken[-1] and (np.diff(broken.astype(int)) >= 0).all()
        assert all((piece.present == broken).all() for piece in pieces)


def test_a_collision_conserves_momentum_and_nothing_overlaps() -> None:
    for scene in stories("collide", 30):
        a, b = scene.sprites
        velocity = np.diff(a.path, axis=0) + np.diff(b.path, axis=0)  # equal masses
        np.testing.assert_allclose(velocity, np.repeat(velocity[:1], len(velocity), 0), atol=1e-9)
        reach = (EXTENTS[a.shape][1] + EXTENTS[b.shape][1]) * a.radius
        gap = np.abs(a.path[:, 0] - b.path[:, 0])
        assert gap.min() == pytest.approx(reach)


def test_something_is_hidden_in_the_middle_of_a_passage_and_back_at_the_end() -> None:
    for scene in stories("behind", 20):
        color = np.array(scene.sprites[0].color)
        shown = (np.abs(render(scene).astype(int) - color).max(-1) < 30).sum((1, 2))
        assert shown.argmin() not in (0, 16) and shown.min() < 0.5 * shown[0]
        assert shown[-1] > 0.7 * shown[0]


def test_the_ground_moves_against_the_camera() -> None:
    panning = [scene for scene in stories("camera", 60) if scene.truth.camera == "pans right"]
    assert panning
    for scene in panning:
        path = scene.on_screen(scene.sprites[0].path)
        assert path[-1, 0] < path[0, 0] - 20 and np.ptp(path[:, 1]) == 0
        still = render(replace(scene, sprites=(), view=None))
        moved = render(replace(scene, sprites=()))
        assert (moved[0] == still[0]).all() and (moved[-1] != still[-1]).any()


@pytest.mark.parametrize("preset", PRESETS)
def test_captions_say_what_is_true(preset: str) -> None:
    for scene in scenes(preset, "train", 150) + scenes(preset, "heldout", 150):
        short, long = (read_caption(describe(scene, style)) for style in ("short", "long"))
        truth = scene.truth
        for read in (short, long):
            assert read.background == truth.background and read.number == truth.number
            for thing, wanted in zip(read.objects, truth.objects, strict=True):
                assert (thing.color, thing.shape, thing.motion) == (wanted.color, wanted.shape, wanted.motion)
        assert long.camera == truth.camera and (long.pattern or "plain") == truth.pattern
        if truth.camera not in (None, "still"):
            assert short.camera == truth.camera
        for thing, wanted in zip(long.objects, truth.objects, strict=True):
            assert (thing.size, thing.texture or "plain", thing.place) == (wanted.size, wanted.texture, wanted.place)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_camera_does_and_tags_are_true_too(preset: str) -> None:
    for scene in scenes(preset, "train", 150):
        camera, tags = describe(scene, "camera"), read_caption(describe(scene, "tags"))
        truth = scene.truth
        assert read_caption(camera).camera == truth.camera and bool(camera) == (truth.camera is not None)
        assert tags.background == truth.background and (tags.pattern or "plain") == truth.pattern
        found = [(thing.color, thing.shape, thing.motion, thing.size) for thing in tags.objects]
        assert found == [(thing.color, thing.shape, thing.motion, thing.size) for thing in truth.objects]


def test_captions_are_varied_and_long_ones_longer() -> None:
    made = scenes("demo", "train", 60)
    assert len({describe(scene).split()[0] for scene in made}) > 1
    assert all(len(describe(scene, "long")) > len(describe(scene)) for scene in made)


@pytest.mark.parametrize(
    "text", ["", "   ", "a", "moves", "then turns", "三只猫", "red red red", "a red circle moves left, then", "\0" * 50]
)
def test_any_text_can_be_read(text: str) -> None:
    read_caption(text)


def test_what_a_text_leaves_out_is_unknown() -> None:
    seen = read_caption("A crimson circle wanders.")
    assert seen.background is None and seen.objects[0].shape == "circle"
    assert seen.objects[0].color is None and seen.objects[0].motion is None
    assert read_caption("a house by the sea").objects == ()


def test_all_sizes_lengths_rates_and_motions_of_the_full_world_occur() -> None:
    made = scenes("full", "train", 1500)
    assert len({(s.height, s.width) for s in made}) == 10 and {s.frames for s in made} == {1, 9, 17, 25, 33}
    assert {s.fps for s in made} == {8.0, 12.0, 16.0, 24.0}
    things = [thing for scene in made for thing in scene.truth.objects]
    words = VOCABULARIES["full"]
    assert {t.motion for t in things} == {None, *words.motions}
    assert {t.texture for t in things} == set(words.textures) and {t.shape for t in things} == set(words.shapes)
    assert {s.truth.camera for s in made} == {None, *words.cameras} and {s.truth.number for s in made} == {1, 2, 3}


@pytest.mark.parametrize("preset", PRESETS)
def test_prompts_ask_for_clips_of_their_split(preset: str) -> None:
    prompts = World(preset).prompts(16, "heldout")
    assert len({prompt.text for prompt in prompts}) > 8
    assert len({prompt.frames for prompt in prompts}) == 1 and prompts[0].frames > 1
    for prompt in prompts:
        said = read_caption(prompt.text).objects[0]
        wanted = prompt.truth.objects[0]
        assert (said.color, said.shape, said.motion) == (wanted.color, wanted.shape, wanted.motion)
    assert World(preset).prompts(4, "heldout") == prompts[:4]


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'moon'.*demo, full"):
        World("moon")
    with pytest.raises(ConfigError, match="'test'.*heldout"):
        World().scene(0, "test")
    with pytest.raises(ConfigError, match="'poem'.*short"):
        describe(World().scene(0), "poem")


def test_a_sprite_that_is_absent_is_not_drawn() -> None:
    scene = scenes("demo", "train", 1)[0]
    sprite = scene.sprites[0]
    gone = Sprite(sprite.shape, sprite.color, sprite.radius, sprite.path, present=np.arange(scene.frames) < 4)
    frames = render(replace(scene, sprites=(gone,)))
    assert (frames[:4] != frames[4, 0, 0]).any() and (frames[4:] == frames[4, 0, 0]).all()
