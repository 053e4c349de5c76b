"""`panollava serve` answers OpenAI's client as the model does, and survives whatever it is sent."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import numpy as np
import openai
import psutil
import pytest
import torch
from PIL import ExifTags, Image

from helpers import ROOT, running
from panollava import PanoLLaVA
from panollava.cli import main as cli
from panollava.data.dialogue import Dialogue
from panollava.model.generate import GREEDY, Answer, Sampling
from panollava.serving.answer_queue import MAX_WAITING, AnswerQueue, Panorama, Pending
from panollava.serving.requests import Question, RequestError
from panollava.serving.server import Limits, bind, make_server

QUESTIONS = ["what", "where is the red box", "the green ball", "what is behind"]
LIMITS = Limits(max_new_tokens=8, batch_size=16, max_bytes=1 << 20, max_pixels=1 << 20)


@pytest.fixture(scope="module")
def model(shared_project: Path) -> PanoLLaVA:
    return PanoLLaVA.from_pretrained(shared_project / "runs/vlm_finetune", accelerator="cpu")


@pytest.fixture(scope="module")
def url(model: PanoLLaVA) -> Iterator[str]:
    with serving(model) as url:
        yield url


@contextlib.contextmanager
def serving(model: PanoLLaVA) -> Iterator[str]:
    """A server in a thread."""
    server = make_server(model, "panollava", ["pano.example"], LIMITS)
    with running(server) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def pictures(small_data: Path) -> list[Path]:
    return sorted((small_data / "images").glob("test_*.jpg"))


def as_url(picture: Path | bytes, kind: str = "image/jpeg") -> str:
    content = picture if isinstance(picture, bytes) else picture.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def user(text: str, picture: Path | bytes | None = None) -> Any:
    parts: list[Any] = [{"type": "text", "text": text}]
    if picture:
        parts.insert(0, {"type": "image_url", "image_url": {"url": as_url(picture)}})
    return {"role": "user", "content": parts}


def ask(client: openai.OpenAI, text: str, picture: Path | bytes, **options: Any) -> Any:
    return client.chat.completions.create(
        model="panollava", messages=[user(text, picture)], **options
    )


def text_of(completion: Any) -> str:
    return completion.choices[0].message.content


def streamed(chunks: Any) -> list[str]:
    return [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]


def test_the_client_gets_the_answers_of_the_model(
    client: openai.OpenAI, model: PanoLLaVA, pictures: list[Path]
) -> None:
    assert [each.id for each in client.models.list()] == ["panollava"]
    assert client.models.retrieve("panollava").owned_by == "panollava"
    for picture in pictures:
        answers = [ask(client, text, picture, max_tokens=12) for text in QUESTIONS]
        assert [*map(text_of, answers)] == model.answer(picture, QUESTIONS, 12)
    (answer,) = model.answer_features(model.features([picture]), [["what"]], 8)[0]
    completion = ask(client, "what", picture)
    assert completion.choices[0].finish_reason == ("length" if answer.cut else "stop")
    assert completion.usage.completion_tokens <= 8
    prompt = model.prefix_tokens + len(model.dialogue.query("what"))
    assert completion.usage.prompt_tokens == prompt
    # In a conversation, the last message is the question, and the picture may be in the first.
    turns = [user("where", picture), {"role": "assistant", "content": "left"}, user("what")]
    again = client.chat.completions.create(model="panollava", messages=turns)
    assert text_of(again) == text_of(completion) == answer.text
    two_parts = [user("what", picture)["content"][0], *user("what")["content"] * 2]
    joined = client.chat.completions.create(
        model="panollava", messages=[{"role": "user", "content": two_parts}]
    )
    assert [text_of(joined)] == model.answer(picture, ["what\nwhat"], 8)


def test_the_page_s_code_asks_the_server(url: str, model: PanoLLaVA, pictures: list[Path]) -> None:
    page = (ROOT / "docs/use.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n([^`]*base_url[^`]*)^```$", page, re.M)
    for old, new in (
        ("http://127.0.0.1:8000", url),
        ("data/demo/images/test_0000.jpg", str(pictures[0])),
    ):
        assert old in block
        block = block.replace(old, new)
    code, _, last = block.rstrip().rpartition("\n")
    names: dict[str, Any] = {}
    exec(code, names)
    assert eval(last, names) == model.answer(pictures[0], ["what is behind?"], 8)[0]


def test_answers_end_with_stop_or_length(
    client: openai.OpenAI,
    model: PanoLLaVA,
    pictures: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As OpenAI names them; a random seed for each request without one."""
    monkeypatch.setattr(model.dialogue, "ends", frozenset(range(0, 1000, 6)))  # end soon
    options: dict[str, Any] = {"temperature": 2.0, "max_completion_tokens": 4}
    features = model.features(pictures[:1])
    (answers,) = model.answer_features(features, [["what"] * 20], 4, Sampling(2.0))
    for cut, reason in ((True, "length"), (False, "stop")):
        seed = next(seed for seed, answer in enumerate(answers) if answer.cut == cut)
        completion = ask(client, "what", pictures[0], seed=seed, **options)
        assert text_of(completion) == answers[seed].text
        assert completion.choices[0].finish_reason == reason
        assert (completion.usage.completion_tokens == 4) == cut
    assert len({text_of(ask(client, "what", pictures[0], **options)) for _ in range(12)}) > 1


def test_streamed_words_are_those_of_the_answer(
    client: openai.OpenAI,
    model: PanoLLaVA,
    pictures: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Dialogue, "decode", lambda self, tokens: " ".join(map(str, tokens)))
    monkeypatch.setattr(Dialogue, "whole_characters", lambda self, tokens: tokens)
    for seed, question in enumerate(QUESTIONS):
        options: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "seed": seed}
        whole = ask(client, question, pictures[1], **options)
        with_usage: Any = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = [*ask(client, question, pictures[1], **options, **with_usage)]
        words = [word for word in streamed(chunks) if word]
        assert "".join(words) == text_of(whole)
        assert [text_of(whole)] == model.answer(
            pictures[1], [question], 8, Sampling(1.5, 0.9, seed)
        )
        assert len(words) == len(text_of(whole).split())
        assert chunks[-1].usage == whole.usage
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


@pytest.mark.parametrize("clients", [1, 8])
def test_each_of_200_questions_gets_its_answer(
    url: str,
    model: PanoLLaVA,
    pictures: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    clients: int,
) -> None:
    """With memory that does not grow, and panoramas that are encoded once."""
    batches: list[int] = []
    answer_features, features_of_views = model.answer_features, model.features_of_views
    encoded: list[int] = []

    def recorded(features: Any, queries: list[list[str]], *arguments: Any) -> Any:
        batches.append(sum(map(len, queries)))
        return answer_features(features, queries, *arguments)

    def encode(views: Any) -> Any:
        encoded.append(len(views))
        return features_of_views(views)

    def one(index: int) -> str:
        picture, question = pictures[index % 3], f"{QUESTIONS[index % 4]} {index}"
        options: dict[str, Any] = {"temperature": 2.0, "seed": index} if index % 5 else {}
        if index % 2:
            return "".join(streamed(ask(own_client, question, picture, stream=True, **options)))
        return text_of(ask(own_client, question, picture, **options))

    own_client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    expected: list[str] = []
    for index in range(200):
        sampling = Sampling(2.0, 1.0, index) if index % 5 else GREEDY
        question = f"{QUESTIONS[index % 4]} {index}"
        expected += model.answer(pictures[index % 3], [question], 8, sampling)
    assert len({*expected}) > 100
    with own_client, ThreadPoolExecutor(clients) as pool:
        for _ in pool.map(one, range(40)):
            pass
        process = psutil.Process()
        before = process.memory_info().rss
        with monkeypatch.context() as patch:
            patch.setattr(model, "answer_features", recorded)
            patch.setattr(model, "features_of_views", encode)
            assert [*pool.map(one, range(200))] == expected
        assert process.memory_info().rss - before < 50e6
    assert sum(batches) == 200 and not encoded
    assert (len(batches) == 200) if clients == 1 else (max(batches) > 1)


def test_who_hangs_up_frees_the_place(
    url: str, model: PanoLLaVA, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While waiting, while being answered, and while being answered with others."""
    started, go_on = threading.Event(), threading.Event()
    answer_features = model.answer_features
    asked: list[list[list[str]]] = []
    answers: list[Any] = []

    def held(features: Any, queries: list[list[str]], *arguments: Any) -> Any:
        asked.append(queries)
        *others, report = arguments

        def report_later(index: int, tokens: list[int]) -> Any:
            if len(tokens) == 3 and len(asked) == 1:
                started.set()
                assert go_on.wait(30)
            return report(index, tokens)

        answers.append(answer_features(features, queries, *others, report_later))
        return answers[-1]

    monkeypatch.setattr(model, "answer_features", held)
    monkeypatch.setattr(model.dialogue, "ends", frozenset())  # answers do not end
    body = {"model": "panollava", "max_tokens": 1000, "temperature": 2.0, "top_p": 1, "seed": 1}
    with contextlib.ExitStack() as stack:
        for stream, text in ((True, "first"), (False, "second")):
            request = {**body, "messages": [user(text, pictures[0])], "stream": stream}
            stack.enter_context(hanging_request(url, request))
            if text == "first":
                assert started.wait(30)
    time.sleep(1)  # for the server to notice
    go_on.set()
    request = {**body, "messages": [user("third", pictures[0])], "max_tokens": 4}
    start = time.monotonic()
    assert httpx.post(f"{url}/v1/chat/completions", json=request, timeout=60).status_code == 200
    assert time.monotonic() - start < 20
    assert asked == [[["first"]], [["third"]]]
    assert not answers[0][0][0].cut  # it was stopped before its 1000 tokens


def test_too_many_waiting_questions_are_refused(model: PanoLLaVA) -> None:
    question = Question("what", 8, 0.0, 1.0, 0, stream=False, include_usage=False)

    async def fill() -> None:
        queue = AnswerQueue(model, batch_size=1)
        waiting = [Pending(question, Panorama(np.zeros(0))) for _ in range(MAX_WAITING)]
        for pending in waiting:
            queue.add(pending)
        with pytest.raises(RequestError, match="512 questions are waiting; try again later"):
            queue.add(waiting[0])
        waiting[9].hung_up = True
        queue.add(waiting[0])

    asyncio.run(fill())


def test_waiting_answers_go_before_other_uses_of_the_model(
    model: PanoLLaVA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what nobody waits for is not computed."""
    order: list[str] = []
    started, go_on = threading.Event(), threading.Event()

    def use(name: str) -> Any:
        def function(_: PanoLLaVA) -> str:
            order.append(name)
            if name == "first":
                started.set()
                assert go_on.wait(30)
            return name

        return function

    def answered(*_: Any) -> list[list[Answer]]:
        order.append("answer")
        return [[Answer("text", False)]]

    monkeypatch.setattr(model, "answer_features", answered)
    panorama = Panorama(np.zeros((1, 1, 1, 1, 3)))
    monkeypatch.setattr(Panorama, "features", lambda *_: torch.zeros(1))

    async def run() -> None:
        queue = AnswerQueue(model, 1)
        running = asyncio.create_task(queue.run())
        first, second, dropped = (
            asyncio.create_task(queue.use_model(use(name)))
            for name in ("first", "second", "dropped")
        )
        await asyncio.to_thread(started.wait, 30)
        pending = Pending(Question("what", 8, 0.0, 1.0, 0, False, False), panorama)
        queue.add(pending)
        dropped.cancel()
        go_on.set()
        assert (await pending.answer()).text == "text"
        assert [await first, await second] == ["first", "second"]
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(run())
    assert order == ["first", "answer", "second"]


@contextlib.contextmanager
def hanging_request(url: str, request: dict[str, Any]) -> Iterator[None]:
    """A client that sends a request and hangs up at the block's end."""
    body = json.dumps(request).encode()
    with raw(url, http(body)):
        yield


def http(body: bytes, *lines: str, host: str = "localhost", length: int | None = None) -> bytes:
    head = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}", *lines]
    head.append(f"Content-Length: {len(body) if length is None else length}")
    if not any(line.lower().startswith("content-type") for line in lines):
        head.append("Content-Type: application/json")
    return "\r\n".join([*head, "", ""]).encode() + body


@contextlib.contextmanager
def raw(url: str, content: bytes) -> Iterator[socket.socket]:
    port = int(url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(content)
        yield connection


# Hostile requests.


def picture(
    width: int = 128, height: int = 64, mode: str = "RGB", kind: str = "JPEG", **options: Any
) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (90, 60, 30)).convert(mode).save(out, kind, **options)
    return out.getvalue()


def turned(orientation: int, width: int, height: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return picture(width, height, exif=exif)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(name + content))
        out += struct.pack(">I", len(content)) + name + content + crc
    return out


def claiming(jpeg: bytes, width: int, height: int) -> bytes:
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def deep(bits: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.arange(64 * 128).reshape(64, 128).astype(bits)).save(out, "TIFF")
    return out.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (128, 64), color) for color in ("red", "green", "blue")]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=9)
    return out.getvalue()


BOMB = (b"IDAT", zlib.compress(bytes(1 << 24)))
TEXT_BOMB = (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28)))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 128 64\n%%EndComments\nshowpage\n%%EOF\n"
PICTURES: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "good": (picture, 200, ""),
    "gray": (lambda: picture(mode="L"), 200, ""),
    "CMYK": (lambda: picture(mode="CMYK"), 200, ""),
    "palette and alpha": (lambda: picture(mode="RGBA", kind="PNG"), 200, ""),
    "16 bits": (lambda: deep("uint16"), 200, ""),
    "floats": (lambda: deep("float32"), 400, "not 8 or 16 bits: pixels of mode F"),
    "turned to 2:1": (lambda: turned(6, 64, 128), 200, ""),
    "turned from 2:1": (lambda: turned(6, 128, 64), 400, "not 2:1: 64 x 128"),
    "animated GIF": (lambda: animated("GIF"), 200, ""),
    "animated WebP": (lambda: animated("WEBP"), 200, ""),
    "animated PNG": (lambda: animated("PNG"), 200, ""),
    "square": (lambda: picture(64, 64), 400, "not 2:1: 64 x 64 pixels"),
    "no bytes": (lambda: b"", 400, "not a picture"),
    "zeros": (lambda: bytes(5000), 400, "not a picture"),
    "text": (lambda: b"<html><script>alert(1)</script>", 400, "not a picture"),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "not a picture"),
    "EPS, which is a program": (lambda: EPS, 400, "not a picture"),
    "JPEG cut off": (lambda: picture(640, 320)[:900], 400, "cut off"),
    "JPEG cut off in its header": (lambda: picture()[:100], 400, "cut off"),
    "PNG cut off": (lambda: picture(kind="PNG")[:90], 400, "cut off"),
    "WebP cut off": (lambda: picture(kind="WEBP")[:40], 400, "picture"),
    "no pixels": (lambda: png(0, 0), 400, "picture"),
    "a picture of the limit": (lambda: picture(1448, 724), 200, ""),
    "more than the limit": (lambda: picture(1500, 750), 400, "too large: 1500 x 750 pixels"),
    "30,000 pixels a side": (lambda: png(30_000, 30_000, BOMB), 400, "too large: 30000 x 30000"),
    "PNG bomb": (lambda: png(30_000, 15_000, BOMB), 400, "too large: 30000 x 15000"),
    "PNG of 4 billion a side": (lambda: png(2**31 - 1, 2**30, BOMB), 400, "too large"),
    "PNG with a bomb of text": (lambda: png(128, 64, TEXT_BOMB), 400, "broken picture"),
    "JPEG bomb": (lambda: claiming(picture(), 60_000, 30_000), 400, "too large"),
    "JPEG that claims more": (lambda: claiming(picture(), 1400, 700), 400, "cut off"),
}  # fmt: skip


def good() -> dict[str, Any]:
    return {"model": "panollava", "messages": [user("what", picture())], "max_tokens": 2}


def with_(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**good(), **changes}


def content(*parts: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**good(), "messages": [{"role": "user", "content": [*parts]}]}


def link(url: Any) -> Callable[[], dict[str, Any]]:
    return content({"type": "image_url", "image_url": {"url": url}}, TEXT)


TEXT = {"type": "text", "text": "what"}
IMAGE = {"type": "image_url", "image_url": {"url": as_url(picture())}}
DATA = base64.b64encode(picture()).decode()
Body = Callable[[], dict[str, Any] | bytes]
REQUESTS: dict[str, tuple[Body, int, str]] = {
    "as it should be": (good, 200, ""),
    "no body": (lambda: b"", 400, "not valid JSON"),
    "broken JSON": (lambda: b'{"model": "panollava", "messages": [', 400, "not valid JSON"),
    "no UTF-8": (lambda: b'{"model": "\xff"}', 400, "not valid JSON"),
    "a list": (lambda: b"[]", 400, "must be a JSON object"),
    "deep JSON": (lambda: b"[" * 200_000, 400, "not valid JSON: RecursionError"),
    "a number of 5,000 digits": (lambda: b'{"n": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
    "no messages": (with_(messages=[]), 400, "messages: expected a list"),
    "messages that are text": (with_(messages="what"), 400, "messages: expected a list"),
    "a message that is text": (with_(messages=["what"]), 400, "messages[0]: expected an object"),
    "no content": (with_(messages=[{"role": "user"}]), 400, "messages[0].content: expected text"),
    "wrong role": (with_(messages=[{"role": "king", "content": "what"}]), 400, "found 'king'"),
    "role that is a list": (with_(messages=[{"role": [], "content": "a"}]), 400, "found a list"),
    "a system message": (
        with_(messages=[{"role": "system", "content": "a"}, user("what", picture())]),
        400,
        "knows no system messages",
    ),
    "an answer at the end": (
        with_(messages=[user("what", picture()), {"role": "assistant", "content": "a"}]),
        400,
        "the last message must be a user's",
    ),
    "no picture": (with_(messages=[user("what")]), 400, "messages: no picture"),
    "two pictures": (content(IMAGE, IMAGE, TEXT), 400, "messages: 2 pictures"),
    "no question": (content(IMAGE), 400, "no question"),
    "spaces for a question": (content(IMAGE, {**TEXT, "text": " \n"}), 400, "no question"),
    "5,000 letters": (content(IMAGE, {**TEXT, "text": "x" * 5000}), 200, ""),
    "50,000 letters": (content(IMAGE, {**TEXT, "text": "x" * 50_000}), 400, "at most 20,000"),
    "markup": (content(IMAGE, {**TEXT, "text": "<script>alert(1)</script>"}), 200, ""),
    "a zero byte": (content(IMAGE, {**TEXT, "text": "a\0b"}), 200, ""),
    "half a character": (content(IMAGE, {**TEXT, "text": "a\ud800"}), 400, "half of a character"),
    "a text that is a number": (content(IMAGE, {"type": "text", "text": 3}), 400, "content[1]"),
    "a sound": (content(IMAGE, {"type": "input_audio"}, TEXT), 400, "content[1]: expected"),
    "a part that is text": (content(IMAGE, "what"), 400, "content[1]: expected"),
    "a URL that is a number": (link(7), 400, "found 7; nothing else is read"),
    "a link": (link("http://127.0.0.1:1/a.jpg"), 400, "no link is fetched"),
    "a file": (link("file:///etc/passwd"), 400, "no link is fetched"),
    "a path": (link("../../etc/passwd"), 400, "no link is fetched"),
    "data that is no picture": (link(f"data:text/html;base64,{DATA}"), 400, "found 'data:text/"),
    "data without base64": (link("data:image/svg+xml,<svg/>"), 400, "expected data:image/jpeg"),
    "a name that leads out": (link(f"data:image/jpeg;name=../../a.jpg;base64,{DATA}"), 200, ""),
    "a name with a script": (link(f"data:image/<script>;base64,{DATA}"), 200, ""),
    "a type of 5,000 letters": (link(f"data:image/{'a' * 5000};base64,{DATA}"), 400, "found"),
    "base64 cut off": (link(f"data:image/jpeg;base64,{DATA[:-3]}"), 400, "not base64"),
    "other letters": (link(f"data:image/jpeg;base64,{DATA[:-8]}<a>\n"), 400, "not base64"),
    "another model": (with_(model="../../etc"), 404, "'../../etc' is not served here"),
    "no model": (with_(model=None), 400, "model: a name is required"),
    "two answers": (with_(n=2), 400, "n: 2 is not supported"),
    "one answer": (with_(n=1, stop=None, tools=[], user="me", frequency_penalty=0), 200, ""),
    "tools": (with_(tools=[{"type": "function"}]), 400, "tools: a list is not supported"),
    "log-probabilities": (with_(logprobs=True), 400, "logprobs: True is not supported"),
    "a form": (with_(response_format={"type": "json_object"}), 400, "response_format: an object"),
    "an unknown parameter": (with_(**{"<b>" * 99: 1}), 400, "unknown parameter"),
    "negative temperature": (with_(temperature=-1), 400, "temperature: expected a number from 0"),
    "no number as temperature": (with_(temperature=float("nan")), 400, "expected a number from 0"),
    "temperature in words": (with_(temperature="hot"), 400, "found 'hot'"),
    "top_p of 0": (with_(top_p=0), 400, "top_p: expected a number"),
    "seed with a point": (with_(seed=1.5), 400, "seed: expected an integer"),
    "tiny temperature": (with_(temperature=1e-300, seed=-1), 200, ""),
    "no tokens": (with_(max_tokens=0), 400, "max_tokens: expected an integer from 1"),
    "true tokens": (with_(max_tokens=True), 400, "found True"),
    "more tokens than fit": (with_(max_tokens=10**6), 400, "are more than the 32768 of the model"),
    "two lengths": (with_(max_completion_tokens=3), 400, "differ; send one"),
    "stream that is text": (with_(stream="yes"), 400, "stream: expected true or false"),
    "options of no stream": (with_(stream_options={"include_usage": True}), 400, "stream_opt"),
    "a body above the limit": (lambda: b" " * (1 << 22), 413, "larger than 1,048,576 bytes"),
}  # fmt: skip


def check_refusal(response: httpx.Response, status: int, message: str) -> None:
    assert response.status_code == status, response.text
    if status == 200:
        assert response.json()["choices"][0]["message"]["content"] is not None
        return
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and message in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize("name", [*PICTURES, *REQUESTS])
def test_a_hostile_request_gets_a_clear_answer(url: str, name: str) -> None:
    if name in PICTURES:
        make, status, message = PICTURES[name]
        body: Any = {**good(), "messages": [user("what", make())]}
        if not make():
            body = link("data:image/png;base64,")()
    else:
        make_body, status, message = REQUESTS[name]
        body = make_body()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        response = client.post("/v1/chat/completions", content=content)
        check_refusal(response, status, message)
        check_refusal(client.post("/v1/chat/completions", json=good()), 200, "")


GOOD = json.dumps(good()).encode()
ENDLESS = http(b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
ENDLESS += (b"100000\r\n" + bytes(1 << 20) + b"\r\n") * 17
RAW: dict[str, tuple[bytes, bytes]] = {
    "any port": (http(GOOD, host="localhost:1"), b" 200 "),
    "an address": (http(GOOD, host="[::1]:8000"), b" 200 "),
    "an allowed name": (http(GOOD, host="PANO.example"), b" 200 "),
    "another name": (http(GOOD, host="evil.example"), b" 403 "),
    "a name that ends alike": (http(GOOD, host="localhost.evil.example"), b" 403 "),
    "a name with a user": (http(GOOD, host="evil@localhost"), b" 403 "),
    "no name": (http(GOOD, host=""), b" 403 "),
    "two names": (http(GOOD, "Host: evil.example"), b" 400 "),
    "another type": (http(GOOD, "Content-Type: text/plain"), b" 415 "),
    "another path": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 404 "),
    "another method": (b"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 405 "),
    "no HTTP": (b"\x16\x03\x01" + bytes(200) + b"\r\n\r\n", b" 400 "),
    "an endless header": (b"GET / HTTP/1.1\r\nHost: localhost\r\na: " + b"a" * 99_999, b" 400 "),
    "a length in words": (http(GOOD).replace(b"Length: ", b"Length: many"), b" 400 "),
    "a length above the limit": (http(b"{}", length=10**15), b" 413 "),
    "a body without an end": (ENDLESS, b""),
    "cut off": (http(GOOD[:50], length=len(GOOD)), b""),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_a_hostile_connection_does_not_stop_the_server(url: str, name: str) -> None:
    request, expected = RAW[name]
    with raw(url, request) as connection:
        if expected:
            assert expected in connection.recv(1 << 16).split(b"\r\n")[0]
    check_refusal(httpx.post(f"{url}/v1/chat/completions", json=good(), timeout=60), 200, "")


def test_an_error_of_the_client_library_says_what_is_wrong(
    client: openai.OpenAI, pictures: list[Path]
) -> None:
    with pytest.raises(openai.BadRequestError, match="n: 2 is not supported") as error:
        ask(client, "what", pictures[0], n=2)
    assert (error.value.param, error.value.code) == ("n", "unsupported_value")
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_model_is_told_and_the_server_goes_on(
    client: openai.OpenAI,
    model: PanoLLaVA,
    pictures: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    for error, message in (
        (KeyError("lost"), "internal error .KeyError."),
        (RuntimeError("CUDA out of memory."), "out of memory with 1 questions.*--batch-size"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(model, "answer_features", Mock(side_effect=error))
            with pytest.raises(openai.APIError, match=message):
                [*ask(client, "what", pictures[0], stream=stream)]
    assert "lost" in caplog.text
    assert text_of(ask(client, "what", pictures[0])) == model.answer(pictures[0], ["what"], 8)[0]


def test_a_port_that_is_taken_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(SystemExit, match=f"port {port}: Address already in use; choose"):
            cli.main(["serve", "--port", str(port)])
    for option, value in (("--port", "70000"), ("--batch-size", "0"), ("--max-pixels", "0")):
        with pytest.raises(SystemExit, match=f"{option}: expected"):
            cli.main(["serve", option, value])


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(
    shared_project: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """And writes nothing."""
    result = shared_project / "runs/vlm_finetune"
    command = [sys.executable, str(ROOT / "src/run.py"), "serve", "--port", "0", "--model"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(
        [*command, str(result)],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, which children inherit.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert server.stderr
        line = next(line for line in server.stderr if "serving" in line)
        url = line.split(" at ")[1].split(": ")[0]
        with openai.OpenAI(base_url=url, api_key="any") as client:
            answer = text_of(ask(client, "what", pictures[0]))
            assert [answer] == PanoLLaVA.from_pretrained(result).answer(pictures[0], ["what"])
            assert ask(client, "what", pictures[0], stream=True, max_tokens=9999)
            server.send_signal(signal.SIGINT)  # while it answers
        assert server.wait(30) == 130
    finally:
        server.kill()
    assert not [*tmp_path.iterdir()]
