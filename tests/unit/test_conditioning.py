"""Promises of the modes in which clips are shown in training: how often, of what, and where each part stands."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from soratrain.batch import draw_of, keyed_normal, keyed_uniform
from soratrain.diffusion.arrange import Case, Sample, arrange
from soratrain.diffusion.conditioning import MODES, Conditioning
from soratrain.diffusion.flow import Flow
from soratrain.diffusion.masks import NUMBERS, known_tokens
from soratrain.diffusion.segments import KNOWN, STANDALONE, flatten
from soratrain.diffusion.ways import bridging
from soratrain.errors import ConfigError
from soratrain.models.patchify import Patch, patchify_target

MIX = {"prefix": 0.2, "suffix": 0.1, "connect": 0.1, "inpaint": 0.2, "rollout": 0.1}
PATCH: Patch = (1, 2, 2)
DRAWS = [draw_of("sample", number) for number in range(3000)]


def mixed(**options: object) -> Conditioning:
    return Conditioning(**({"mix": MIX, "tail_frames": [1, 5]} | options))  # type: ignore[arg-type]


def only(mode: str, **options: object) -> Conditioning:
    return mixed(mix={mode: 1.0}, **options)


def cases(conditioning: Conditioning, grid: tuple[int, int, int], tails=(1, 5), done: float = 1.0) -> list[Case]:
    return [conditioning.case(draw, grid, PATCH, tails, done) for draw in DRAWS]


def sample(frames: int = 5, tail: int = 0, draw: int = 7, fps: float = 8.0) -> Sample:
    """A latent of so many frames, of 4 x 6 latent positions, with a tail of so many pixel frames."""
    shape = (3, frames, 4, 6)
    end = keyed_normal(draw, "end", (3, 1 + (tail - 1) // 4, 4, 6)) if tail else None
    clean, noise = keyed_normal(draw, "clean", shape), keyed_normal(draw, "noise", shape)
    return Sample(clean, noise, torch.tensor(0.7), fps, draw, end)


def shown(one: Sample, case: Case, rope_time: str = "seconds"):
    arranged = arrange(one, case, Flow(), PATCH, rope_time)
    return arranged, flatten([arranged.segments], PATCH, rope_time)


def test_each_mode_has_its_share_and_what_is_left_is_text_to_video() -> None:
    found = Counter(case.mode for case in cases(mixed(), (5, 2, 3)))
    for mode, share in {**MIX, "t2v": 0.3}.items():
        assert abs(found[mode] / len(DRAWS) - share) < 0.03, mode


def test_the_mix_grows_from_text_to_video_alone_over_its_share_of_the_run() -> None:
    ramped = mixed(ramp=0.5)
    given = [
        sum(case.mode != "t2v" for case in cases(ramped, (5, 2, 3), done=done)) / len(DRAWS)
        for done in (0.0, 0.125, 0.25, 0.5, 1.0)
    ]
    for found, share in zip(given, (0.0, 0.175, 0.35, 0.7, 0.7), strict=True):
        assert abs(found - share) < 0.03
    assert given[0] == 0 and given[3] == given[4]
    assert any(case.mode != "t2v" for case in cases(mixed(), (5, 2, 3), done=0.0))


@pytest.mark.parametrize(
    ("mode", "grid", "tails", "taken"),
    [
        ("prefix", (1, 2, 3), (1, 5), False),
        ("prefix", (2, 2, 3), (), True),
        ("suffix", (1, 2, 3), (1,), False),
        ("suffix", (2, 2, 3), (), False),
        ("suffix", (2, 2, 3), (5,), False),  # the tail is the clip
        ("suffix", (2, 2, 3), (1,), True),
        ("suffix", (3, 2, 3), (5,), True),
        ("suffix", (3, 2, 3), (9,), False),  # stored, but none that is wanted
        ("connect", (1, 2, 3), (1,), False),
        ("connect", (2, 2, 3), (1,), True),
        ("connect", (2, 2, 3), (5,), False),
        ("inpaint", (1, 1, 1), (), False),
        ("inpaint", (1, 1, 2), (), True),
        ("inpaint", (2, 1, 1), (), True),
        ("rollout", (1, 4, 4), (1, 5), False),
        ("rollout", (2, 1, 1), (), True),
    ],
)
def test_a_mode_that_a_clip_cannot_take_is_text_to_video(mode, grid, tails, taken) -> None:
    for case in cases(only(mode), grid, tails):
        assert case.mode == (mode if taken else "t2v") and case.asked == mode


def test_what_is_given_leaves_something_to_draw_and_images_are_as_common_as_asked() -> None:
    for mode in ("prefix", "connect"):
        found = cases(only(mode, animate=0.6), (6, 2, 3))
        for case in found:
            end = 6 - (case.tail - 1) // 4 if case.tail else 6
            assert 1 <= case.prefix < end
        ones = sum(case.prefix == 1 for case in found) / len(found)
        assert 0.6 < ones < 0.8
        assert {case.prefix for case in found} == set(range(1, 6))
    assert {case.tail for case in cases(only("suffix"), (6, 2, 3))} == {1, 5}
    assert {case.prefix for case in [only("prefix").case(draw, (3, 2, 3), (2, 2, 2), (), 1.0) for draw in DRAWS]} == {
        2,
        4,
    }


def test_a_rolled_prefix_has_lost_its_first_latent_frames_in_the_share_asked() -> None:
    for mode, patch in (("prefix", PATCH), ("prefix", (2, 2, 2)), ("connect", PATCH)):
        found = [only(mode, rolled=0.3, animate=0.0).case(draw, (6, 2, 3), patch, (1, 5), 1.0) for draw in DRAWS]
        longer = [case for case in found if case.prefix > patch[0]]
        assert abs(sum(case.skip > 0 for case in longer) / len(longer) - 0.3) < 0.03
        assert all(case.skip < case.prefix and case.skip % patch[0] == 0 for case in found)
        assert {case.skip // patch[0] for case in longer} >= {0, 1, 2}


@pytest.mark.parametrize("rope_time", ["seconds", "index"])
def test_a_rolled_prefix_is_shown_as_a_rolling_window_shows_it(rope_time: str) -> None:
    one = sample(frames=6, tail=5)
    arranged, flat = shown(one, Case("connect", "connect", prefix=3, skip=1, tail=5), rope_time)
    assert one.tail is not None
    noised = Flow().noised(one.clean, one.noise, one.sigma)[:, 3:5]
    layout = bridging(one.clean[:, 1:3], 2, one.tail, one.fps, standalone=False)
    drawn = flatten([layout.segments(noised, float(one.sigma), PATCH, rope_time)], PATCH, rope_time)
    for name in ("values", "coords", "flags", "sigma"):
        assert torch.equal(getattr(flat.tokens, name), getattr(drawn.tokens, name)), name


@pytest.mark.parametrize("rope_time", ["seconds", "index"])
@pytest.mark.parametrize("tail", [1, 5, 9])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_every_part_stands_where_its_frames_are_in_the_clip(prefix: int, tail: int, rope_time: str) -> None:
    one = sample(frames=6, tail=tail, fps=10.0)
    arranged, flat = shown(one, Case("connect", "connect", prefix=prefix, tail=tail), rope_time)
    first, last = [], []  # pixel frame of each segment's first and last latent frame
    times = flat.tokens.coords[:, 0] / (6 / 10 if rope_time == "seconds" else 1 / 4)  # as pixel frames
    for part in times.split([grid[0] * grid[1] * grid[2] for grid in flat.grids]):
        first.append(round(float(part[0]), 3))
        last.append(round(float(part[-1]), 3))
        steps = part.view(-1, 6)[:, 0].diff()
        torch.testing.assert_close(steps, torch.full_like(steps, 4.0), atol=1e-3, rtol=0)
    begin = 21 - tail  # of 21 frames, the first of the tail's
    assert first[-1] == begin and last[-1] == 20  # the clip's last frame is 20
    assert last[-2] == begin  # the noise's last latent frame covers that frame, and the three before it
    assert first[-2] == 4 * prefix
    if prefix:
        assert first[0] == 0 and last[0] == 4 * (prefix - 1)
    assert sum(len(segment.latent[0]) for segment in arranged.segments) == 7


def test_a_prefix_is_a_slice_a_suffix_is_not_and_both_are_known_and_clean() -> None:
    one = sample(frames=5, tail=5)
    arranged, flat = shown(one, Case("connect", "connect", prefix=2, tail=5))
    start, noise, end = arranged.segments
    assert torch.equal(start.latent, one.clean[:, :2]) and torch.equal(end.latent, one.tail)
    assert torch.equal(noise.latent, Flow().noised(one.clean, one.noise, one.sigma)[:, 2:4])
    assert [float(torch.as_tensor(part.sigma)) for part in arranged.segments] == pytest.approx([0, 0.7, 0])
    flags, mask = flat.tokens.flags.view(-1, 6)[:, 0].tolist(), flat.loss_mask.view(-1, 6)[:, 0].tolist()
    assert flags == [KNOWN | STANDALONE, KNOWN, 0, 0, KNOWN | STANDALONE, KNOWN]
    assert mask == [0, 0, 1, 1, 0, 0]
    whole = patchify_target(one.noise - one.clean, PATCH)
    assert torch.equal(arranged.target[12:24], whole[12:24])


def test_text_to_video_is_the_whole_clip_at_one_level() -> None:
    one = sample()
    arranged, flat = shown(one, Case("t2v", "t2v"))
    (part,) = arranged.segments
    assert torch.equal(part.latent, Flow().noised(one.clean, one.noise, one.sigma)) and part.standalone
    assert arranged.weights is None and flat.tokens.rows is None and flat.loss_mask.all()


def test_masks_give_some_and_leave_some_of_every_kind() -> None:
    for grid in [(1, 1, 2), (1, 4, 1), (2, 1, 1), (1, 3, 5), (5, 4, 6), (3, 1, 4)]:
        shares, stretches = [], 0
        for draw in DRAWS[:400]:
            known = known_tokens(keyed_uniform(draw, "inpaint", (NUMBERS,)), grid)
            assert (
                known is not None and known.any() and not known.all() and known.shape == (grid[0] * grid[1] * grid[2],)
            )
            shares.append(float(known.float().mean()))
            frames = known.view(grid[0], -1)
            stretches += bool((frames.all(1) | ~frames.any(1)).all())
        assert grid[0] == 1 or 0 < stretches < 400 or grid[1] * grid[2] == 1
        if grid == (5, 4, 6):
            assert min(shares) < 0.3 and max(shares) > 0.9


def test_painting_keeps_known_tokens_clean_and_noises_the_others() -> None:
    one, known = sample(frames=2), torch.tensor([True, False, True, False, False, True] * 2)
    arranged, flat = shown(one, Case("inpaint", "inpaint", known=known))
    values = flat.tokens.values
    _, clean = shown(Sample(one.clean, one.clean, torch.tensor(0.0), 8.0, 7), Case("t2v", "t2v"))
    _, noised = shown(one, Case("t2v", "t2v"))
    assert torch.equal(values[known], clean.tokens.values[known])
    assert torch.equal(values[~known], noised.tokens.values[~known])
    assert torch.equal(flat.loss_mask, (~known).float())
    assert torch.equal(flat.tokens.flags & KNOWN, known.long() * KNOWN)
    levels = flat.tokens.sigma[flat.tokens.rows]
    assert torch.equal(levels, torch.where(known, 0.0, 0.7))


def test_rollout_gives_each_latent_frame_its_own_level_and_the_target_that_belongs_to_it() -> None:
    one, objective = sample(frames=4), Flow(prediction="balanced", clean_weight=0.5)
    arranged = arrange(one, Case("rollout", "rollout"), objective, PATCH, "seconds")
    (part,) = arranged.segments
    levels = part.sigma.view(4, 6)[:, 0]
    assert len(levels.unique()) == 4 and torch.equal(part.sigma.view(4, 6), levels[:, None].expand(4, 6))
    for place, level in enumerate(levels):
        alone = [value[:, place : place + 1] for value in (one.clean, one.noise)]
        torch.testing.assert_close(part.latent[:, place : place + 1], objective.noised(*alone, level))
        target = patchify_target(objective.target(*alone, level), PATCH)
        torch.testing.assert_close(arranged.target[6 * place : 6 * place + 6], target)
        torch.testing.assert_close(arranged.weights[6 * place], objective.weight(level))


def test_light_noise_on_what_is_given_is_told_to_the_net_and_stays_marked_as_known() -> None:
    light = mixed(known_noise=0.2)
    levels = [case.level for case in cases(light, (5, 2, 3)) if case.mode in ("prefix", "suffix", "connect", "inpaint")]
    assert 0 < min(levels) < 0.02 and 0.18 < max(levels) < 0.2
    one = sample(frames=5, tail=5)
    arranged, flat = shown(one, Case("connect", "connect", prefix=1, tail=5, level=0.1))
    start, _, end = arranged.segments
    torch.testing.assert_close(start.latent, 0.9 * one.clean[:, :1] + 0.1 * one.noise[:, :1])
    noise = keyed_normal(one.draw, "tail noise", one.tail.shape)
    torch.testing.assert_close(end.latent, 0.9 * one.tail + 0.1 * noise)
    assert flat.tokens.sigma.tolist() == pytest.approx([0.1, 0.7, 0.1])
    assert flat.loss_mask.view(-1, 6)[:, 0].tolist() == [0, 1, 1, 1, 0, 0]
    known = torch.tensor([True, False] * 15)
    painted, _ = shown(one, Case("inpaint", "inpaint", known=known, level=0.1))
    assert painted.segments[0].sigma.unique().tolist() == pytest.approx([0.1, 0.7])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mix": {"prefx": 0.1}}, "conditioning.mix.prefx=0.1: no such mode; known: prefix"),
        ({"mix": {"prefix": -0.1}}, "conditioning.mix.prefix=-0.1 must be a share"),
        ({"mix": {"prefix": float("nan")}}, "must be a share"),
        ({"mix": {"prefix": "much"}}, "must be a share"),
        ({"mix": {"prefix": 0.7, "inpaint": 0.4}}, r"prefix 0.7, inpaint 0.4\) sum to 1.1"),
        (
            {"mix": {"connect": 0.1}, "tail_frames": []},
            "conditioning.mix.connect=0.1 needs ends .*conditioning.tail_frames",
        ),
        ({"tail_frames": [4]}, r"conditioning.tail_frames=\[4\]: 4 is not 1 \+ 4k"),
        ({"tail_frames": 5}, "conditioning.tail_frames=5"),
        ({"mix": 0.5}, "conditioning.mix=0.5"),
        ({"ramp": 1.5}, "conditioning.ramp=1.5"),
        ({"known_noise": -0.1}, "conditioning.known_noise=-0.1"),
        ({"animate": 2}, "conditioning.animate=2"),
        ({"rolled": 2}, "conditioning.rolled=2"),
        ({"caption_dropout": 1.5}, "conditioning.caption_dropout=1.5"),
    ],
)
def test_shares_that_cannot_be_are_refused_with_the_mend(options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        mixed(**options)


def test_ends_are_refused_where_a_token_spans_several_latent_frames() -> None:
    with pytest.raises(ConfigError, match=r"dit.patch=\[2, 2, 2\].*conditioning.mix.suffix=0"):
        mixed().check_patch((2, 2, 2))
    mixed(mix={"prefix": 0.5}).check_patch((2, 2, 2))


def test_how_a_sample_is_shown_is_drawn_from_the_sample_alone() -> None:
    again = [mixed().case(draw, (5, 2, 3), PATCH, [5, 1], 1.0) for draw in DRAWS]
    for one, other in zip(cases(mixed(), (5, 2, 3)), again, strict=True):
        assert (one.mode, one.prefix, one.tail, one.level) == (other.mode, other.prefix, other.tail, other.level)
        assert one.known is other.known or torch.equal(one.known, other.known)
    assert set(MODES) == set(MIX)
