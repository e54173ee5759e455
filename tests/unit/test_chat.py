"""The client of a server of language models: what it asks again, what it says, and whose reply is whose."""

from __future__ import annotations

import itertools
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from chat_server import ChatHost, chatting

from soratrain.chat import ChatRequest, ChatServer, Reply
from soratrain.errors import ChatError, ConfigError

FAST = {"timeout_s": 0.3, "retries": 3, "backoff_s": 0.01}


@pytest.fixture
def host() -> Iterator[ChatHost]:
    with chatting() as server:
        yield server


def client(host: ChatHost, **options: object) -> ChatServer:
    return ChatServer(host.url, "tiny", **{**FAST, **options})


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_reply_and_the_request_are_what_the_protocol_says(host: ChatHost) -> None:
    found = client(host, extra={"top_p": 0.9, "temperature": None}).complete(
        says("三只猫 “café”"), seed=2**40 + 7, max_tokens=9, temperature=0.5
    )
    assert found == Reply("三只猫 “café”", "stop")
    asked = {"model": "tiny", "messages": says("三只猫 “café”"), "seed": 7, "max_tokens": 9, "top_p": 0.9}
    assert host.asked == [asked]


def test_pictures_pass_through_as_they_are(host: ChatHost) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "what is it?"}]}]
    assert client(host).complete(messages).text == "what is it?"
    assert host.asked[0]["messages"] == messages


@pytest.mark.parametrize(
    "fault",
    [500, 503, 429, 408, 1.0, "reset", "half", "nonsense", "choiceless", "drip", {"error": "busy"}, {}],
    ids=str,
)
def test_what_may_pass_is_asked_again(host: ChatHost, fault: object) -> None:
    host.faults = [fault, fault]  # type: ignore[list-item]
    assert client(host).complete(says("hello")).text == "hello"
    assert len(host.asked) == 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (500, "answers 500 (told to answer 500), 4 times"),
        (5.0, "has not answered within 0.05 s, 4 times"),
        ("reset", "the connection broke"),
        ("nonsense", "no reply of a model (It works!), 4 times"),
    ],
)
def test_what_does_not_pass_is_told_in_a_line(host: ChatHost, fault: object, said: str) -> None:
    host.always = fault  # type: ignore[assignment]
    with pytest.raises(ChatError) as told:
        client(host, timeout_s=0.05).complete(says("hello"))
    assert said in str(told.value) and host.url in str(told.value) and "\n" not in str(told.value)
    assert told.value.again and len(host.asked) == 4


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_refusal_is_not_asked_again_and_said_in_the_servers_words(host: ChatHost, status: int) -> None:
    host.always = status
    with pytest.raises(ChatError, match=f"answers {status} .told to answer {status}") as told:
        client(host).complete(says("hello"))
    assert told.value.status == status and not told.value.again and len(host.asked) == 1


def test_waits_double_and_a_server_that_asks_to_wait_is_heeded_by_all_requests(host: ChatHost) -> None:
    host.faults = [500, 500]
    client(host, backoff_s=0.1).complete(says("hello"))
    first, second = (after - before for before, after in itertools.pairwise(host.times))
    assert 0.05 <= first < 0.15 and 0.1 <= second < 0.25
    host.times.clear()
    host.faults, host.retry_after = [429], "0.3"
    server = client(host, concurrency=1)
    began = time.monotonic()
    threading.Timer(0.1, lambda: server.complete(says("other"))).start()
    assert server.complete(says("hello")).text == "hello"
    while len(host.times) < 3:
        time.sleep(0.01)
    assert min(host.times[1:]) - began >= 0.3


def test_a_server_that_asks_to_wait_for_an_hour_is_not_waited_for(host: ChatHost) -> None:
    host.always, host.retry_after = 503, "3600"
    with pytest.raises(ChatError, match="asks to wait 3600 s"):
        client(host).complete(says("hello"))
    assert len(host.asked) == 1


def test_each_reply_is_its_own_requests_in_whatever_order_they_come(host: ChatHost) -> None:
    draw = random.Random(0)
    late = {f"clip {place}": draw.random() * 0.04 for place in range(60)}
    host.delay = lambda body: late[body["messages"][-1]["content"]]
    host.faults = [500, 0.5, "reset", "nonsense", "half"] * 2
    requests = (ChatRequest(says(text), seed=place) for place, text in enumerate(late))
    found = list(client(host, concurrency=16, retries=6).complete_all(requests))
    assert [place for place, _ in found] != sorted(place for place, _ in found)  # they did come shuffled
    assert {place: reply.text for place, reply in found} == dict(enumerate(late))  # type: ignore[union-attr]
    assert 8 < host.busiest <= 16 + 2  # two at which nobody listens any longer


def test_one_refused_request_leaves_the_others(host: ChatHost) -> None:
    host.faults = [400]
    found = dict(client(host, concurrency=1).complete_all(ChatRequest(says(str(place))) for place in range(3)))
    assert isinstance(found[0], ChatError) and found[1] == Reply("1", "stop") and found[2] == Reply("2", "stop")


def test_requests_are_taken_as_they_are_needed_and_an_error_of_theirs_comes_out(host: ChatHost) -> None:
    taken: list[int] = []

    def endless() -> Iterator[ChatRequest]:
        for place in itertools.count():
            if place == 20:
                raise ValueError("clip 20 cannot be read")
            taken.append(place)
            yield ChatRequest(says(str(place)))

    replies = client(host, concurrency=2).complete_all(endless())
    next(replies)
    assert len(taken) == 4
    with pytest.raises(ValueError, match="clip 20"):
        list(replies)


def test_leaving_early_waits_for_nothing(host: ChatHost) -> None:
    host.faults = [0.0]
    host.always = 500
    began = time.monotonic()
    for _ in client(host, concurrency=2, backoff_s=30).complete_all(ChatRequest(says(str(i))) for i in range(9)):
        break
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("message", "reply"),
    [
        ({"content": None}, Reply("", "stop")),
        ({"content": None, "refusal": "I cannot"}, Reply("", "refusal")),
        ({"content": [{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}]}, Reply("a cat", "stop")),
        ({"content": "<think>a dog? no</think>\n\na cat"}, Reply("a cat", "stop")),
        ({"content": "<think>a dog? or"}, Reply("", "stop")),
        ({"content": "half \ud83d a letter"}, Reply("half ? a letter", "stop")),
    ],
)
def test_every_form_of_a_reply_is_read(host: ChatHost, message: dict, reply: Reply) -> None:
    host.faults = [{"choices": [{"message": message, "finish_reason": "stop"}]}]
    assert client(host).complete(says("hello")) == reply


def test_the_key_is_sent_and_never_said(
    host: ChatHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host.key = "sk-right"
    monkeypatch.setenv("MY_KEY", "sk-right\n")
    assert client(host, key_env="MY_KEY").complete(says("hello")).text == "hello"
    monkeypatch.setenv("MY_KEY", "sk-wrong")
    with caplog.at_level(logging.DEBUG), pytest.raises(ChatError, match="answers 401.*variable MY_KEY") as told:
        client(host, key_env="MY_KEY").check()
    assert "sk-wrong" not in str(told.value) + caplog.text
    assert "***" in str(told.value)  # the server did say it


def test_a_check_knows_the_model(host: ChatHost) -> None:
    assert client(host).check() == "tiny" and not host.asked
    assert ChatServer(host.url, **FAST).check() == "tiny"  # the only one
    host.models = ["qwen", "llama"]
    with pytest.raises(ChatError, match="qwen, llama; say which"):
        ChatServer(host.url, **FAST).check()
    with pytest.raises(ChatError, match="`qwne` does not exist.*no model 'qwne'; did you mean 'qwen'.*qwen, llama"):
        ChatServer(host.url, "qwne", **FAST).check()


def test_a_check_asks_a_model_that_is_not_listed(host: ChatHost) -> None:
    host.only = False  # as llama.cpp and transformers serve do
    assert ChatServer(host.url, "any", **FAST).check() == "any" and host.asked[0]["max_tokens"] == 1
    host.models = None
    assert ChatServer(host.url, "any", **FAST).check() == "any"


def test_an_absent_server_is_one_line_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ChatError, match=f"{url}/v1: there is no server .*refused.*; start it, or mend the url"):
            ChatServer(url, "tiny", backoff_s=10).check()
    assert time.monotonic() - began < 1


def test_a_redirection_is_told_and_not_followed(host: ChatHost) -> None:
    host.always = 307
    with pytest.raises(ChatError, match="answers 307.*its address may now be"):
        client(host).complete(says("hello"))


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://gpu7:8000", "http://gpu7:8000/v1"),
        ("http://gpu7:8000/", "http://gpu7:8000/v1"),
        ("https://api.example.com/v1/", "https://api.example.com/v1"),
        ("https://api.example.com/beta/openai", "https://api.example.com/beta/openai"),
        ("http://[::1]:8000/v1/chat/completions", "http://[::1]:8000/v1"),
    ],
)
def test_addresses_are_read_as_people_write_them(url: str, base: str) -> None:
    assert ChatServer(url, "tiny").url == base


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a", "http://", "http://a:b", "http://a b", "http://k:s@a"]
)
def test_what_is_no_address_is_refused_without_saying_a_password(url: str) -> None:
    with pytest.raises(ConfigError) as told:
        ChatServer(url, "tiny")
    assert "k:s" not in str(told.value)


def test_values_that_cannot_work_are_refused() -> None:
    for name, value in (("retries", -1), ("concurrency", 0), ("timeout_s", 0), ("backoff_s", -1)):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            ChatServer("http://a", "tiny", **{name: value})  # type: ignore[arg-type]
