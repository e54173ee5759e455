"""Promises of stage=evaluate target=ways: the truth scores full marks, and nothing that is given moves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dit_stage_tiny import write_chain
from PIL import Image
from rich.console import Console

from data_prep.world import World
from soratrain.compose import compose
from soratrain.diffusion.generator import Generator
from soratrain.diffusion.sampler import Sampler
from soratrain.errors import ConfigError
from soratrain.sheet import GIVEN, Row, contact_sheet, strip
from soratrain.stages.evaluate_ways import EvaluateWays
from soratrain.stages.evaluate_ways_cases import WAYS, Case, Maker
from soratrain.stages.evaluate_ways_drawn import Drawn, draw_cases, found_in, near_drawn
from soratrain.stages.evaluate_ways_scores import copied, going_on, joint, joints_of, trajectory
from soratrain.stages.evaluate_ways_shown import show
from soratrain.stages.sample_joints import RAMP

SETTINGS: dict[str, Any] = dict(
    preset="demo",
    world_seed=0,
    ways=list(WAYS),
    clips=1,
    trajectories=1,
    given=[1, 5],
    after=[8, 16],
    window=17,
    edit=0.6,
    refine=0.4,
    shown=1,
    seed=0,
    sampler=Sampler(steps=1, guidance_scale=1.0),
)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of an untrained chain."""
    folder = tmp_path_factory.mktemp("nets")
    write_chain(folder)
    return folder


def job(nets: Path, out: Path, **kwargs: Any) -> EvaluateWays:
    return EvaluateWays(out=str(out), vae=str(nets), dit=str(nets), **(SETTINGS | kwargs))


def maker(folder: Path) -> Maker:
    return Maker(World(), folder, window=17, edit=0.6, refine=0.4)


def true(case: Case) -> Drawn:
    return Drawn(case, case.truth, 0.0)


def itself(frames: np.ndarray) -> np.ndarray:
    return frames


def test_what_a_perfect_model_draws_scores_full_marks(
    nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perfect(self: EvaluateWays, generate: Generator, cases: Sequence[Case]) -> list[Drawn]:
        return [true(case) for case in cases]

    monkeypatch.setattr(EvaluateWays, "draw", perfect)
    found = job(nets, tmp_path, clips=2, trajectories=2)()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["way"], row["split"]) for row in report["ways"]] == [(w, s) for w in WAYS for s in ("seen", "heldout")]
    for row in report["ways"]:
        assert row["clips"] == 2 and row["agreement"] == row["ceiling"], row
        assert min(row["agreement"][name] for name in ("color", "shape", "background", "number")) == 1, row
        assert row.get("place_px", 0) < 1.5 and row["clean"]["latent"] == 0
        assert row["joint"] is None or row["joint"]["pixels"]["within"] >= 0.75
    for row in report["trajectories"]:
        assert row["drawn"] == row["oracle"] and row["drawn"]["px"] < 0.5 < row["copy"]["px"]
        assert row["kept"] == {"color": 1, "shape": 1} and row["lost"] == 0
    assert found["clips"] == 2 * 2 * (len(WAYS) + 4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_way_is_drawn_and_nothing_that_is_given_changes(nets: Path, tmp_path: Path, precision: str) -> None:
    found = job(nets, tmp_path, precision=precision)()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["precision"] == precision
    clean = {row["way"]: row["clean"] for row in report["ways"]}
    assert {way for way, row in clean.items() if row["latent"] is None} == {"t2v", "edit", "refine"}
    assert all(not row["latent"] and not row["pixels"] for row in clean.values()) and not found["clean_latents_change"]
    assert {way for way, row in clean.items() if row["pixels_compared"]} >= {"extend", "extend back", "inpaint"}
    assert {row["way"] for row in report["ways"] if row["joint"]} == {
        "animate", "extend", "extend back", "connect", "loop"
    }  # fmt: skip
    assert report["windows"]["joints"] == 2  # the extension by 16 takes two windows, of each split one clip
    assert Image.open(found["contact_sheet"]).width > 800
    console = Console(width=80, record=True, highlight=False)
    show(console, report)
    assert max(map(len, console.export_text().splitlines())) <= 80


def test_a_way_that_touches_what_is_given_is_found_out(
    nets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [maker(tmp_path).cases(way, "seen", 1)[0] for way in ("animate", "extend", "inpaint")]
    generate, sampler = Generator.load(nets, nets), SETTINGS["sampler"]
    untouched = draw_cases(generate, cases, sampler, 0, lambda done: None)
    encoded = Generator.encode

    def off(self: Generator, frames: Any) -> Any:
        calls.append(1)
        return (latent + 1e-3 * len(calls) for latent in encoded(self, frames))

    calls: list[int] = []
    monkeypatch.setattr(Generator, "encode", off)
    touched = draw_cases(generate, cases[:2], sampler, 0, lambda done: None)
    assert [one.latent for one in untouched] == [0, 0, 0]
    assert all(one.latent is not None and one.latent > 5e-4 for one in touched)


def test_the_windows_of_clips_that_roll_together_are_those_of_each_alone(nets: Path, tmp_path: Path) -> None:
    cases = maker(tmp_path).continued("seen", 5, 16, 3)
    generate, sampler = Generator.load(nets, nets), Sampler(steps=2, guidance_scale=1.0)
    one_by_one = [draw_cases(generate, [case], sampler, 3, lambda done: None)[0] for case in cases]
    for alone, one in zip(one_by_one, draw_cases(generate, cases, sampler, 3, lambda done: None), strict=True):
        assert one.windows == alone.windows == (17,)
        assert np.abs(one.frames.astype(int) - alone.frames).max() <= 1


def test_the_baselines_are_the_last_place_and_the_mean_speed() -> None:
    seen = np.array([[10.0, 4.0], [12.0, 4.0], [16.0, 5.0]])
    assert copied(seen, 2).tolist() == [[16, 5], [16, 5]]
    assert going_on(seen, 2).tolist() == [[19, 5.5], [22, 6]]
    assert going_on(seen[:1], 2).tolist() == [[10, 4], [10, 4]]


def test_the_error_of_copying_is_how_far_the_object_went(tmp_path: Path) -> None:
    cases = maker(tmp_path).continued("heldout", 5, 8, 6)
    report = trajectory([true(case) for case in cases], itself)
    ways = [np.linalg.norm(case.scene.sprites[0].path[12] - case.scene.sprites[0].path[4]) for case in cases]
    assert report["copy"]["px"] == pytest.approx(np.mean(ways), abs=0.3)
    sides = [way / min(case.scene.height, case.scene.width) for way, case in zip(ways, cases, strict=True)]
    assert report["copy"]["side"] == pytest.approx(np.mean(sides), abs=0.01)
    straight = [report["by_motion"][name]["velocity"]["px"] for name in report["by_motion"] if name != "bounces"]
    assert max(straight) < 0.5


def test_an_object_that_is_gone_is_counted_as_lost_and_is_in_no_mean(tmp_path: Path) -> None:
    cases = maker(tmp_path).continued("seen", 1, 8, 2)
    gone = Drawn(cases[0], np.repeat(np.repeat(cases[0].truth[:1, :1, :1], 48, 1), 64, 2).repeat(9, 0), 0.0)
    report = trajectory([gone, true(cases[1])], itself)
    assert report["lost"] == 0.5 and report["drawn"]["px"] < 0.5


def test_a_jump_is_seen_at_the_joint_and_nowhere_else(tmp_path: Path) -> None:
    (case,) = maker(tmp_path).cases("extend", "seen", 1)
    assert joints_of(case) == [(8, 9)]
    broken = case.truth.copy()
    broken[9:] = 255 - broken[9:]
    fine, bad = (joint([Drawn(case, frames, 0.0)], lambda one: joints_of(one.case)) for frames in (case.truth, broken))
    assert fine is not None and bad is not None
    assert bad["pixels"]["within"] == 0 and bad["pixels"]["median"] > 50 > fine["pixels"]["median"]
    shown = joint([Drawn(case, case.truth, 0.0)], lambda one: joints_of(one.case), lambda _: broken)
    assert shown is not None and (shown["pixels"]["within"], shown["pixels"]["vae"]) == (1, 0)
    (around,) = maker(tmp_path).cases("loop", "seen", 1)
    assert joints_of(around) == [(8, 9), (15, 0)]


def test_frames_near_a_joint_are_not_promised_to_be_the_files() -> None:
    given = np.arange(20) < 12
    assert np.flatnonzero(~near_drawn(given, False)).tolist() == list(range(12 - RAMP))
    assert near_drawn(given, True).all()
    stream = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert found_in([stream + 9, stream], stream[:, :2] + 0.25) == 0.25


def test_a_border_marks_what_was_given(tmp_path: Path) -> None:
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    image = np.asarray(strip(frames, given=np.array([True, False, False])))
    color = tuple(bytes.fromhex(GIVEN[1:]))
    edges = [tuple(image[0, left]) for left in np.arange(3) * (128 + 6)]
    assert [edge == color for edge in edges] == [True, False, False]
    contact_sheet(tmp_path / "sheet.png", "t", [("h", [Row("a", frames, given=np.ones(3, bool))])])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet == color).all(-1).sum() > 3 * 4 * 128


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ways": ["extnd"]}, "'extnd'.*use t2v, animate"),
        ({"clips": 0}, "clips=0 must be at least 1"),
        ({"given": [1, 4]}, "given=4: use one of 1, 5, 9"),
        ({"after": [6]}, "after=6: use one of 4, 8, 12"),
        ({"window": 1}, "window=1: use one of 5, 9"),
        ({"edit": 0.0}, "edit=0.0 must lie in"),
        ({"preset": "full"}, "preset=full"),
        ({"ways": [], "trajectories": 0}, "nothing is left to score"),
    ],
)
def test_bad_options_are_refused_before_a_net_is_read(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        job(tmp_path / "nowhere", tmp_path, **settings)


def test_the_config_asks_for_every_way() -> None:
    config, _ = compose(["stage=evaluate", "target=ways", "machine=laptop"])
    assert list(config["stage"]["job"]["ways"]) == list(WAYS)
    assert config["out"].endswith("evaluate/ways")
