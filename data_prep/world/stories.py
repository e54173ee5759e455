"""The full world's stories: what one to three objects and the camera do in a clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_prep.world import motion as motions
from data_prep.world.cast import MARGIN, RADII, WORDS, Player, is_held
from data_prep.world.demo import travel
from data_prep.world.motion import PIECE_RADIUS, place_of
from data_prep.world.scene import Scene, Sprite
from data_prep.world.seen import BACKGROUNDS, CAMERAS, COLORS, DIRECTIONS, PATTERNS, TWO_PARTS, Seen, Thing
from data_prep.world.shapes import EXTENTS

STORIES = {"solo": 0.45, "several": 0.20, "behind": 0.10, "collide": 0.10, "camera": 0.15}
COLLIDERS = ("circle", "square", "cross")  # they touch at the height of their centroids
PAN = 0.3  # of the side along which the camera moves
ZOOM = 1.45
PATTERN_SHARE = 0.3  # of scenes whose camera rests


class Director:
    """Draws the parts of one scene from one generator."""

    def __init__(self, rng: np.random.Generator, *, held: bool, height: int, width: int, frames: int, fps: float):
        self.rng, self.held = rng, held
        self.height, self.width, self.frames, self.fps = height, width, frames, fps
        self.side = min(height, width)
        self.time = np.arange(frames) / fps
        self.view: np.ndarray | None = None
        self.camera: str | None = "still" if frames > 1 else None
        self.behind = False

    def choose(self, options: Sequence[str]) -> str:
        """Return one of the options."""
        return options[int(self.rng.integers(len(options)))]

    def cast(self, roles: Sequence[str | None], shapes: Sequence[str] = WORDS.shapes) -> list[Player]:
        """Return players of different colours for the motions; in a held-out scene the first is a held-out one."""
        players: list[Player] = []
        for motion in roles:
            want = self.held and not players
            options = [
                (color, shape)
                for color in WORDS.colors
                for shape in shapes
                if is_held(color, shape, motion) == want and color not in {player.color for player in players}
            ]
            color, shape = options[self.rng.integers(len(options))]
            size = self.choose(tuple(RADII))
            radius = float(self.rng.uniform(*RADII[size])) * self.side
            texture = self.choose(WORDS.textures) if self.rng.random() < 0.5 else "plain"
            players.append(Player(color, shape, motion, size, radius, texture, np.zeros((self.frames, 2))))
        return players

    def move(self, player: Player, height: int, width: int, offset: tuple[float, float] = (0, 0)) -> None:
        """Give a player the path of its motion within a part of the frame that begins at `offset` (x, y)."""
        free = player.free(height, width)
        motion = player.motion or "still"
        if motion in TWO_PARTS:
            first, second = motion.split(", ")
            ways = (float(self.rng.uniform(0.26, 0.36)) * width, float(self.rng.uniform(0.26, 0.36)) * height)
            path = motions.two_parts(self.rng, (first, second), free, ways, self.frames)
        elif motion in ("falls", "bounces", "breaks"):
            (low, high), (top, floor) = free
            drop = min(float(self.rng.uniform(0.36, 0.5)) * self.side, floor - top)
            if motion == "breaks":  # room for the pieces
                room = motions.PIECE_GAP * player.radius
                low, high = min(low + room, width / 2), max(high - room, width / 2)
            law = motions.bouncing if motion == "bounces" else motions.falling
            path = np.empty((self.frames, 2))
            path[:, 0] = self.rng.uniform(low, high)
            path[:, 1] = law(self.time, floor - drop, floor, self.side)
        else:
            path = travel(self.rng, motion, *free, (width, height), self.frames)
        player.path = path + np.array(offset)
        if motion == "breaks":
            self.shatter(player, drop, floor + offset[1])

    def shatter(self, player: Player, drop: float, floor: float) -> None:
        """Replace a player by its pieces from the moment when it hits the floor."""
        since = self.time - motions.fall_seconds(drop, self.side)
        whole = Sprite(
            player.shape, COLORS[player.color], player.radius, player.path, player.texture, present=since < 0
        )
        small = PIECE_RADIUS * player.radius
        ground = floor + player.extents()[3] - MARGIN - 0.9 * small
        pieces = motions.scattering(since, (player.path[0, 0], floor), ground, player.radius, self.side)
        shards = (
            Sprite("triangle", COLORS[player.color], small, path, angle=angle, present=since >= 0)
            for path, angle in pieces
        )
        player.pieces = (whole, *shards)

    def solo(self) -> list[Player]:
        """One object, in any motion."""
        simple = [motion for motion in WORDS.motions if motion not in TWO_PARTS]
        motion = self.choose(simple) if self.rng.random() < 0.6 else self.choose(TWO_PARTS)
        players = self.cast([motion if self.frames > 1 else None])
        self.move(players[0], self.height, self.width)
        return players

    def several(self) -> list[Player]:
        """Two or three objects, each in a lane of its own."""
        columns = self.width > self.height or (self.width == self.height and self.rng.random() < 0.5)
        most = 3 if max(self.height, self.width) >= 96 else 2
        count = int(self.rng.integers(2, most + 1))
        options = ("still", "up", "down", "bounces", "falls") if columns else ("still", "left", "right")
        roles = [self.choose(options) if self.frames > 1 else None for _ in range(count)]
        players = self.cast(roles)
        lane = (self.width if columns else self.height) / count
        for number, turn in enumerate(self.rng.permutation(count)):
            player = players[turn]
            player.radius = min(player.radius, (lane / 2 - MARGIN) / 1.4)
            if columns:
                self.move(player, self.height, int(lane), (number * lane, 0))
            else:
                self.move(player, int(lane), self.width, (0, number * lane))
        return players

    def behind_another(self) -> list[Player]:
        """One object passes behind another that stands still."""
        self.behind = True
        axis = 0 if self.width >= self.height else 1
        motion = self.choose((("left", "right"), ("up", "down"))[axis])
        mover, screen = self.cast([motion, "still"])
        mover.size, mover.radius = "small", 0.125 * self.side
        screen.size, screen.radius = "large", 0.21 * self.side
        centre = np.array([self.width, self.height]) / 2
        screen.path = np.repeat(centre[None], self.frames, 0)
        low, high = mover.free(self.height, self.width)[axis]
        along = np.linspace(0, 1, self.frames)
        mover.path = np.repeat(centre[None], self.frames, 0)
        mover.path[:, axis] = low + (high - low) * (along if motion in ("right", "down") else 1 - along)
        return [mover, screen]

    def collide(self) -> list[Player]:
        """Two objects of equal mass collide elastically: they exchange their velocities."""
        toward, away = ("right", "left") if self.rng.random() < 0.5 else ("left", "right")
        at_rest = self.rng.random() < 0.5
        roles = [f"{toward}, still", f"still, {toward}"] if at_rest else [f"{toward}, {away}", f"{away}, {toward}"]
        players = self.cast(roles, COLLIDERS)
        radius = min(float(self.rng.uniform(*RADII["small"])) * self.side, 0.125 * self.width)
        for player in players:
            player.size, player.radius = "small", radius
        sign = 1 if toward == "right" else -1
        gap = sum(EXTENTS[player.shape][1] * radius for player in players)
        outer = max(player.extents()[0] for player in players)
        way = min((self.width - 2 * outer - gap) / 2, 0.36 * self.width)
        free = [player.free(self.height, self.width)[1] for player in players]
        height = float(self.rng.uniform(max(low for low, _ in free), min(high for _, high in free)))
        time = np.linspace(-1, 1, self.frames)
        near, far = way * np.minimum(time, 0), way * np.maximum(time, 0)
        courses = (near, far) if at_rest else (-way * np.abs(time), way * np.abs(time))
        for player, side, course in zip(players, (-1, 1), courses, strict=True):
            x = self.width / 2 + sign * (side * gap / 2 + course)
            player.path = np.stack([x, np.full(self.frames, height)], 1)
        return players

    def filmed(self) -> list[Player]:
        """One or two objects that stand still while the camera pans or zooms."""
        self.camera = self.choose(CAMERAS[1:])
        verb, word = self.camera.split()
        along = np.linspace(0, 1, self.frames)
        self.view = np.stack([0 * along, 0 * along, 1 + 0 * along], 1)
        height, width = float(self.height), float(self.width)
        offset = np.zeros(2)
        if verb == "zooms":
            self.view[:, 2] = ZOOM ** (along if word == "in" else 1 - along)
            height, width = height / ZOOM, width / ZOOM
            offset[:] = (self.width - width) / 2, (self.height - height) / 2
        else:
            axis, sign = DIRECTIONS[word]
            way = PAN * (self.width, self.height)[axis]
            self.view[:, axis] = sign * way * along
            width, height = (width - way, height) if axis == 0 else (width, height - way)
            offset[axis] = way if sign > 0 else 0.0
        count = int(self.rng.integers(1, 3))
        players = self.cast(["still"] * count)
        columns = width >= height
        lane = (width if columns else height) / count
        for number, player in enumerate(players):
            player.size = "small"
            player.radius = min(0.135 * self.side, (min(lane, width, height) / 2 - MARGIN) / 1.4)
            box = (int(height), int(lane)) if columns else (int(lane), int(width))
            shift = (number * lane, 0.0) if columns else (0.0, number * lane)
            self.move(player, *box, (offset[0] + shift[0], offset[1] + shift[1]))
        return players

    def direct(self, story: str | None = None) -> Scene:
        """Return a scene of a story, which is drawn by lot unless it is named."""
        stories = {
            "solo": self.solo,
            "several": self.several,
            "behind": self.behind_another,
            "collide": self.collide,
            "camera": self.filmed,
        }
        names = list(STORIES) if self.frames > 1 else ["solo", "several"]
        shares = np.array([STORIES[name] for name in names])
        drawn = names[self.rng.choice(len(names), p=shares / shares.sum())]
        players = stories[story or drawn]()
        patterned = self.view is not None or self.rng.random() < PATTERN_SHARE
        pattern = PATTERNS[self.rng.integers(1, len(PATTERNS))] if patterned else "plain"
        if self.camera in ("pans up", "pans down"):
            pattern = "checkered"  # upright stripes do not show it
        background = self.choose(tuple(BACKGROUNDS))
        scene = Scene(
            height=self.height,
            width=self.width,
            frames=self.frames,
            fps=self.fps,
            background=BACKGROUNDS[background],
            sprites=tuple(sprite for player in players for sprite in player.sprites()),
            truth=Seen(background, (), camera=self.camera, pattern=pattern),
            wording=int(self.rng.integers(1 << 16)),
            pattern=pattern,
            view=self.view,
            behind=self.behind,
        )
        things = tuple(
            Thing(
                player.color,
                player.shape,
                player.motion,
                size=player.size,
                texture=player.texture,
                place=place_of(scene.on_screen(player.path)[0], self.height, self.width),
                lasts=True,
            )
            for player in players
        )
        return replace(scene, truth=replace(scene.truth, objects=things))
