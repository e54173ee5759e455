"""Captions of scenes in four styles, short and long ones in a few plain paraphrases."""

from __future__ import annotations

import re

from data_prep.world.scene import Scene
from data_prep.world.seen import DIRECTIONS, TWO_PARTS, Thing
from soratrain.errors import ConfigError

STYLES = ("short", "long", "camera", "tags")
# Ways to say what an object does.
VERBS: dict[str, tuple[str, ...]] = {
    "still": ("stands still", "does not move"),
    "left": ("moves left", "moves to the left"),
    "right": ("moves right", "moves to the right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "sinks"),
    "bounces": ("bounces", "bounces up and down"),
    "falls": ("falls to the ground", "falls down"),
    "breaks": ("falls and breaks", "falls and breaks into pieces"),
}
SHORT: tuple[str, ...] = (
    "a {thing} {verb} on a {background} background",
    "on a {background} background, a {thing} {verb}",
    "a {thing} {verb} in front of a {background} background",
)
LONG: tuple[str, ...] = (
    "A {thing} {verb} on a {background} background. {where}{camera}.",
    "On a {background} background, a {thing} {verb}. {where}{camera}.",
)
SHORT_IMAGE: tuple[str, ...] = (
    "a {thing} on a {background} background",
    "a {thing} in front of a {background} background",
)
LONG_IMAGE: tuple[str, ...] = (
    "A {thing} on a {background} background. {where}.",
    "On a {background} background, there is a {thing}. {where}.",
)
STARTS = ("It starts {place}", "It is first seen {place}")
CAMERA_STILL = (", and the camera does not move", "; the camera is fixed")
CAMERA_MOVES = {"pans": ("the camera pans {way}", "the camera moves {way}"), "zooms": ("the camera zooms {way}",) * 2}


def describe(scene: Scene, style: str = "short") -> str:
    """Return a caption of the scene; the same scene always gets the same words, and an image none of its camera.

    Raises:
        ConfigError: there is no such style.
    """
    if style not in STYLES:
        raise ConfigError(f"a caption style {style!r} does not exist; use one of {', '.join(STYLES)}")
    if style == "camera":
        return camera_words(scene, CAMERA_STILL[scene.wording % 2]).lstrip(",; ").removeprefix("and ")
    if style == "tags":
        return tags(scene)
    short, truth, choice = style == "short", scene.truth, scene.wording
    moving = truth.camera is not None
    templates = (SHORT if moving else SHORT_IMAGE) if short else (LONG if moving else LONG_IMAGE)
    turn = choice % len(templates)
    first = truth.objects[0]
    background = truth.background or ""
    if truth.pattern not in (None, "plain") and not short:
        background = f"{truth.pattern} {background}"
    text = templates[turn].format(
        thing=name(first, short=short),
        verb=doings(scene, short=short),
        background=background,
        where=places(scene, STARTS[turn % 2]),
        camera=camera_words(scene, CAMERA_STILL[turn % 2]),
    )
    if not moving and len(truth.objects) > 1:
        text = text.replace(name(first, short=short), listed(scene, short=short), 1)
    if short and truth.camera not in (None, "still"):
        text += ", " + camera_moves(truth.camera or "", choice)
    return re.sub(r"\b([Aa]) (?=orange)", r"\1n ", text)


def tags(scene: Scene) -> str:
    """Return what is seen, comma by comma: each object, what it does, the background, and what the camera does."""
    truth, found = scene.truth, list[str]()
    for thing in truth.objects:
        found += [name(thing, short=False), verb(thing.motion, 0).replace(", ", " ") if thing.motion else ""]
    plain = truth.pattern in (None, "plain")
    found.append(f"{'' if plain else f'{truth.pattern} '}{truth.background or ''} background")
    if truth.camera not in (None, "still"):
        found.append(camera_moves(truth.camera or "", 0))
    return ", ".join(filter(None, found))


def name(thing: Thing, *, short: bool) -> str:
    """Return an object's name, as "red circle" or, in long captions, "small striped red circle"."""
    words = [thing.color, thing.shape]
    if not short:
        words = [thing.size, None if thing.texture == "plain" else thing.texture, *words]
    return " ".join(word for word in words if word)


def listed(scene: Scene, *, short: bool) -> str:
    """Return the names of all objects, as "red circle, a blue square and a green star"."""
    names = [name(thing, short=short) for thing in scene.truth.objects]
    return " and a ".join([", a ".join(names[:-1]), names[-1]])


def doings(scene: Scene, *, short: bool) -> str:
    """Return what the first object does, and then, with their names, what the others do."""
    first, *others = scene.truth.objects
    if first.motion is None:
        return ""
    words = verb(first.motion, scene.wording)
    if scene.behind:
        return f"{words} behind a {name(others[0], short=short)}, which {verb('still', scene.wording)}"
    for index, thing in enumerate(others):
        link = ", " if index < len(others) - 1 else " and "
        words += f"{link}a {name(thing, short=short)} {verb(thing.motion or 'still', scene.wording)}"
    return words


def verb(motion: str, choice: int) -> str:
    """Return a motion in words."""
    if motion not in TWO_PARTS:
        ways = VERBS[motion]
        return ways[choice // 6 % len(ways)]
    first, second = motion.split(", ")
    start = "waits" if first == "still" else VERBS[first][0]
    if second == "still":
        end = "stops"
    elif first == "still":
        end = VERBS[second][0]
    elif DIRECTIONS[first][0] == DIRECTIONS[second][0]:
        end = ("bounces back", "comes back")[choice // 6 % 2]
    else:
        end = f"turns {second}"
    return f"{start}, then {end}"


def places(scene: Scene, template: str) -> str:
    """Return a sentence on where each object is at first, without its full stop."""
    things = scene.truth.objects
    if things[0].motion is None:
        template = "It is {place}"
    if len(things) == 1:
        return template.format(place=place_words(things[0].place))
    verb = template.removeprefix("It ").split(" {")[0]
    parts = [f"the {thing.color} {thing.shape} {verb} {place_words(thing.place)}" for thing in things]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]])
    return f"There are {('two', 'three')[len(things) - 2]} objects: {text}"


def place_words(place: tuple[str, str] | None) -> str:
    """Return a place in words, as "at the top left" or "in the middle"."""
    if place is None or place == ("middle", "middle"):
        return "in the middle"
    row, column = place
    if column == "middle":
        return f"at the {row}"
    return f"on the {column}" if row == "middle" else f"at the {row} {column}"


def camera_words(scene: Scene, still: str) -> str:
    """Return the end of a sentence that says what the camera does."""
    camera = scene.truth.camera
    if camera is None:
        return ""
    return still if camera == "still" else "; " + camera_moves(camera, scene.wording)


def camera_moves(camera: str, choice: int) -> str:
    """Return what a moving camera does, in words."""
    kind, way = camera.split()
    return CAMERA_MOVES[kind][choice // 6 % 2].format(way=way)
