"""A small simulated world with captions, held-out combinations, and an oracle that reads clips."""

from data_prep.world.captions import describe
from data_prep.world.draw import render
from data_prep.world.judging import Judgement, judge
from data_prep.world.oracle import cut_off, measure, trajectories
from data_prep.world.reading import read_caption
from data_prep.world.scene import Scene
from data_prep.world.seen import Seen, Thing, agreement
from data_prep.world.world import Prompt, World

__all__ = [
    "Judgement",
    "Prompt",
    "Scene",
    "Seen",
    "Thing",
    "World",
    "agreement",
    "cut_off",
    "describe",
    "judge",
    "measure",
    "read_caption",
    "render",
    "trajectories",
]
