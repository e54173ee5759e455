"""Promises of every way to sample: what is given stays, and what is drawn joins it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from sample_chain import FRAMES, HEIGHT, WIDTH, Chain, clip, order, write_files
from tiny_dit import VAE_FACTORY
from torch import Tensor

from soratrain.diffusion.generator import Generator
from soratrain.diffusion.sampler import Sampler
from soratrain.diffusion.ways import Layout
from soratrain.errors import ConfigError
from soratrain.models import weights
from soratrain.models.autoencoders import stride_at
from soratrain.stages.sample_fit import FEATHER, cover, filled, inside
from soratrain.stages.sample_joined import Connect, Extend, Loop
from soratrain.stages.sample_joints import LEAD, RAMP, Joined
from soratrain.stages.sample_redrawn import Edit, Inpaint, Refine
from soratrain.stages.sample_tasks import T2V, Animate, Order, Scene, Task


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return write_files(tmp_path_factory.mktemp("chain"))


@dataclass
class Drawn:
    """A scene drawn: its frames, and every layout with what was drawn of it."""

    scene: Scene
    frames: np.ndarray
    parts: list[tuple[Layout, Tensor]]


def drawn(chain: Chain, task: Task, settings: Order) -> Drawn:
    scene, generate = task.scene(settings), Generator.load(chain.folder, chain.folder)
    scene.check(generate)
    parts: list[tuple[Layout, Tensor]] = []

    def draw(layout: Layout, name: str) -> Tensor:
        (latent,) = generate.draw([layout], ["a cat"], [5], Sampler(steps=2), strength=scene.strength, name=name)
        parts.append((layout, latent))
        return latent

    if isinstance(scene, Joined):
        frames = list(scene.play(generate, draw))
    else:
        layout = scene.layout(generate)
        frames = list(scene.show(generate, layout, draw(layout, "noise")))
    assert len(frames) == scene.frames and frames[0].shape == (scene.height, scene.width, 3)
    assert max(layout.positions for layout, _ in parts) == scene.positions(generate)
    return Drawn(scene, np.stack(frames), parts)


def original(chain: Chain, name: str = "a.mp4") -> np.ndarray:
    with av.open(chain.file(name)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def near(frames: np.ndarray, others: np.ndarray) -> bool:
    """Return whether frames are the same but for the rounding of colours on two ways to RGB."""
    return frames.shape == others.shape and np.abs(frames.astype(int) - others).max() <= 3


def own(chain: Chain, task: Task, name: str) -> np.ndarray:
    """Return a video's frames as every way reads them."""
    from soratrain.stages.sample_inputs import open_video

    return np.stack(list(open_video("task.video", chain.file(name)).read()))


def decoded(chain: Chain, latents: Sequence[Tensor]) -> np.ndarray:
    return Generator.load(chain.folder, chain.folder).decode(torch.cat(list(latents), dim=1))


def test_files_are_read_as_they_play(chain: Chain) -> None:
    assert near(own(chain, T2V(), "a.mp4"), original(chain))


@pytest.mark.parametrize("by", [3, 30])
def test_extending_forwards_keeps_the_video_and_goes_on_as_one_stream(chain: Chain, by: int) -> None:
    found = drawn(chain, Extend(video=chain.file("a.mp4"), by=by), order())
    before, frames = own(chain, T2V(), "a.mp4"), found.frames
    assert len(frames) == FRAMES + -(-by // 4) * 4 and found.scene.fps == 8
    assert np.array_equal(frames[: FRAMES - RAMP], before[:-RAMP])
    generate = Generator.load(chain.folder, chain.folder)
    latents = generate.encoded(before[2:])  # its last 1 + 4k frames
    assert torch.equal(found.parts[0][0].before[0].latent, latents[:, -2:])
    stream = decoded(chain, [latents, *(latent for _, latent in found.parts)])
    assert np.abs(frames[FRAMES - 1 :].astype(int) - stream[FRAMES - 3 :]).max() <= 1
    assert {layout.positions for layout, _ in found.parts[:-1]} <= {3 * 4 * 6}


@pytest.mark.parametrize("by", [4, 26])
def test_extending_backwards_leads_into_the_video(chain: Chain, by: int) -> None:
    found = drawn(chain, Extend(video=chain.file("a.mp4"), by=by, direction="backwards"), order())
    after, new = own(chain, T2V(), "a.mp4"), -(-by // 4) * 4
    assert np.array_equal(found.frames[new + RAMP :], after[RAMP:]) and len(found.frames) == new + FRAMES
    generate = Generator.load(chain.folder, chain.folder)
    assert torch.equal(found.parts[0][0].after[0].latent, generate.encoded(after[:5]))
    pieces = [decoded(chain, [latent]) for _, latent in reversed(found.parts)]
    assert np.array_equal(found.frames[: len(pieces[0]) - 1 - LEAD], pieces[0][: -1 - LEAD])
    ends, firsts = np.cumsum([len(piece) - 1 for piece in pieces]), [piece[0] for piece in pieces[1:]]
    for end, piece, first in zip(
        ends, pieces, [*firsts, decoded(chain, [generate.encoded(after[:1])])[0]], strict=True
    ):
        half = piece[-3].astype(float) + (first.astype(float) - piece[-1]) / 2  # the second of three frames
        assert np.abs(found.frames[end - 2] - half.clip(0, 255)).max() <= 1


def test_connecting_and_looping_bridge_from_an_end_to_a_beginning(chain: Chain) -> None:
    first, second = own(chain, T2V(), "a.mp4"), own(chain, T2V(), "b, café 三.mp4")
    task = Connect(video=chain.file("a.mp4"), video2=chain.file("b, café 三.mp4"), by=6)
    found = drawn(chain, task, order())
    (layout, _), generate = found.parts[0], Generator.load(chain.folder, chain.folder)
    assert np.array_equal(found.frames[: FRAMES - RAMP], first[:-RAMP]) and len(found.frames) == FRAMES + 7 + 11
    assert np.array_equal(found.frames[FRAMES + 7 + RAMP :], second[RAMP:])
    assert torch.equal(layout.before[0].latent, generate.encoded(first[2:])[:, -2:])
    assert torch.equal(layout.after[0].latent, generate.encoded(second[:5])) and layout.after[0].frame == 8 + 4
    looped = drawn(chain, Loop(video=chain.file("a.mp4"), by=7), order())
    assert len(looped.frames) == FRAMES + 7
    assert np.array_equal(looped.frames[RAMP : FRAMES - RAMP], first[RAMP:-RAMP])
    assert torch.equal(looped.parts[0][0].after[0].latent, generate.encoded(first[:5]))
    assert np.abs(looped.frames[0].astype(int) - generate.decode(generate.encoded(first[:1]))[0]).max() <= 1


def test_animating_begins_with_the_picture_fitted_to_the_size(chain: Chain) -> None:
    found = drawn(chain, Animate(image=chain.file("picture.png")), order(fps=8.0, size=(32, 48)))
    layout, latent = found.parts[0]
    generate = Generator.load(chain.folder, chain.folder)
    picture = np.repeat(clip(1, 2)[0], 2, axis=0)[HEIGHT // 2 : HEIGHT // 2 + HEIGHT]
    assert torch.equal(layout.before[0].latent, generate.encoded([picture]))
    assert np.array_equal(found.frames, decoded(chain, [layout.before[0].latent, latent]))
    assert "48x64 scaled by 1, 32 rows cropped" in found.scene.said[0]
    own_size = Animate(image=chain.file("picture.png")).scene(order(fps=8.0))
    assert (own_size.height, own_size.width) == (48, 32)  # 64x48 turned, at about 48x32 pixels


def test_a_size_taken_off_an_input_fits_the_vae_whatever_its_stride(chain: Chain, tmp_path: Path) -> None:
    coarse = partial(VAE_FACTORY, front_strides=[2, 8])
    weights.save(tmp_path, "vae", coarse(), coarse, {})
    task = Animate(image=chain.file("picture.png"))  # 48x64, at about 48x32 pixels
    (item,) = chain.job(task, fps=8.0, vae=str(tmp_path)).items
    assert (item.scene.height, item.scene.width) == (32, 32) and stride_at(tmp_path) == (4, 16, 16)
    with pytest.raises(ConfigError, match="size=48x32: width 48 is no multiple of 32"):
        chain.job(task, fps=8.0, size="48x32", vae=str(tmp_path))


def test_inpainting_leaves_what_is_beside_the_mask(chain: Chain) -> None:
    found = drawn(chain, Inpaint(video=chain.file("a.mp4"), mask=chain.file("mask.png")), order(None))
    before, (layout, latent) = own(chain, T2V(), "a.mp4")[:21], found.parts[0]
    assert np.array_equal(found.frames[:, :, 14 + FEATHER :], before[:, :, 14 + FEATHER :])
    assert np.array_equal(found.frames[:, :, :13], decoded(chain, [latent])[:, :, :13])
    assert layout.known is not None and layout.base is not None
    assert layout.known[:, :, 2:].all() and not layout.known[:, :, :2].any()
    assert torch.equal(latent[:, layout.known], layout.base[:, layout.known])
    larger = Inpaint(video=chain.file("a.mp4"), mask=chain.file("mask2.png")).scene(order(None))
    assert "mask2.png: 96x64 scaled to the video's 48x32" in larger.said[1]


def test_nothing_of_what_a_mask_hides_reaches_what_is_given(chain: Chain) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, :14] = True
    one, other = clip(1, 0)[0].copy(), clip(1, 0)[0].copy()
    other[mask] = 255 - other[mask]
    assert np.array_equal(filled(one, mask), filled(other, mask))
    assert np.array_equal(filled(one, mask)[~mask], one[~mask])
    flat = np.full_like(one, 77)
    assert np.array_equal(filled(np.where(mask[..., None], np.uint8(3), flat), mask), flat)


@pytest.mark.parametrize("fit", [cover, inside])
@pytest.mark.parametrize("size", [(20, 30), (47, 71), (96, 144)])
def test_a_mask_hides_all_that_it_touches_at_any_size(fit: Any, size: tuple[int, int]) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5], mask[10:22, 17:29] = True, True  # a line one pixel high, and a box
    one, other = np.full((HEIGHT, WIDTH, 3), 100, np.uint8), np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    other[mask] = 220
    hidden = fit(mask, *size)
    assert np.array_equal(fit(one, *size)[~hidden], fit(other, *size)[~hidden])
    assert hidden[:, -4].sum() <= 5 * max(size[0] / HEIGHT, 1)  # the line, and what it touches
    assert not fit(np.zeros_like(mask), *size).any()


def test_painting_around_a_video_keeps_it_in_the_middle(chain: Chain) -> None:
    task = Inpaint(video=chain.file("a.mp4"), fit="inside")
    found = drawn(chain, task, order(None, size=(32, 96)))
    before = own(chain, T2V(), "a.mp4")[:21]
    kept = slice(24 + FEATHER, 24 + WIDTH - FEATHER)
    assert np.array_equal(found.frames[:, :, kept], before[:, :, FEATHER:-FEATHER])
    layout = found.parts[0][0]
    assert layout.known is not None and layout.known[0, 0].tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert "scaled to lie inside 96x32" in found.scene.said[0]


def test_editing_starts_from_the_video_and_a_strength_of_1_does_not(chain: Chain) -> None:
    def edited(strength: float) -> np.ndarray:
        return drawn(chain, Edit(video=chain.file("a.mp4"), strength=strength), order(5)).parts[0][1].numpy()

    base = drawn(chain, Edit(video=chain.file("a.mp4")), order(5)).parts[0][0].base
    assert base is not None
    assert np.abs(edited(0.2) - base.numpy()).mean() < np.abs(edited(1.0) - base.numpy()).mean()


def test_refining_makes_a_video_larger_or_draws_frames_between(chain: Chain) -> None:
    file = chain.file("b, café 三.mp4")
    larger = drawn(chain, Refine(video=file), order(None))
    assert larger.frames.shape == (9, 64, 96, 3)
    finer = drawn(chain, Refine(video=file, scale=1.0, rate=2), order(None))
    layout, frames = finer.parts[0][0], own(chain, T2V(), "b, café 三.mp4")
    assert finer.frames.shape == (21, 32, 48, 3) and finer.scene.fps == 16
    assert layout.fps == 16 and [given.frame for given in layout.before] == list(range(0, 21, 2))
    generate = Generator.load(chain.folder, chain.folder)
    assert all(
        torch.equal(part.latent, generate.encoded([frame]))
        for part, frame in zip(layout.before, frames[:11], strict=True)
    )
    said = Refine(video=file).scene(order(None)).said
    assert "scaled by 2, to 96x64" in said[0] and "the first 9 of 11 frames" in said[0]


def test_a_rate_is_an_integer_fraction_of_the_videos(chain: Chain) -> None:
    found = drawn(chain, Edit(video=chain.file("fast.mp4")), order(None, fps=12.0))
    assert len(found.frames) == 5 and found.scene.fps == 12 and "every 2. of 24 frames a second" in found.scene.said[0]
    with pytest.raises(ConfigError, match="fps=10: task.video has 24 frames a second; use one of 24, 12, 8, 6"):
        Edit(video=chain.file("fast.mp4")).scene(order(None, fps=10.0))
