"""Answers and errors in the forms of OpenAI's chat completions API."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from panollava.model.generate import Answer
from panollava.serving.answer_queue import Pending
from panollava.serving.requests import RequestError


class Reply:
    """An answer in the forms of the API."""

    def __init__(self, model: str, pending: Pending, prompt_tokens: int) -> None:
        self.pending, self.prompt_tokens = pending, prompt_tokens
        identity = f"chatcmpl-{secrets.token_hex(12)}"
        self.common = {"id": identity, "created": int(time.time()), "model": model}

    def complete(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, **_finish(answer)}
        kind = "chat.completion"
        return {**self.common, "object": kind, "choices": [choice], "usage": self._usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for event in self.pending.events():
                if isinstance(event, Answer):
                    yield self._chunk({}, **_finish(event))
                else:
                    yield self._chunk({"content": event})
        except RequestError as error:
            yield _event(error.as_json())
            return
        if self.pending.question.include_usage:
            yield _event({**self._common_chunk(), "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event({**self._common_chunk(), "choices": [choice]})

    def _common_chunk(self) -> dict[str, Any]:
        return {**self.common, "object": "chat.completion.chunk"}

    def _usage(self) -> dict[str, int]:
        prompt, new = self.prompt_tokens, self.pending.new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _finish(answer: Answer) -> dict[str, str]:
    return {"finish_reason": "length" if answer.cut else "stop"}


def json_response(content: dict[str, Any], status: int = 200, headers: Any = None) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")


def error_response(error: RequestError, headers: Any = None) -> Response:
    return json_response(error.as_json(), error.status, headers)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
