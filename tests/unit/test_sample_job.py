"""Promises of stage=sample: bad input is one clear line, prompts have seeds of their own, processes share the work."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import yaml
from sample_chain import Chain, order, write_files

from soratrain.diffusion.generator import Generator
from soratrain.distributed.ranks import Ranks
from soratrain.errors import ConfigError, DataError, UserError
from soratrain.schema import CONF
from soratrain.stages import sample
from soratrain.stages.sample_fit import cover, inside, size_near
from soratrain.stages.sample_joined import Connect, Extend, Loop
from soratrain.stages.sample_redrawn import Edit, Inpaint, Refine
from soratrain.stages.sample_tasks import T2I, T2V, Animate


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return write_files(tmp_path_factory.mktemp("chain"))


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
