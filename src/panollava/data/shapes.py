"""Few shapes: the parts of a stage's steps are padded to a small set of shapes, so that a GPU
repeats few programs.

The set is a function of the plan of all epochs, not of earlier steps: a resumed run has the same.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

# Of a stage. Each is captured and compiled by itself; twice as many save 1% of the tokens.
MAX_SHAPES = 8
_ALIGNMENT = 8  # tokens: attention kernels copy a mask whose rows are not aligned
# Of a sequence token: what an answer token's logits cost (Qwen2.5-0.5B: 136 million weights in its
# head, 358 million in its layers).
_ANSWER_COST = 0.4


class Shape(NamedTuple):
    """The size of a part, or the shape that it is padded to."""

    panoramas: int
    length: int = 1  # tokens of a sequence; 1: the stage has no sequences
    answers: int = 0  # supervised tokens of all sequences

    @property
    def tokens(self) -> int:
        return self.panoramas * self.length

    def holds(self, size: "Shape") -> bool:
        return all(room >= needed for room, needed in zip(self, size, strict=True))


Choice = tuple[float, list[Shape]]  # padded tokens, and the shapes


def choose_shapes(sizes: Iterable[Shape], most: int = MAX_SHAPES) -> list[Shape]:
    """At most `most` shapes that hold all sizes, or their `Counter`, with the fewest padded tokens,
    largest first.

    Dynamic programming, twice: which neighboring numbers of panoramas share the largest of them,
    and where the lengths of each such group are divided."""
    counts: Counter[Shape] = Counter()
    for size, times in Counter(sizes).items():
        counts[size._replace(length=_aligned(size.length))] += times
    numbers = sorted({size.panoramas for size in counts})
    best: list[list[Choice]] = [[(0.0, [])] * (most + 1)]  # [numbers covered][shapes]
    for end in range(1, len(numbers) + 1):
        choices: list[list[Choice]] = [[(np.inf, [])] for _ in range(most + 1)]
        for start in range(end):
            covered = set(numbers[start:end])
            group = {size: n for size, n in counts.items() if size.panoramas in covered}
            for used, (cost, shapes) in enumerate(_divide(group, max(covered), most), start=1):
                for k in range(used, most + 1):
                    before, others = best[start][k - used]
                    choices[k].append((before + cost, others + shapes))
        best.append([min(each) for each in choices])
    return sorted(best[-1][most][1], key=lambda shape: (-shape.tokens, shape))


def _aligned(length: int) -> int:
    return length if length == 1 else -(-length // _ALIGNMENT) * _ALIGNMENT


def _divide(sizes: dict[Shape, int], panoramas: int, most: int) -> list[Choice]:
    """The best 1, 2, ... shapes with this number of panoramas, at most `most`."""
    lengths = sorted({size.length for size in sizes})
    count = len(lengths)
    parts, answers = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for size, times in sizes.items():
        at = lengths.index(size.length)
        parts[at] += times
        answers[at] = max(answers[at], size.answers)
    # cost[first, end]: of one shape for the lengths from `first` to before `end`.
    cost = np.full((count, count + 1), np.inf)
    for first in range(count):
        head = np.maximum.accumulate(answers[first:])
        each = panoramas * np.array(lengths[first:]) + _ANSWER_COST * head
        cost[first, first + 1 :] = np.cumsum(parts[first:]) * each
    total = np.array([0.0] + [np.inf] * count)  # of the shapes so far, for the first lengths
    results: list[Choice] = []
    starts: list[np.ndarray] = []  # of the last shape, for each number of covered lengths
    for _ in range(min(most, count)):
        joined = total[:-1, None] + cost
        starts.append(joined.argmin(axis=0))
        total = joined.min(axis=0)
        end, shapes = count, []
        for before in reversed(starts):
            first = int(before[end])
            supervised = int(answers[first:end].max())
            shapes.append(Shape(panoramas, lengths[end - 1], supervised))
            end = first
        results.append((float(total[-1]), shapes))
    return results


def fit(size: Shape, shapes: Sequence[Shape]) -> Shape:
    """The smallest shape that holds a part."""
    return min((s for s in shapes if s.holds(size)), key=lambda s: (s.tokens, s))


def describe(shapes: Sequence[Shape], sizes: Iterable[Shape]) -> str:
    """A table of the shapes, how many parts each has, and the padding that they add."""
    counts, used = Counter(sizes), Counter[Shape]()
    for size, times in counts.items():
        used[fit(size, shapes)] += times
    padded, needed = (sum(s.tokens * n for s, n in each.items()) for each in (used, counts))
    share = padded / max(1, needed) - 1
    table = tabulate(
        [(*shape, used[shape]) for shape in shapes],
        ("panoramas", "sequence length", "answer tokens", "parts"),
        tablefmt="plain",
    )
    return f"{len(shapes)} shapes, {share:.1%} more tokens than without them\n{table}"
