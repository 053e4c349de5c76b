"""Sequence packing: all rows of a panorama in one sequence, after a shared prefix.

    [text before the image][vision tokens][query 1, answer 1][query 2, answer 2] ...

Each row attends only to the prefix and to itself, and its positions restart after the prefix. Its
loss therefore equals that of an unpacked sequence."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from panollava.data.shapes import Shape
from panollava.errors import UserError

PADDING = -1  # segment number
IGNORED = -100  # label without a loss, torch's default


@dataclass(frozen=True)
class Row:
    """One query and its answer as tokens."""

    query: list[int]
    answer: list[int]  # ends with the stop token unless it is truncated

    def __len__(self) -> int:
        return len(self.query) + len(self.answer)


class Rows(Sequence[Row]):
    """Many rows as three arrays, which may be memory-mapped: an array of lists would need ten times
    the memory, and each loader process would copy it."""

    def __init__(self, tokens: NDArray, starts: NDArray, panoramas: NDArray) -> None:
        """`tokens`: (all tokens,) int32. `starts`: (2 rows + 1,) int64, of each query and answer in
        `tokens`, and the end. `panoramas`: (rows,) int32."""
        self.tokens, self.starts, self.panoramas = map(np.asarray, (tokens, starts, panoramas))

    def __len__(self) -> int:
        return len(self.panoramas)

    def __getitem__(self, row: Any) -> Any:
        row = range(len(self))[row]
        start, middle, end = self.starts[2 * row : 2 * row + 3].tolist()
        return Row(self.tokens[start:middle].tolist(), self.tokens[middle:end].tolist())

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each row."""
        return np.diff(self.starts[::2]).astype(np.int32)

    @cached_property
    def answers(self) -> NDArray[np.int32]:
        """Answer tokens of each row."""
        return (self.starts[2::2] - self.starts[1::2]).astype(np.int32)

    @property
    def ends(self) -> NDArray[np.int32]:
        """The last token of each row."""
        return self.tokens[self.starts[2::2] - 1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all arrays."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.starts, self.panoramas):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class Packed(NamedTuple):
    """Rows of several panoramas, one sequence each. All prefixes have the same length."""

    tokens: Tensor  # (batch, length) int64; values at vision tokens are not read
    positions: Tensor  # (batch, length) int64
    segments: Tensor  # (batch, length) int64: 0 prefix, 1.. rows, -1 padding
    predicts: Tensor  # (answers,) int64: flat positions whose next token is supervised
    labels: Tensor  # (answers,) int64; IGNORED at the end, where a shape has more


def packed_size(prefix: int, panoramas: list[list[Row]]) -> Shape:
    """The size of a part with these rows behind prefixes of so many tokens."""
    longest = max(sum(map(len, rows)) for rows in panoramas)
    answers = sum(len(row.answer) for rows in panoramas for row in rows)
    return Shape(len(panoramas), prefix + longest, answers)


def pack(
    text_prefix: list[int],
    vision_tokens: int,
    panoramas: list[list[Row]],
    pad: int,
    shape: Shape | None = None,
) -> Packed:
    """Pack the rows of each panorama after the prefix, and pad the sequences at their ends.

    `text_prefix`: tokens of the text before the image. `shape`: fill up to it, with sequences that
    are all padding and labels that are ignored (default: the rows' own size).

    Raises:
        UserError: a row without a supervised token.
    """
    start = len(text_prefix) + vision_tokens
    count, length, answers = shape or packed_size(start, panoramas)
    tokens = torch.full((count, length), pad)
    positions = torch.zeros((count, length), dtype=torch.int64)
    segments = torch.full((count, length), PADDING)
    tokens[:, : len(text_prefix)] = torch.tensor(text_prefix, dtype=torch.int64)
    positions[:, :start] = torch.arange(start)
    segments[: len(panoramas), :start] = 0
    predicts: list[int] = []
    labels: list[int] = []
    for sequence, rows in enumerate(panoramas):
        at = start
        for segment, row in enumerate(rows, start=1):
            if not row.answer:
                raise UserError("a row has no supervised answer token; remove it")
            end = at + len(row)
            tokens[sequence, at:end] = torch.tensor(row.query + row.answer)
            positions[sequence, at:end] = torch.arange(start, start + len(row))
            segments[sequence, at:end] = segment
            # The token before each answer token predicts it.
            first = sequence * length + at + len(row.query) - 1
            predicts += range(first, first + len(row.answer))
            labels += row.answer
            at = end
    # Different positions: the gradient of one that is read many times is slow.
    predicts += range(answers - len(labels))
    labels += [IGNORED] * (answers - len(labels))
    return Packed(tokens, positions, segments, torch.tensor(predicts), torch.tensor(labels))


def attention_mask(segments: Tensor) -> Tensor:
    """What each token may attend to: (batch, length) -> bool (batch, 1, length, length).

    Padding attends to itself, because attention over no tokens gives NaN."""
    length = segments.shape[1]
    index = torch.arange(length, device=segments.device)
    query, key = segments[:, :, None], segments[:, None, :]
    allowed = (index[:, None] >= index) & ((key == 0) | (key == query)) & (key != PADDING)
    return (allowed | (index[:, None] == index))[:, None]
