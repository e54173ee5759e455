"""Promises of every way to sample: what is given stays, what is drawn joins it, and bad input is one clear line."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from test_dit_stage import write_chain
from tiny_dit import VAE_FACTORY
from torch import Tensor

from soratrain.diffusion.generator import Generator
from soratrain.diffusion.sampler import Sampler
from soratrain.diffusion.ways import Layout
from soratrain.distributed.ranks import Ranks
from soratrain.errors import ConfigError, DataError, UserError
from soratrain.media import write_image, write_video
from soratrain.models import weights
from soratrain.models.autoencoders import stride_at
from soratrain.schema import CONF
from soratrain.stages import sample
from soratrain.stages.sample import Sample
from soratrain.stages.sample_fit import FEATHER, cover, filled, inside, size_near
from soratrain.stages.sample_joined import Connect, Extend, Loop
from soratrain.stages.sample_joints import LEAD, RAMP
from soratrain.stages.sample_redrawn import Edit, Inpaint, Refine
from soratrain.stages.sample_tasks import T2I, T2V, Animate, Order, Scene, Task

HEIGHT, WIDTH, FRAMES = 32, 48, 23


@dataclass(frozen=True)
class Chain:
    """A folder with weights of an untrained chain, and files to start from."""

    folder: Path

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def job(self, task: Task, **kwargs: Any) -> Sample:
        settings: dict[str, Any] = dict(
            out=self.file("out"), vae=self.file("."), dit=self.file("."), task=task, prompt="a cat", area="48x32"
        )
        settings |= {"size": None, "frames": 9, "fps": None, "seed": 0, "sampler": Sampler(steps=2, guidance_scale=2.0)}
        return Sample(**(settings | kwargs))


def clip(frames: int, seed: int) -> np.ndarray:
    """Return a picture that moves by a pixel a frame."""
    blocks = np.random.default_rng(seed).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3)).astype(np.uint8)
    picture = blocks.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture, shift, 1) for shift in range(frames)])


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    write_chain(folder)
    write_video(folder / "a.mp4", clip(FRAMES, 0), 8)
    write_video(folder / "b, café 三.mp4", clip(11, 1), 8)
    write_video(folder / "fast.mp4", clip(11, 1), 24)
    write_image(folder / "picture.png", np.repeat(clip(1, 2)[0], 2, axis=0))
    mask = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    mask[:, :14] = 255
    write_image(folder / "mask.png", mask)
    write_image(folder / "mask2.png", mask.repeat(2, 0).repeat(2, 1))
    write_image(folder / "black.png", 0 * mask)
    write_image(folder / "tall.png", mask.swapaxes(0, 1))
    write_video(folder / "masks.mp4", np.stack([mask] * 7), 8)
    (folder / "broken.png").write_bytes((folder / "picture.png").read_bytes()[:60])
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").write_bytes(b"")
    with av.open(str(folder / "sound.m4a"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000)
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        noise.rate = 8000
        container.mux([*sound.encode(noise), *sound.encode(None)])
    return Chain(folder)


def order(frames: int | None = 9, size: tuple[int, int] | None = None, fps: float | None = None) -> Order:
    return Order(size, frames, fps, HEIGHT * WIDTH)


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

    if scene.rolls:
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


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (lambda c: Animate(), {"fps": 8.0}, "task.image is not set: give a picture, task.image=FILE"),
    (lambda c: Animate(image="nowhere.png"), {"fps": 8.0}, "task.image=nowhere.png: does not exist"),
    (lambda c: Animate(image=c.file("broken.png")), {"fps": 8.0}, "broken.png: .*give a picture that can be opened"),
    (lambda c: Animate(image=c.file("picture.png")), {"fps": 8.0, "frames": 1}, "frames=1: the picture is the first"),
    (lambda c: Animate(image=c.file("picture.png")), {}, "fps is not set: task=animate takes it off no input"),
    (lambda c: Extend(video=c.file("text.mp4")), {}, "text.mp4: not a video or image that FFmpeg can read"),
    (lambda c: Extend(video=c.file("empty.mp4")), {}, "empty.mp4: the file is empty"),
    (lambda c: Extend(video=c.file("sound.m4a")), {}, "sound.m4a: has no video stream"),
    (lambda c: Extend(video=c.file(".")), {}, "task.video=.*: is a folder"),
    (lambda c: Extend(video=c.file("a.mp4"), by=0), {}, "task.by=0: must be at least 1"),
    (lambda c: Extend(video=c.file("a.mp4"), context=4), {}, "task.context=4 is not 1 . a multiple of 4; use 1 or 5"),
    (lambda c: Extend(video=c.file("a.mp4"), context=9), {}, "task.context=9: leaves nothing to draw.*use 5"),
    (lambda c: Extend(video=c.file("a.mp4")), {"frames": 1}, "frames=1: are those of a window of task=extend"),
    (lambda c: Extend(video=c.file("a.mp4")), {"frames": 10}, "frames=10 is not .*the nearest are 9 and 13"),
    (lambda c: Extend(video=c.file("a.mp4")), {"size": "40x32"}, "width 40 is no multiple of 16.*32 and 48"),
    (lambda c: Connect(video=c.file("a.mp4")), {}, "task.video2 is not set"),
    (lambda c: Loop(video=c.file("a.mp4"), video2="b.mp4"), {}, "task.video2=b.mp4: task=loop takes one video"),
    (lambda c: Inpaint(video=c.file("a.mp4")), {}, "task.mask is not set"),
    (lambda c: Inpaint(video=c.file("a.mp4"), mask=c.file("black.png")), {}, "task.mask=.*: no white in it"),
    (lambda c: Inpaint(video=c.file("a.mp4"), mask=c.file("tall.png")), {}, "is 32x48, the video 48x32; .*aspect"),
    (lambda c: Inpaint(video=c.file("a.mp4"), mask=c.file("masks.mp4")), {}, "has 7 frames, the video 23"),
    (lambda c: Inpaint(video=c.file("a.mp4"), fit="inside"), {}, "task.fit=inside: the video fills all of the size"),
    (lambda c: Edit(video=c.file("a.mp4"), strength=0.0), {}, r"task.strength=0 must lie in \(0, 1\]"),
    (
        lambda c: Refine(video=c.file("a.mp4"), scale=0.5),
        {},
        "task.scale=0.5 .*numbers of at least 1",
    ),
    (lambda c: Refine(video=c.file("a.mp4"), scale=1.0), {}, "nothing is refined"),
    (lambda c: Refine(video=c.file("picture.png"), scale=1.0, rate=2), {}, "more are needed"),
    (lambda c: T2I(), {"size": "48x32", "fps": 8.0}, "frames=9: task=t2i draws one"),
    (lambda c: T2V(), {"fps": 8.0}, "size is not set"),
    (lambda c: T2V(), {"size": "48x32", "fps": 0.0}, "fps=0 must lie between 0.1 and 1000"),
    (lambda c: T2V(), {"size": "48x32", "fps": 1e9}, "fps=1e.09 must lie between 0.1 and 1000"),
    (lambda c: Refine(video=c.file("a.mp4"), scale=1.0, rate=1000), {"frames": None}, "fps=8000 must lie between"),
    (lambda c: Refine(video=c.file("a.mp4"), scale=float("inf")), {}, "task.scale=inf .*numbers of at least 1"),
    (lambda c: Refine(video=c.file("a.mp4"), scale=1.01), {}, "scale=1.01 and task.rate=1 come to 48x32.*nothing is"),
    (
        lambda c: Refine(video=c.file("a.mp4")),
        {"size": "32x16"},
        "size=32x16: .*has 48x32.*a larger size, or use task=",
    ),
    (lambda c: Edit(video=c.file("a.mp4")), {"frames": 0}, "frames=0 must be at least 1"),
    (lambda c: T2V(), {"size": "48x32", "fps": 8.0, "samples": 0}, "samples=0 must be at least 1"),
    (
        lambda c: T2V(),
        {"size": "48x32", "fps": 8.0, "prompts_file": "nowhere.txt"},
        "prompts_file=nowhere.txt: No such",
    ),
]


@pytest.mark.parametrize(("task", "settings", "said"), BAD)
def test_bad_input_is_one_line_before_a_net_is_read(
    chain: Chain, task: Any, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        chain.job(task(chain), vae="nowhere", dit="nowhere", **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "given"),
    [
        (lambda c: Edit(video=c.file("a.mp4")), False),
        (lambda c: Refine(video=c.file("a.mp4"), scale=2.0), False),
        (lambda c: Refine(video=c.file("a.mp4"), scale=1.0, rate=2), True),
        (lambda c: Animate(image=c.file("picture.png")), True),
    ],
)
def test_only_ways_that_give_parts_ask_for_a_net_that_has_been_given_some(
    chain: Chain, caplog: pytest.LogCaptureFixture, task: Any, given: bool
) -> None:
    def net(patch: tuple[int, int, int]) -> Any:
        nothing = {"prefix": 0.0, "suffix": 0.0, "connect": 0.0, "inpaint": 0.0, "rollout": 0.0}
        return SimpleNamespace(dit=SimpleNamespace(patch=patch), mix=nothing, vae=SimpleNamespace(stride=(4, 8, 8)))

    scene = task(chain).scene(order(13, fps=8.0 if type(task(chain)) is Animate else None))
    scene.check(net((1, 2, 2)))
    assert ("has never been given" in caplog.text) == given
    with pytest.raises(ConfigError, match="holds 2 latents, of which some") if given else nullcontext():
        scene.check(net((2, 2, 2)))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x",', "is not JSON .*at letter 16"),
        ("[" * 100_000, "is not JSON"),
        ('{"prompt": "x", "size": "50x32"}', "size=50x32: width 50"),
        ('{"prompt": "x", "seed": -1}', "seed=-1 must lie between"),
        ('{"prompt": "x", "fps": NaN}', "fps=nan: must be a number"),
        ('{"prompt": "x", "fps": Infinity}', "fps=inf must lie between"),
        ('{"prompt": "  "}', "prompt is empty"),
    ],
)
def test_what_is_wrong_in_a_file_of_prompts_is_said_with_its_line(chain: Chain, line: str, said: str) -> None:
    file = chain.folder / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=f"prompts.jsonl: line 3:? {said}"):
        chain.job(T2V(), prompts_file=str(file), size="48x32", fps=8.0)


def test_every_option_that_is_noted_is_a_key_of_the_tasks_group() -> None:
    for task in (T2V, T2I, Animate, Extend, Connect, Loop, Inpaint, Edit, Refine):
        keys = yaml.safe_load((CONF / "task" / f"{task.name}.yaml").read_text())
        keys = keys.get("task", keys)
        assert set(task().options()) <= set(keys), task.name


def test_a_line_of_prompts_ends_at_a_newline_and_nowhere_else(chain: Chain) -> None:
    texts = ["one\u2028two", "three\x85four", "five\x0csix"]
    for name, lines in (("a.txt", texts), ("a.jsonl", [json.dumps({"prompt": t}, ensure_ascii=False) for t in texts])):
        (chain.folder / name).write_bytes("\r\n".join(lines).encode())
        job = chain.job(T2V(), prompts_file=chain.file(name), size="48x32", fps=8.0)
        assert [item.prompt for item in job.items] == texts


def test_more_tokens_than_memory_are_refused_with_the_largest_size_that_fits(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "available", lambda device: 100_000)
    with pytest.raises(ConfigError, match="size=960x640: 7,200 tokens at once take about 9.67 MiB.*about 80x48"):
        chain.job(T2V(), size="960x640", fps=8.0)()
    seen: list[int] = []
    draw = Generator.draw
    monkeypatch.setattr(
        Generator, "draw", lambda self, layouts, *a, **k: seen.append(len(layouts)) or draw(self, layouts, *a, **k)
    )
    chain.job(T2V(), size="48x32", fps=8.0, samples=5, out=chain.file("few"))()
    assert seen == [3, 2]


def test_the_job_draws_from_the_strength_that_was_asked_for(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, draw = list[float](), Generator.draw
    monkeypatch.setattr(Generator, "draw", lambda *a, **k: seen.append(k["strength"]) or draw(*a, **k))
    for strength in (0.3, 0.8):
        chain.job(Edit(video=chain.file("a.mp4"), strength=strength), out=chain.file("strengths"))()
    assert seen == [0.3, 0.8]


@pytest.mark.parametrize(("mix", "warned"), [({"suffix": 0.2}, True), ({"prefix": 0.2}, False), (None, False)])
def test_a_way_that_a_net_has_not_learned_is_warned_of(
    chain: Chain, caplog: pytest.LogCaptureFixture, mix: dict[str, float] | None, warned: bool
) -> None:
    generate = Generator.load(chain.folder, chain.folder)
    generate.mix = mix
    with caplog.at_level(logging.WARNING):
        Extend(video=chain.file("a.mp4")).scene(order()).check(generate)
        Edit(video=chain.file("a.mp4")).scene(order(None)).check(generate)
    assert ["conditioning.mix.prefix=0" in record.message for record in caplog.records] == [True] * warned


def test_samples_of_a_prompt_have_seeds_of_their_own_and_only_what_is_missing_is_drawn(
    chain: Chain, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = {"size": "48x32", "fps": 8.0, "out": chain.file("seeds")}
    result = chain.job(T2V(), samples=3, seed=7, **settings)()
    notes = [json.loads(Path(file).with_suffix(".json").read_text()) for file in result["files"]]
    assert [note["seed"] for note in notes] == [7, 8, 9] and result["drawn"] == 3
    assert chain.job(T2V(), samples=1, seed=8, **settings)()["drawn"] == 0 and "all 1 samples are in" in caplog.text
    before = Path(result["files"][1]).read_bytes()
    Path(result["files"][1]).unlink()
    assert chain.job(T2V(), samples=4, seed=7, **settings)()["drawn"] == 2 and "2 of the 4 samples" in caplog.text
    assert Path(result["files"][1]).read_bytes() == before


def test_processes_share_the_batches_and_write_the_same_files(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    def files(out: str, ranks: int) -> dict[str, bytes]:
        for rank in range(ranks):
            found = Ranks(rank, 1)
            found.size = ranks
            monkeypatch.setattr(Ranks, "joined", classmethod(lambda cls, found=found: Joined(found)))
            monkeypatch.setattr(Ranks, "together", lambda self, work: [work()])
            job = chain.job(T2V(), size="48x32", fps=8.0, samples=4, batch=2, out=chain.file(out))
            monkeypatch.setattr(sample, "is_there", lambda path, notes: False)
            job()
            monkeypatch.undo()
        return {path.name: path.read_bytes() for path in sorted((chain.folder / out / "samples").iterdir())}

    alone = files("alone", 1)
    assert files("shared", 2) == alone and len(alone) == 12


@dataclass
class Joined:
    """Ranks that have met already."""

    ranks: Ranks

    def __enter__(self) -> Ranks:
        return self.ranks

    def __exit__(self, *_: object) -> None:
        return None


def test_prompts_come_from_a_file_each_with_what_it_overrides(chain: Chain) -> None:
    text = chain.folder / "prompts.txt"
    text.write_text('a cat, "said" (he)\n\n三只猫\n', encoding="utf-8")
    job = chain.job(T2V(), size="48x32", fps=8.0, prompts_file=str(text), samples=2)
    assert [(item.prompt, item.seed) for item in job.items] == [
        ('a cat, "said" (he)', 0), ('a cat, "said" (he)', 1), ("三只猫", 0), ("三只猫", 1)
    ]  # fmt: skip
    rows = [
        {"prompt": "one", "seed": 5, "size": "32x32"},
        {"prompt": "two", "samples": 2, "frames": 5, "image": chain.file("picture.png")},
    ]
    lines = chain.folder / "prompts.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    job = chain.job(Animate(image=chain.file("mask.png")), fps=8.0, prompts_file=str(lines))
    assert [(item.seed, item.notes["size"], item.notes["frames"]) for item in job.items] == [
        (5, "32x32", 9), (0, "32x48", 5), (1, "32x48", 5)
    ]  # fmt: skip
    assert [Path(item.notes["inputs"]["task.image"]["path"]).name for item in job.items] == ["mask.png"] + [
        "picture.png"
    ] * 2
    for row, said in (
        ({"prompt": "x", "imgae": "y"}, "line 1: imgae: no such key of task=animate; did you mean 'image'"),
        ({"prompt": "x", "seed": "y"}, "seed='y': must be a whole number"),
        ({"seed": 1}, "write an object with a text as its prompt"),
    ):
        lines.write_text(json.dumps(row))
        with pytest.raises(ConfigError, match=said):
            chain.job(Animate(), fps=8.0, prompts_file=str(lines))
    lines.write_text("{")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        chain.job(Animate(), fps=8.0, prompts_file=str(lines))


def test_the_notes_tell_inputs_by_their_content(chain: Chain, caplog: pytest.LogCaptureFixture) -> None:
    task = Extend(video=chain.file("a.mp4"), by=4)
    with caplog.at_level(logging.INFO):
        (file,) = chain.job(task, out=chain.file("notes"))()["files"]
    assert any(
        "a.mp4: 23 frames at 8 a second; 4 frames are drawn forwards" in record.message for record in caplog.records
    )
    notes = json.loads(Path(file).with_suffix(".json").read_text())
    assert notes["task"] == "extend" and notes["frames"] == 27 and notes["fps"] == 8.0
    assert notes["options"] == {"by": 4, "direction": "forwards", "context": None, "window": 9}
    assert len(notes["inputs"]["task.video"]["blake2b"]) == 32 and "torch" in notes["versions"]
    copy = chain.folder / "copy.mp4"
    copy.write_bytes(Path(chain.file("a.mp4")).read_bytes())
    assert chain.job(Extend(video=str(copy), by=4), out=chain.file("notes"))()["drawn"] == 0
    with av.open(file) as container:
        assert container.streams.video[0].average_rate == 8


def test_a_sample_that_fails_midway_leaves_nothing(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Generator.decode_stream

    def failing(self: Generator, latents: Any) -> Any:
        for number, frame in enumerate(decode(self, latents)):
            if number == 12:
                raise DataError("the disk is gone")
            yield frame

    monkeypatch.setattr(Generator, "decode_stream", failing)
    with pytest.raises(DataError, match="the disk is gone"):
        chain.job(Extend(video=chain.file("a.mp4")), out=chain.file("failed"))()
    assert not list((chain.folder / "failed").rglob("*.*"))


def test_pictures_are_scaled_to_cover_and_never_stretched() -> None:
    rows = np.arange(40, dtype=np.uint8)[:, None, None].repeat(20, 1).repeat(3, 2)
    assert np.array_equal(cover(rows, 20, 20), rows[10:30])
    assert cover(rows, 16, 32).shape == (16, 32, 3) and cover(rows, 80, 16).shape == (80, 16, 3)
    framed = inside(rows, 40, 40)
    assert np.array_equal(framed[:, 10:30], rows) and not framed[:, :10].any()
    assert size_near(1080, 1920, 480 * 832, (16, 16), grow=True) == (480, 848)
    assert size_near(100, 200, 480 * 832, (16, 16), grow=False) == (96, 192)
    assert size_near(10, 4000, 48 * 48, (16, 16), grow=True) == (16, 960)
