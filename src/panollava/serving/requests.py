"""Reads and checks a request of OpenAI's chat completions API.

What the model cannot do is refused, not ignored. Earlier turns are not read, but for the picture:
the model was trained on single questions."""

import base64
import binascii
import json
import re
import secrets
from typing import Any, NamedTuple

MAX_QUESTION = 20_000  # characters
_DATA_URL = re.compile(r"data:image/[^,]{0,500};base64,", re.IGNORECASE)
_NUMBER, _INTEGER = (int, float), (int,)
# Parameters that change an answer, with the values that ask for what the model does anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}
# Parameters that change no answer.
_WITHOUT_EFFECT = frozenset(
    "user metadata service_tier safety_identifier prompt_cache_key parallel_tool_calls".split()
)
_READ = frozenset(
    "model messages stream stream_options temperature top_p seed max_tokens "
    "max_completion_tokens".split()
)


class RequestError(Exception):
    """A request that is refused: the HTTP status and the fields of OpenAI's error object."""

    def __init__(
        self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def as_json(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class Question(NamedTuple):
    text: str
    max_new_tokens: int
    temperature: float  # 0: greedy, and the next two are 1 and 0
    top_p: float
    seed: int
    stream: bool
    include_usage: bool  # in a stream


def read_question(body: bytes, model: str, max_new_tokens: int) -> tuple[Question, bytes]:
    """The question, and what the file of its picture contains. `model`: the name of the model that
    is served. `max_new_tokens`: where the request names none.

    Raises:
        RequestError: the request is faulty, or asks for what the model cannot do.
    """
    request = parse_object(body)
    _refuse_unsupported(request)
    name = request.get("model")
    if not isinstance(name, str):
        raise RequestError("model: a name is required", "model")
    if name != model:
        message = f"model: {_shown(name)} is not served here; expected {model!r}"
        raise RequestError(message, "model", "model_not_found", 404)
    text, picture = _read_messages(request.get("messages"))
    stream = _boolean(request, "stream")
    options = request.get("stream_options") or {}
    if not isinstance(options, dict) or (options and not stream):
        raise RequestError(
            "stream_options: expected an object, with stream: true", "stream_options"
        )
    include_usage = _boolean(options, "include_usage")
    length = _read_length(request, max_new_tokens)
    return Question(text, length, *_read_sampling(request), stream, include_usage), picture


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises RequestError."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise RequestError(f"the body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(request, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    return request


def _refuse_unsupported(request: dict[str, Any]) -> None:
    for name, value in request.items():
        if name in _READ or name in _WITHOUT_EFFECT or value is None:
            continue
        if name not in _NEUTRAL:
            raise RequestError(f"{_shown(name)}: unknown parameter", None, "unknown_parameter")
        if value not in _NEUTRAL[name]:
            message = f"{name}: {_shown(value)} is not supported by this model; leave it out"
            raise RequestError(message, name, "unsupported_value")


def _read_messages(messages: Any) -> tuple[str, bytes]:
    """The question, which is the text of the last message, and the picture of any message."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: expected a list of at least one message", "messages")
    texts: list[str] = []
    pictures: list[tuple[str, Any]] = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, dict):
            raise RequestError(f"{place}: expected an object", place)
        role = message.get("role")
        if role in ("system", "developer"):
            advice = "the model knows no system messages; put it into the question"
            raise RequestError(f"{place}.role: {advice}", f"{place}.role", "unsupported_value")
        if role not in ("user", "assistant"):
            expected = f"{place}.role: expected user or assistant, found {_shown(role)}"
            raise RequestError(expected, f"{place}.role")
        texts, found = _read_content(message.get("content"), f"{place}.content")
        if found and role == "assistant":
            raise RequestError(f"{place}: a picture must be in a user's message", place)
        pictures += found
    if role != "user":
        raise RequestError(f"{place}.role: the last message must be a user's question", place)
    if len(pictures) != 1:
        found_pictures = f"{len(pictures)} pictures" if pictures else "no picture"
        expected = "expected exactly one image_url in all messages"
        raise RequestError(f"messages: {found_pictures}; {expected}", "messages", "one_picture")
    return checked_question("\n".join(texts), f"{place}.content"), _decode_url(*pictures[0])


def _read_content(content: Any, place: str) -> tuple[list[str], list[tuple[str, Any]]]:
    """The texts of a message, and its pictures: their places and URLs."""
    if isinstance(content, str):
        return [content], []
    if not isinstance(content, list):
        raise RequestError(f"{place}: expected text or a list of parts", place)
    texts: list[str] = []
    pictures: list[tuple[str, Any]] = []
    for index, part in enumerate(content):
        inside = f"{place}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and isinstance(part.get("image_url"), dict):
            pictures.append((f"{inside}.image_url.url", part["image_url"].get("url")))
        else:
            expected = (
                '{"type": "text", "text": "..."} or {"type": "image_url", "image_url": {...}}'
            )
            raise RequestError(f"{inside}: expected {expected}", inside)
    return texts, pictures


def checked_question(text: str, place: str) -> str:
    """`text`, if it can be asked. Raises RequestError, which names the `place` in the request."""
    if not text.strip():
        raise RequestError(f"{place}: no question", place)
    if len(text) > MAX_QUESTION:
        expected = f"{len(text):,} characters; at most {MAX_QUESTION:,}"
        raise RequestError(f"{place}: {expected}", place, "context_length_exceeded")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RequestError(f"{place}: half of a character (a lone surrogate)", place)
    return text


def _decode_url(place: str, url: Any) -> bytes:
    if not isinstance(url, str) or not (start := _DATA_URL.match(url)):
        raise RequestError(
            f"{place}: expected data:image/jpeg;base64,..., found {_shown(url)}; nothing else is "
            "read, and no link is fetched",
            place,
            "invalid_image_url",
        )
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{place}: not base64: {error}", place, "invalid_base64") from None


def _read_length(request: dict[str, Any], default: int) -> int:
    names = ("max_completion_tokens", "max_tokens")
    given = {name: _number(request, name, _INTEGER, 1, 2**31) for name in names}
    lengths = {value for value in given.values() if value is not None}
    if len(lengths) > 1:
        raise RequestError("max_tokens and max_completion_tokens differ; send one", "max_tokens")
    return int(lengths.pop()) if lengths else default


def _read_sampling(request: dict[str, Any]) -> tuple[float, float, int]:
    """Temperature, top_p and seed. Greedy unless a temperature above 0 is given."""
    temperature = _number(request, "temperature", _NUMBER, 0, 2)
    top_p = _number(request, "top_p", _NUMBER, 1e-9, 1)
    seed = _number(request, "seed", _INTEGER, -(2**63), 2**63 - 1)
    if not temperature:
        return 0.0, 1.0, 0
    seed = secrets.randbelow(2**32) if seed is None else seed % 2**32
    return float(temperature), 1.0 if top_p is None else float(top_p), int(seed)


def _number(
    request: dict[str, Any], name: str, kinds: tuple[type, ...], low: float, high: float
) -> float | None:
    value = request.get(name)
    if value is None:
        return None
    if type(value) not in kinds or not low <= value <= high:
        what = "an integer" if kinds == _INTEGER else "a number"
        expected = f"expected {what} from {low:g} to {high:g}, found {_shown(value)}"
        raise RequestError(f"{name}: {expected}", name)
    return value


def _boolean(values: dict[str, Any], name: str) -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name}: expected true or false, found {_shown(value)}", name)
    return bool(value)


def _shown(value: Any) -> str:
    """A value of the request in an error message, shortened."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return repr(value[:60] + "..." if isinstance(value, str) and len(value) > 60 else value)
