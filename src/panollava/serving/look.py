"""`panollava look`: a page that asks the model about panoramas and shows where it looks, on the
server of `serve`.

The page is made of the files in `assets`, and needs no other host."""

import hashlib
import logging
import socket
import threading
import webbrowser
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route

from panollava.data.images import read_panorama, reduced_jpeg
from panollava.geometry.projections import Projection
from panollava.geometry.sphere import angles_from_rays
from panollava.model.heat_map import HeatMaps, encode_map
from panollava.model.panollava import PanoLLaVA
from panollava.serving.answer_queue import Panorama
from panollava.serving.look_gallery import open_gallery
from panollava.serving.replies import json_response
from panollava.serving.requests import Question, RequestError, checked_question, parse_object
from panollava.serving.server import HUNG_UP, Limits, Service, address, make_server, unless_hung_up

log = logging.getLogger(__name__)

_ASSETS = Path(__file__).with_name("assets")
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}
_PAGE = 12  # panoramas of the gallery at once
_UPLOADS = 16  # that are kept
_SHOWN_WIDTH = 2048  # pixels of an uploaded panorama in the page, at least
_HEADERS = {
    # The viewer's style sheet has its symbols as data.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def look(
    model: PanoLLaVA,
    title: str,
    listener: socket.socket,
    hosts: Sequence[str],
    limits: Limits,
    opens: bool,
) -> None:
    """Serve the page, and OpenAI's API, until interrupted. `title`: of the model. `opens`: a
    browser, too."""
    url = f"{address(listener)}/"
    log.info("look at %s", url)
    if opens:
        # It may not return before the browser ends, and what it opens waits for the server.
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    make_page_server(model, title, hosts, limits).run([listener])


def make_page_server(model: PanoLLaVA, title: str, hosts: Sequence[str], limits: Limits) -> Any:
    return make_server(
        model, "panollava", hosts, limits, lambda service: _Page(service, title).routes()
    )


class _Page:
    """A panorama's name is its number in the gallery, or the SHA-256 of an uploaded file."""

    def __init__(self, service: Service, title: str) -> None:
        self.service, self.title = service, title
        self.gallery = open_gallery(service.model.header.views)
        self._mapped: tuple[Panorama, HeatMaps] | None = None
        self._uploads: OrderedDict[str, tuple[Panorama, bytes]] = OrderedDict()

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/", self.page),
            Route("/assets/{name}", self.asset),
            Route("/look/start", self.start),
            Route("/look/panoramas", self.panoramas),
            Route("/look/panoramas", self.upload, methods=["POST"]),
            Route("/look/panoramas/{name}", self.panorama),
            Route("/look/pictures/{name}", self.picture),
            Route("/look/answers", self.answer, methods=["POST"]),
            Route("/look/maps", self.map, methods=["POST"]),
        ]

    async def page(self, request: Request) -> Response:
        return _asset("look.html")

    async def asset(self, request: Request) -> Response:
        return _asset(request.path_params["name"])

    async def start(self, request: Request) -> Response:
        """What the page shows first."""
        gallery, limits = self.gallery, self.service.limits
        projections = self.service.model.sampler.layout.projections
        return json_response(
            {
                "title": self.title,
                "about": (_ASSETS / "about_maps.txt").read_text(encoding="utf-8"),
                "split": gallery.split if gallery else None,
                "examples": gallery.examples if gallery else [],
                "max_bytes": limits.max_bytes,
                "outlines": [_outline(projection).tolist() for projection in projections],
            },
            headers=_HEADERS,
        )

    async def panoramas(self, request: Request) -> Response:
        """A page of the gallery."""
        query = request.query_params
        start = query.get("start", "0")
        if not start.isdecimal() or len(start) > 9:
            raise RequestError("start: expected a number", "start")
        search = query.get("search", "")[:1000]
        found: tuple[int, list[dict[str, Any]]] = (0, [])
        if self.gallery:
            found = await self.service.in_reader(self.gallery.find, search, int(start), _PAGE)
        return json_response({"total": found[0], "panoramas": found[1]}, headers=_HEADERS)

    async def upload(self, request: Request) -> Response:
        content = await self.service.read_body(request, "application/octet-stream")
        name = hashlib.sha256(content).hexdigest()
        if name not in self._uploads:
            self._uploads[name] = await self.service.in_reader(self._read_upload, content)
            if len(self._uploads) > _UPLOADS:
                self._uploads.popitem(last=False)
        return json_response({"name": name, "queries": []}, headers=_HEADERS)

    def _read_upload(self, content: bytes) -> tuple[Panorama, bytes]:
        panorama = self.service.panorama(content)  # checks the picture
        return panorama, reduced_jpeg(read_panorama(content, _SHOWN_WIDTH))

    async def panorama(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._find(name)
        entry = {"name": name, "title": "", "queries": []}
        if self.gallery and name not in self._uploads:
            entry = self.gallery.entries[name]
        return json_response(entry, headers=_HEADERS)

    async def picture(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._find(name)
        if name in self._uploads:
            return Response(self._uploads[name][1], 200, _HEADERS, "image/jpeg")
        assert self.gallery
        return Response(self.gallery.picture(name), 200, _HEADERS, "image/jpeg")

    async def answer(self, request: Request) -> Response:
        """The words of the answer to {"panorama": name, "question": text}, in chunks of OpenAI's
        API."""
        asked = await self._read(request)
        limit = self.service.limits.max_new_tokens
        question = Question(_text(asked, "question"), limit, 0.0, 1.0, 0, True, False)
        tokens = self.service.count_tokens(question)
        panorama = self._find(asked.get("panorama"))
        return await self.service.answer(request, question, panorama, tokens)

    async def map(self, request: Request) -> Response:
        """The heat map of {"panorama", "question", "answer", "part"}, see viewer.js. `part`: the
        first character and the one after the last, or null for the whole answer."""
        asked = await self._read(request)
        question, answer = _text(asked, "question"), _text(asked, "answer")
        part = _part(asked.get("part"), len(answer))
        length = len(self.service.model.dialogue.row(question, answer, truncate=False).answer)
        self.service.count_tokens(Question(question, length, 0.0, 1.0, 0, False, False))
        panorama = self._find(asked.get("panorama"))

        def compute(model: PanoLLaVA) -> NDArray[np.float32]:
            return self._heat_maps(model, panorama).heat_map(question, answer, part)

        result = await unless_hung_up(request, self.service.queue.use_model(compute))
        if result is None:
            return HUNG_UP
        return json_response(encode_map(result), headers=_HEADERS)

    def _heat_maps(self, model: PanoLLaVA, panorama: Panorama) -> HeatMaps:
        """Only those of the last panorama are kept: they need the memory of many panoramas."""
        if self._mapped is None or self._mapped[0] is not panorama:
            self._mapped = None
            self._mapped = panorama, HeatMaps(model, panorama.views)
        return self._mapped[1]

    async def _read(self, request: Request) -> dict[str, Any]:
        return parse_object(await self.service.read_body(request, "application/json"))

    def _find(self, name: Any) -> Panorama:
        if isinstance(name, str):
            if name in self._uploads:
                self._uploads.move_to_end(name)
                return self._uploads[name][0]
            if self.gallery and name in self.gallery.entries:
                return self.gallery.panorama(name)
        raise RequestError(
            "this panorama is not here any more; choose it again", "panorama", "panorama", 404
        )


def _asset(name: str) -> Response:
    file = _ASSETS / name
    # No other file of the folder, which a path could lead out of.
    if file.parent != _ASSETS or file.suffix not in _TYPES or not file.is_file():
        raise RequestError(f"{name}: no such file", code="path", status=404)
    return FileResponse(file, 200, _HEADERS, _TYPES[file.suffix])


def _outline(projection: Projection) -> NDArray[np.float64]:
    """Yaw and pitch, in degrees, of points along the border of a view: (points, 2)."""
    along = np.linspace(0, 1, 25)
    rays = projection.rays(along, along)
    border = np.concatenate([rays[0], rays[1:, -1], rays[-1, -2::-1], rays[-2:0:-1, 0]])
    return np.degrees(np.stack(angles_from_rays(border), axis=-1)).round(2)


def _text(asked: dict[str, Any], name: str) -> str:
    text = asked.get(name)
    if not isinstance(text, str):
        raise RequestError(f"{name}: expected text", name)
    return checked_question(text, name)


def _part(part: Any, length: int) -> slice | None:
    if part is None:
        return None
    if isinstance(part, list) and [type(each) for each in part] == [int, int]:
        first, after = part
        if 0 <= first < after <= length:
            return slice(first, after)
    raise RequestError(f"part: expected [first, after] within the {length} characters", "part")
