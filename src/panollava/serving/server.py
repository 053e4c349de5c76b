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
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from panollava.data.images import PictureError, read_panorama
from panollava.errors import UserError
from panollava.model.panollava import MAX_NEW_TOKENS, PanoLLaVA
from panollava.serving.answer_queue import AnswerQueue, Panorama, Pending, internal_error
from panollava.serving.replies import Reply, error_response, json_response
from panollava.serving.requests import Question, RequestError, read_question

log = logging.getLogger(__name__)

_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[0-9a-f:.%]+\]|[^\s:/@\[\]]+)(:\d{1,5})?", re.IGNORECASE)
_RECENT = 16  # panoramas whose features are kept
_READERS = 2  # threads that read requests and decode pictures
HUNG_UP = Response(status_code=499)  # nobody reads it
Result = TypeVar("Result")


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
    url = f"{address(listener)}/v1"
    log.info('serving "%s" at %s: OpenAI(base_url="%s", api_key="any")', name, url, url)
    make_server(model, name, hosts, limits).run([listener])


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # they stand for all addresses
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_server(
    model: PanoLLaVA,
    name: str,
    hosts: Sequence[str],
    limits: Limits,
    more: "Callable[[Service], list[BaseRoute]] | None" = None,
) -> uvicorn.Server:
    """`more`: routes beside those of the API."""
    service = Service(model, name, limits)
    config = uvicorn.Config(
        _make_app(service, hosts, more(service) if more else []),
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def _make_app(service: "Service", hosts: Sequence[str], more: list[BaseRoute]) -> Starlette:
    return Starlette(
        routes=[
            Route("/v1/models", service.models),
            Route("/v1/models/{name}", service.model_by_name),
            Route("/v1/chat/completions", service.chat_completions, methods=["POST"]),
            *more,
        ],
        middleware=[Middleware(_CheckSite, names={*_LOCAL_NAMES, *map(str.lower, hosts)})],
        exception_handlers={
            RequestError: lambda _, error: error_response(error),
            HTTPException: _http_error,
            ClientDisconnect: lambda *_: HUNG_UP,
            Exception: _internal_error,
        },
        lifespan=service.run,
    )


class Service:
    """The queue of one model, the panoramas that it remembers, and the routes of the API."""

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
        body = await self.read_body(request, "application/json")
        question, panorama, prompt_tokens = await self.in_reader(self._read, body)
        del body
        return await self.answer(request, question, panorama, prompt_tokens)

    async def read_body(self, request: Request, kind: str) -> bytes:
        """The body, of this content type. A page in a browser may send some others to any server
        without asking it first. Raises RequestError."""
        body = await _read_body(request, self.limits.max_bytes)
        if request.headers.get("content-type", "").split(";")[0].strip() != kind:
            raise RequestError(f"Content-Type: expected {kind}", status=415)
        return body

    async def in_reader(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The result of `function` in a thread that reads requests."""
        run = anyio.to_thread.run_sync
        return await run(function, *arguments, limiter=self._readers)

    async def answer(
        self, request: Request, question: Question, panorama: Panorama, prompt_tokens: int
    ) -> Response:
        """In OpenAI's form, as a stream if the question asks for it."""
        pending = Pending(question, panorama)
        self.queue.add(pending)
        reply = Reply(self.name, pending, prompt_tokens)
        if question.stream:
            return StreamingResponse(
                _with_hang_up(reply.stream(), pending), media_type="text/event-stream"
            )
        try:
            answer = await unless_hung_up(request, pending.answer())
        finally:
            pending.hung_up = True
        return json_response(reply.complete(answer)) if answer else HUNG_UP

    def _read(self, body: bytes) -> tuple[Question, Panorama, int]:
        """The question, its panorama and the number of tokens before the answer."""
        question, picture = read_question(body, self.name, self.limits.max_new_tokens)
        return question, self.panorama(picture), self.count_tokens(question)

    def count_tokens(self, question: Question) -> int:
        """Tokens before the answer. Raises RequestError if they do not fit the model."""
        tokens = self.model.prefix_tokens + len(self.model.dialogue.query(question.text))
        window = self.model.network.window
        if tokens + question.max_new_tokens > window:
            raise RequestError(
                f"{tokens} tokens of the prompt and {question.max_new_tokens} of the answer are "
                f"more than the {window} of the model; shorten the question or lower max_tokens",
                "messages",
                "context_length_exceeded",
            )
        return tokens

    def panorama(self, picture: bytes) -> Panorama:
        """From what a picture's file contains. Raises RequestError."""
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


async def unless_hung_up(request: Request, working: Coroutine[Any, Any, Result]) -> Result | None:
    """The result, or None if the client hangs up before, which cancels the work."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, leaving = asyncio.ensure_future(working), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        work.cancel()
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


class _CheckSite:
    """Refuses a request for another host name: otherwise a web page could have its name resolve to
    this machine, and read answers (DNS rebinding). Also one that a browser sends for a page of
    another site, except to open this one."""

    def __init__(self, app: ASGIApp, names: set[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http" and (reason := self._refusal(scope)):
            app = error_response(RequestError(reason, code="host", status=403))
        await app(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = _HOST.fullmatch(headers.get(b"host", ""))
        if not host or host[1].lower() not in self.names:
            return "Host: this name is not served; start the server with --allow-host NAME"
        opens = scope["method"] == "GET" and headers.get(b"sec-fetch-mode") == "navigate"
        if headers.get(b"sec-fetch-site", "none") not in ("none", "same-origin") and not opens:
            return "Sec-Fetch-Site: requests of other sites are refused"
        return None


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = RequestError(f"{error.detail}: see /v1/models and /v1/chat/completions", code="path")
    refused.status = error.status_code
    return error_response(refused, error.headers)


def _internal_error(request: Request, error: Exception) -> Response:
    return error_response(internal_error(error))
