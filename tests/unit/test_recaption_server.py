"""Promises of engine=openai: each answer to its own clip, and nothing lost whatever a server does."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import data_tiny
import pytest
from chat_server import frames, looking, said
from recaption_job import BAD, PROMPTS, SHAPES, WHOLE, clip_of, job, listed, style_of, telling, texts

from soratrain.captions.openai import OpenAIEngine
from soratrain.data.caption_table import open_captions
from soratrain.errors import ChatError, ConfigError, DataError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips in several shards; a clip's first frame says by its grey which it is."""
    return data_tiny.write_clips(tmp_path_factory.mktemp("shards"), SHAPES, max_bytes=16_000)


def test_greys_tell_all_clips_apart():
    greys = sorted(data_tiny.grey(number, 0) for number in range(len(SHAPES)))
    assert min(after - before for before, after in zip(greys, greys[1:], strict=False)) > 6


def test_answers_in_any_order_stay_with_their_clips(shards, tmp_path):
    chance, order, lock = random.Random(0), [], threading.Lock()

    def late(body):
        number = clip_of(body)
        with lock:
            pause = chance.uniform(0, 0.08)
        time.sleep(pause)
        with lock:
            order.append((number, style_of(body)))
        return telling(body)

    with looking(late) as server:
        figures = job(shards, tmp_path / "out", server.url, concurrency=8, batch_size=5)()
        asked = [(clip_of(body), style_of(body)) for body in server.asked]
        assert 1 < server.busiest <= 8
    assert order != asked  # they did overtake each other
    assert texts(tmp_path / "out") == WHOLE
    assert figures["captions"] == len(WHOLE) and figures["rejected"] == 0


def test_a_request_holds_the_clip_s_frames_and_nothing_of_the_key_is_kept(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    with looking(telling) as server:
        server.key = "sk-secret-123"
        job(shards, tmp_path / "out", server.url, key_env="MY_KEY", max_side=16, extra={"top_p": 0.9})()
        for body in server.asked[1:]:
            number = clip_of(body)
            height, width, count = SHAPES[number]
            shown = frames(body)
            assert len(shown) == (1 if count == 1 else 2)
            assert all(max(frame.shape[:2]) == 16 for frame in shown)
            assert shown[0].shape[0] * width == shown[0].shape[1] * height
            assert shown[-1].mean() == pytest.approx(data_tiny.grey(number, count - 1), abs=3)
            assert body["model"] == "tiny" and body["temperature"] == 0 and body["top_p"] == 0.9
    for file in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        assert b"secret" not in file.read_bytes()


def test_what_is_no_caption_is_counted_by_reason_and_asked_for_again(shards, tmp_path):
    before: Counter[tuple[int, str]] = Counter()
    lock, seeds = threading.Lock(), []

    def once(body):
        number, style = clip_of(body), style_of(body)
        with lock:
            before[number, style] += 1
            again = before[number, style] > 1
            if again:
                seeds.append(body["seed"])
                assert body["temperature"] == 0.7
        return telling(body) if again or style == "short" else BAD.get(number, telling(body))

    with looking(once) as server:
        figures = job(shards, tmp_path / "out", server.url)()
    assert texts(tmp_path / "out") == WHOLE
    reasons = {"empty": 1, "refused": 2, "cut_off": 2, "repeated": 1}
    assert {name: figures[f"rejected_{name}"] for name in reasons} == reasons
    assert figures["rejected"] == len(BAD) == len(set(seeds)) and figures["originals"] == 0
    told = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert {name: told["figures"]["long"][name] for name in reasons} == reasons
    assert not reasons.keys() & told["figures"]["short"].keys()


def test_what_is_never_a_caption_keeps_the_original_and_control_characters_go(shards, tmp_path):
    def script(body):
        bad = clip_of(body) in BAD and style_of(body) == "long"
        return BAD[clip_of(body)] if bad else said(f"A\x00 short\r\nview of\tclip {clip_of(body)}.\x1b")

    with looking(script) as server:
        figures = job(shards, tmp_path / "out", server.url, attempts=1)()
    assert figures["rejected"] == 2 * len(BAD) and figures["originals"] == len(BAD)
    for number in BAD:
        rows = {row["type"]: row for row in open_captions(tmp_path / "out").get(data_tiny.key(number))}
        assert rows["long"]["text"] == f"long original {number}" and rows["long"]["model"] == "original"
        assert rows["short"]["text"] == f"A short view of clip {number}." and rows["short"]["model"] == "tiny"
        assert rows["short"]["lang"] == "en"


def test_what_passes_by_itself_is_only_waited_for(shards, tmp_path):
    troubles = [500, "nonsense", "choiceless", "reset", 429, 503]
    lock, hit = threading.Lock(), set()

    def once(body):
        number = clip_of(body)
        with lock:
            first = 0 <= number < len(troubles) and number not in hit
            hit.add(number)
        return troubles[number] if first else telling(body)

    with looking(once) as server:
        server.retry_after = "0.05"
        figures = job(shards, tmp_path / "out", server.url, retries=3)()
        assert len(server.asked) == 1 + len(WHOLE) + len(troubles)
    assert texts(tmp_path / "out") == WHOLE and figures["rejected"] == 0 and not listed(tmp_path / "out")


@pytest.mark.parametrize("trouble", [500, "nonsense", "choiceless", "reset", 3.0])
def test_what_does_not_pass_costs_nothing_else_and_the_same_command_goes_on(shards, tmp_path, trouble):
    def script(body):
        return trouble if clip_of(body) == 3 and style_of(body) == "long" else telling(body)

    out = tmp_path / "out"
    with looking(script) as server:
        given = {"timeout_s": 0.3 if trouble == 3.0 else 30.0, "retries": 1 if trouble != 3.0 else 0}
        with pytest.raises(DataError) as failed:
            job(shards, out, server.url, **given)()
        assert "1 captions are still to be made" in str(failed.value) and "\n" not in str(failed.value)
        assert str(out / "failures.jsonl") in str(failed.value)
        (failure,) = listed(out)
        assert failure["key"] == data_tiny.key(3) and failure["style"] == "long" and not failure["final"]
        assert failure["reason"].startswith(server.url)
        assert not json.loads((out / "captions.json").read_text())["complete"]
        done = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
        asked = len(server.asked)
        server.script = telling
        figures = job(shards, out, server.url)()
        assert len(server.asked) == asked + 2  # one to see that it is there, one for what was missing
        assert all(path.stat().st_mtime_ns == when for path, when in done.items())
        job(shards, tmp_path / "straight", server.url)()
    assert figures["captions"] == len(WHOLE) and texts(out) == WHOLE and not listed(out)
    for path in out.rglob("part-*"):
        assert path.read_bytes() == (tmp_path / "straight" / path.relative_to(out)).read_bytes()


def test_a_clip_that_a_server_will_never_take_keeps_its_original_and_is_listed(shards, tmp_path):
    def script(body):
        return 400 if clip_of(body) == 3 else telling(body)

    with looking(script) as server:
        figures = job(shards, tmp_path / "out", server.url)()
        assert len(server.asked) == 1 + len(WHOLE)  # asking again would be of no use
    assert figures["rejected_refused"] == figures["originals"] == 2 and figures["captions"] == len(WHOLE)
    assert texts(tmp_path / "out")[3, "long"] == "long original 3"
    assert {(failure["style"], failure["final"]) for failure in listed(tmp_path / "out")} == {
        ("short", True),
        ("long", True),
    }
    assert all("told to answer 400" in failure["reason"] for failure in listed(tmp_path / "out"))


def test_a_server_that_takes_hardly_any_clip_stops_the_job(shards, tmp_path):
    too_many = r"clips of .* cannot be described, more than stage.job.max_bad=0.01.*422"
    with (
        looking(lambda body: telling(body) if clip_of(body) < 0 else 422) as server,
        pytest.raises(DataError, match=too_many),
    ):
        job(shards, tmp_path / "out", server.url, batch_size=4)()
    assert listed(tmp_path / "out")


def test_a_server_that_goes_away_is_not_asked_for_every_clip(shards, tmp_path):
    left = threading.Semaphore(9)

    def script(body):
        return telling(body) if left.acquire(blocking=False) else "reset"

    out = tmp_path / "out"
    with looking(script) as server:
        with pytest.raises(DataError, match=r"captions are still to be made .*the connection broke.*goes on$"):
            job(shards, out, server.url, concurrency=2, batch_size=12, retries=1)()
        asked = [(clip_of(body), style_of(body)) for body in server.asked]
        assert len(set(asked)) < len(WHOLE) / 1.3
        server.script = telling
        before = len(server.asked)
        job(shards, out, server.url)()
        assert len(server.asked) - before == 1 + len(WHOLE) - 8  # eight had been answered, and were kept
    assert texts(out) == WHOLE


def test_a_server_that_is_not_there_is_one_line_with_its_address(shards, tmp_path):
    with looking(telling) as server:
        url = server.url
    with pytest.raises(ChatError) as failed:
        job(shards, tmp_path / "out", url)()
    assert failed.value.alike  # of many ranks one says it
    assert url in str(failed.value) and "start it, or mend the url" in str(failed.value)
    assert "\n" not in str(failed.value) and not (tmp_path / "out").exists()


def test_a_model_that_the_server_does_not_have_is_said_in_its_words(shards, tmp_path):
    said_so = "The model `tinny` does not exist.*did you mean 'tiny'"
    with looking(telling) as server, pytest.raises(ChatError, match=said_so):
        job(shards, tmp_path / "out", server.url, model="tinny")()


def test_a_model_that_takes_no_pictures_is_found_at_the_start(shards, tmp_path):
    with looking(lambda body: 400) as server:
        with pytest.raises(ChatError, match="told to answer 400.*must be one that sees pictures"):
            job(shards, tmp_path / "out", server.url)()
        assert len(server.asked) == 1


def test_a_server_that_takes_fewer_pictures_is_found_at_the_start(shards, tmp_path):
    with looking(lambda body: said("A grey wall.") if len(frames(body)) == 1 else 400) as server:
        with pytest.raises(ChatError, match=r"told to answer 400.*engine.max_frames=2 at once.*engine.max_tokens=300"):
            job(shards, tmp_path / "out", server.url, max_side=64)()
        (body,) = server.asked
        assert [frame.shape for frame in frames(body)] == [(64, 64, 3)] * 2
        assert body["max_tokens"] == 300 and body["seed"] == 0
        job(shards, tmp_path / "out", server.url, max_frames=1)()
    assert not listed(tmp_path / "out")


def test_a_key_that_is_withdrawn_stops_at_once_and_what_is_done_is_kept(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-old")
    count = threading.Semaphore(5)

    def script(body):
        return telling(body) if count.acquire(blocking=False) else 401

    with looking(script) as server:
        server.key = "sk-old"
        with pytest.raises(DataError, match="environment variable OPENAI_API_KEY") as failed:
            job(shards, tmp_path / "out", server.url, concurrency=2)()
        assert len(server.asked) < 14 and "sk-old" not in str(failed.value)
        (rev,) = (tmp_path / "out" / "captions").iterdir()
        assert sum(len(json.loads(line)["rows"]) for line in next(rev.glob(".part*")).read_text().splitlines()) == 4


def test_the_revision_tells_models_and_prompts_apart(shards, tmp_path):
    def rev(model: str, **changes: Any) -> str:
        engine = OpenAIEngine(url="http://localhost:1", model=model, **changes)
        engine.prompts, engine.model = PROMPTS, model
        return engine.identity()

    assert rev("a") == rev("a", concurrency=3, timeout_s=1, retries=0) != rev("b")
    assert rev("a", max_side=64) != rev("a") != rev("a", extra={"top_p": 0.5})
    engine = OpenAIEngine(url="http://localhost:1", model="a")
    engine.prompts = {**PROMPTS, "short": "Say it."}
    assert engine.identity() != rev("a")


@pytest.mark.parametrize(
    "changes",
    [{"url": "nowhere"}, {"concurrency": 0}, {"timeout_s": 0}, {"max_tokens": 0}, {"jpeg_quality": 0}]
    + [{"temperature": 0.0}, {"batch_size": 0}, {"retries": -1}],
)
def test_a_value_out_of_range_is_refused(changes):
    with pytest.raises(ConfigError, match=f"engine.{next(iter(changes))}="):
        OpenAIEngine(**{"url": "http://localhost:8000", **changes})
