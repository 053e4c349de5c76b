"""The queue of questions. One thread uses the model: it answers all waiting questions that are
sampled alike in one batch, and encodes each panorama once. Other uses of the model wait until no
question does."""

import asyncio
import logging
import traceback
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from panollava.errors import out_of_memory_reason
from panollava.model.generate import Answer, Sampling
from panollava.model.panollava import PanoLLaVA
from panollava.serving.requests import Question, RequestError
from panollava.serving.words import Words

MAX_WAITING = 512  # questions, and as many other uses of the model; more are refused
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Panorama:
    """The views of a panorama, uint8 (views, size, size, 3), and its features once a question was
    asked."""

    def __init__(self, views: NDArray) -> None:
        self.views = views
        self._features: Tensor | None = None

    def features(self, model: PanoLLaVA) -> Tensor:
        """(1, *shape, features). Only the thread that uses the model may call it."""
        if self._features is None:
            # One by one, so that the features are those of any other command.
            self._features = model.features_of_views(self.views[None])
        return self._features


class Pending:
    """A question until its answer is complete. It belongs to the event loop that made it."""

    def __init__(self, question: Question, panorama: Panorama) -> None:
        self.question, self.panorama = question, panorama
        self.new_tokens = 0  # of the answer so far
        self.hung_up = False  # nobody waits for the answer any more
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Answer | RequestError] = asyncio.Queue()

    def put(self, event: str | Answer | RequestError) -> None:
        """From any thread: a piece of the text, or the answer or an error as the last event."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[str | Answer]:
        """Pieces of the text, if the question asks for them, and the answer as the last one."""
        event: str | Answer | RequestError = ""
        while not isinstance(event, Answer):
            event = await self._events.get()
            if isinstance(event, RequestError):
                raise event
            yield event

    async def answer(self) -> Answer:
        async for event in self.events():
            if isinstance(event, Answer):
                return event
        raise AssertionError("the answer is the last event")


class AnswerQueue:
    def __init__(self, model: PanoLLaVA, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self._waiting: list[Pending] = []
        self._other: list[tuple[Callable[[PanoLLaVA], Any], asyncio.Future[Any]]] = []
        self._arrived = asyncio.Event()

    def add(self, pending: Pending) -> None:
        """Raises RequestError if too many questions wait."""
        self._waiting = [each for each in self._waiting if not each.hung_up]
        _check_room(self._waiting, "questions")
        self._waiting.append(pending)
        self._arrived.set()

    async def use_model(self, function: Callable[[PanoLLaVA], Result]) -> Result:
        """What `function` returns, in the thread that uses the model, once no question waits. Not
        called if this is canceled before. Raises RequestError if it fails, or too many wait."""
        self._other = [each for each in self._other if not each[1].cancelled()]
        _check_room(self._other, "requests")
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._other.append((function, future))
        self._arrived.set()
        return await future

    async def run(self) -> None:
        """Answer questions until canceled, and the batch at work then is given up."""
        batch: list[Pending] = []
        with ThreadPoolExecutor(1, "model") as model_thread:
            try:
                while await self._arrived.wait():
                    if batch := self._next_batch():
                        answering = model_thread.submit(self._answer, batch)
                        await asyncio.wait([asyncio.wrap_future(answering)])
                        if error := answering.exception():
                            refusal = internal_error(error, len(batch))
                            for pending in batch:
                                pending.put(refusal)
                    elif other := self._next_other():
                        function, future = other
                        working = model_thread.submit(function, self.model)
                        await asyncio.wait([asyncio.wrap_future(working)])
                        if future.cancelled():
                            continue
                        if error := working.exception():
                            future.set_exception(internal_error(error))
                        else:
                            future.set_result(working.result())
                    else:
                        self._arrived.clear()
            finally:
                for pending in batch:
                    pending.hung_up = True

    def _next_other(self) -> tuple[Callable[[PanoLLaVA], Any], asyncio.Future[Any]] | None:
        self._other = [each for each in self._other if not each[1].cancelled()]
        return self._other.pop(0) if self._other else None

    def _next_batch(self) -> list[Pending]:
        """The question that waits longest and those that can be answered with it."""
        waiting = [pending for pending in self._waiting if not pending.hung_up]
        batch = [each for each in waiting if _kind(each) == _kind(waiting[0])][: self.batch_size]
        self._waiting = [pending for pending in waiting if pending not in batch]
        return batch

    def _answer(self, batch: list[Pending]) -> None:
        by_panorama: dict[Panorama, list[Pending]] = defaultdict(list)
        for pending in batch:
            by_panorama[pending.panorama].append(pending)
        first = batch[0].question
        ordered = [*chain.from_iterable(by_panorama.values())]
        words = [Words(self.model.dialogue) for _ in ordered]

        def report(index: int, tokens: list[int]) -> bool:
            pending = ordered[index]
            pending.new_tokens = len(tokens)
            if pending.question.stream and (piece := words[index].of_tokens(tokens)):
                pending.put(piece)
            return pending.hung_up

        answers = self.model.answer_features(
            torch.cat([panorama.features(self.model) for panorama in by_panorama]),
            [[each.question.text for each in group] for group in by_panorama.values()],
            first.max_new_tokens,
            # A seed for each, so that no answer depends on the others.
            Sampling(first.temperature, first.top_p, tuple(each.question.seed for each in ordered)),
            report,
        )
        for pending, answer, its_words in zip(
            ordered, chain.from_iterable(answers), words, strict=True
        ):
            if pending.question.stream and (piece := its_words.rest(answer.text)):
                pending.put(piece)
            pending.put(answer)


def _check_room(waiting: list[Any], what: str) -> None:
    if len(waiting) >= MAX_WAITING:
        message = f"{MAX_WAITING} {what} are waiting; try again later"
        raise RequestError(message, code="rate_limit_exceeded", status=429)


def _kind(pending: Pending) -> tuple[Any, ...]:
    """Equal for questions that can share a batch."""
    question = pending.question
    return question.max_new_tokens, question.temperature, question.top_p


def internal_error(error: BaseException, questions: int = 1) -> RequestError:
    """Log an error that is not the client's, and tell the client."""
    if isinstance(error, MemoryError | RuntimeError) and (reason := out_of_memory_reason(error)):
        message = f"out of memory with {questions} questions at once; lower --batch-size"
        log.error("%s (%s)", message, reason)
    else:
        message = f"internal error ({type(error).__name__}); the server's console shows more"
        lines = "".join(traceback.format_exception(error))
        log.error("internal error; please report it\n%s", lines)
    return RequestError(message, code="internal_error", status=500)
