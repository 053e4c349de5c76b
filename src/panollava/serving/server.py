"""`panollava serve`: an HTTP server with OpenAI's chat completions API, for one trained model.

It writes no file, fetches no link, and knows no user: anyone who reaches its port may ask."""

import asyncio
import contextlib
import hashlib
import logging
import re
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from panollava.data.images import PictureError, read_panorama
from panollava.errors import UserError
from panollava.model.generate import Answer
from panollava.model.panollava import MAX_NEW_TOKENS, PanoLLaVA
from panollava.serving.answer_queue import AnswerQueue, Panorama, Pending, internal_error
from panollava.serving.replies import Reply, error_response, json_response
from panollava.serving.requests import Question, RequestError, read_question

log = logging.getLogger(__name__)

_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[0-9a-f:.%]+\]|[^\s:/@\[\]]+)(:\d{1,5})?", re.IGNORECASE)
_RECENT = 16  # panoramas whose features are kept
_READERS = 2  # threads that read requests and decode pictures
_HUNG_UP = Response(status_code=499)  # nobody reads it


class Limits(NamedTuple):
    max_new_tokens: int = MAX_NEW_TOKENS  # of requests that do not name a number
    batch_size: int = 16  # questions answered at once
    max_bytes: int = 64 << 20  # of a request's body
    max_pixels: int = 1 << 27  # of a picture


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0: any free one. Raises UserError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).split(" (while ")[0]
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}; choose another --port"
        ) from None


def serve(
    model: PanoLLaVA, listener: socket.socket, name: str, hosts: Sequence[str], limits: Limits
) -> None:
    """Answer requests until interrupted. `hosts`: names in the Host header that are accepted beside
    the local ones."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    log.info('serving "%s" at %s: OpenAI(base_url="%s", api_key="any")', name, url, url)
    make_server(model, name, hosts, limits).run([listener])


def make_server(
    model: PanoLLaVA, name: str, hosts: Sequence[str], limits: Limits
) -> uvicorn.Server:
    config = uvicorn.Config(
        _make_app(model, name, hosts, limits),
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def _make_app(model: PanoLLaVA, name: str, hosts: Sequence[str], limits: Limits) -> Starlette:
    routes = _Routes(model, name, limits)
    return Starlette(
        routes=[
            Route("/v1/models", routes.models),
            Route("/v1/models/{name}", routes.model_by_name),
            Route("/v1/chat/completions", routes.chat_completions, methods=["POST"]),
        ],
        middleware=[Middleware(_CheckHost, names={*_LOCAL_NAMES, *map(str.lower, hosts)})],
        exception_handlers={
            RequestError: lambda _, error: error_response(error),
            HTTPException: _http_error,
            ClientDisconnect: lambda *_: _HUNG_UP,
            Exception: _internal_error,
        },
        lifespan=routes.run,
    )


class _Routes:
    queue: AnswerQueue

    def __init__(self, model: PanoLLaVA, name: str, limits: Limits) -> None:
        self.model, self.name, self.limits = model, name, limits
        self.started = int(time.time())
        self._recent: OrderedDict[bytes, Panorama] = OrderedDict()  # by the picture's SHA-256
        self._lock = threading.Lock()

    @contextlib.asynccontextmanager
    async def run(self, app: Starlette) -> AsyncIterator[None]:
        self.queue = AnswerQueue(self.model, self.limits.batch_size)
        self._readers = anyio.CapacityLimiter(_READERS)
        answering = asyncio.create_task(self.queue.run())
        yield
        answering.cancel()
        await asyncio.wait([answering])

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._described()]})

    async def model_by_name(self, request: Request) -> Response:
        if request.path_params["name"] != self.name:
            message = f"no such model; this server has {self.name!r}"
            raise RequestError(message, "model", "model_not_found", 404)
        return json_response(self._described())

    def _described(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "panollava",
        }

    async def chat_completions(self, request: Request) -> Response:
        body = await _read_body(request, self.limits.max_bytes)
        # A page in a browser may send other types to any server without asking it first.
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise RequestError("Content-Type: expected application/json", status=415)
        read = anyio.to_thread.run_sync
        question, panorama, prompt_tokens = await read(self._read, body, limiter=self._readers)
        del body
        pending = Pending(question, panorama)
        self.queue.add(pending)
        reply = Reply(self.name, pending, prompt_tokens)
        if question.stream:
            return StreamingResponse(
                _with_hang_up(reply.stream(), pending), media_type="text/event-stream"
            )
        answer = await _answer_unless_hung_up(request, pending)
        return json_response(reply.complete(answer)) if answer else _HUNG_UP

    def _read(self, body: bytes) -> tuple[Question, Panorama, int]:
        """The question, its panorama and the number of tokens before the answer."""
        question, picture = read_question(body, self.name, self.limits.max_new_tokens)
        tokens = self.model.prefix_tokens + len(self.model.dialogue.query(question.text))
        window = self.model.network.window
        if tokens + question.max_new_tokens > window:
            raise RequestError(
                f"{tokens} tokens of the prompt and {question.max_new_tokens} of the answer are "
                f"more than the {window} of the model; shorten the question or lower max_tokens",
                "messages",
                "context_length_exceeded",
            )
        return question, self._panorama(picture), tokens

    def _panorama(self, picture: bytes) -> Panorama:
        key = hashlib.sha256(picture).digest()
        with self._lock:
            panorama = self._recent.get(key)
        if panorama is None:
            sampler = self.model.sampler
            try:
                pixels = read_panorama(picture, sampler.panorama_width, self.limits.max_pixels)
            except PictureError as error:
                raise RequestError(error.reason, "messages", "invalid_image") from None
            panorama = Panorama(sampler.sample(pixels))
        with self._lock:
            panorama = self._recent.setdefault(key, panorama)
            self._recent.move_to_end(key)
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        return panorama


async def _with_hang_up(events: AsyncIterator[str], pending: Pending) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield event
    finally:
        pending.hung_up = True


async def _answer_unless_hung_up(request: Request, pending: Pending) -> Answer | None:
    async def answer() -> Answer | None:
        async for event in pending.events():
            if isinstance(event, Answer):
                return event
        return None

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer()), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        pending.hung_up = True
        answering.cancel()
        leaving.cancel()


async def _read_body(request: Request, limit: int) -> bytes:
    """A body that is too large is read and dropped, because most clients send all of it before they
    read the answer; but not if it is very much too large."""
    size = int(request.headers.get("content-length", 0))
    if size <= 16 * limit:
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            elif size > 16 * limit:
                break
    if size > limit:
        raise RequestError(f"the body is larger than {limit:,} bytes", status=413)
    return b"".join(chunks)


class _CheckHost:
    """Refuses a request for another host name. Otherwise a web page could have its name resolve to
    this machine, and read answers (DNS rebinding)."""

    def __init__(self, app: ASGIApp, names: set[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            host = _HOST.fullmatch(headers.get(b"host", b"").decode("latin-1"))
            if not host or host[1].lower() not in self.names:
                message = "Host: this name is not served; start the server with --allow-host NAME"
                app = error_response(RequestError(message, code="host", status=403))
        await app(scope, receive, send)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = RequestError(f"{error.detail}: see /v1/models and /v1/chat/completions", code="path")
    refused.status = error.status_code
    return error_response(refused, error.headers)


def _internal_error(request: Request, error: Exception) -> Response:
    return error_response(internal_error(error))
