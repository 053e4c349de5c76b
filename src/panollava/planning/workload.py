"""The steps that a stage will train, and the heaviest of them, from its rows alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from panollava import paths
from panollava.config import Settings
from panollava.data.batches import Step, divide, labeled_rows, plan_epoch, read_prepared_rows
from panollava.data.packing import Row
from panollava.data.rows import COLUMNS, NOT_DOWNLOADED, read_rows
from panollava.stages import Stage

Part = list[list[Row]]  # the rows of each of its panoramas


@dataclass(frozen=True)
class Workload:
    steps: int | None  # None: there are no rows to count
    heaviest: list[list[Part]]  # steps: which is the heaviest depends on the model
    prefix: int  # tokens before the rows of a sequence; 0: the stage has no sequences

    @property
    def panoramas(self) -> int:
        """At most in a step."""
        return max((sum(map(len, step)) for step in self.heaviest), default=0)

    @property
    def panoramas_at_once(self) -> int:
        """At most in a part of a step."""
        return max((len(part) for step in self.heaviest for part in step), default=0)

    @property
    def longest_sequence(self) -> int:
        parts = [part for step in self.heaviest for part in step]
        return self.prefix and self.prefix + max(map(_longest, parts), default=0)


def find_workload(objective: Any, settings: Settings, stage: Stage, accumulate: int) -> Workload:
    """Of all epochs, each step in `accumulate` parts. Without rows, each panorama of a step has
    one row of the full length, which is more than any step with rows can take.

    Raises UserError for a row that leaves no answer."""
    own = getattr(settings.stage, stage.name)
    found = read_split(settings, "train")
    train = None if found is None else found[0]
    dialogue = getattr(objective, "dialogue", None)  # None: it reads no text
    if train is None:
        length = dialogue.max_text_length if dialogue else 1
        panoramas = {index: [Row([0], [0] * (length - 1))] for index in range(own.batch_size)}
    elif dialogue is None:
        panoramas = {int(index): [Row([], [])] for index in train["panorama"].unique()}
    else:
        panoramas = {}
        train = labeled_rows(train, own.labeled)
        for row in train.itertuples():
            tokens = dialogue.row(row.query, row.annotation, f"row {row.row} ({row.url})")
            panoramas.setdefault(int(row.panorama), []).append(tokens)
    numbers = {panorama: list(range(len(rows))) for panorama, rows in panoramas.items()}
    steps = [
        step
        for epoch in range(own.epochs)
        for step in plan_epoch(numbers, own.batch_size, settings.seed, epoch)
    ]
    prefix = len(dialogue.prefix) + objective.vision_tokens if dialogue else 0
    divided = [_divide(step, panoramas, accumulate) for step in steps]
    return Workload(None if train is None else len(steps), _heaviest(divided, prefix), prefix)


def read_split(settings: Settings, split: str) -> tuple[pd.DataFrame, Path] | None:
    """The rows of `data.dir`, and their file: what `prepare` wrote, if it is of these rows; else
    the CSV, with the rows whose pictures are still to be fetched. None if there is no CSV."""
    file = Path(settings.data.dir) / f"{split}.csv"
    if not file.is_file():
        return None
    rows, rejects = read_rows(file, Path())
    prepared = paths.PREPARED / split / "rows.csv"
    rejected = prepared.with_name("rejects.csv")
    if prepared.is_file() and rejected.is_file():
        written = read_prepared_rows(prepared)
        if _texts(written, read_prepared_rows(rejected)) == _texts(rows, rejects):
            return written, prepared
    waiting = rejects[rejects["reason"] == NOT_DOWNLOADED]
    found = pd.concat([rows, waiting]).sort_values("row")
    return found.assign(panorama=pd.factorize(found["url"])[0]), file


def _texts(*tables: pd.DataFrame) -> set[tuple[Any, ...]]:
    """The rows of all tables, with their numbers, as they stand in a CSV."""
    columns = ["row", *COLUMNS]
    return {row for table in tables for row in table[columns].itertuples(index=False, name=None)}


def _divide(step: Step, panoramas: dict[int, list[Row]], accumulate: int) -> list[Part]:
    return [
        [[panoramas[panorama][index] for index in rows] for panorama, rows in part]
        for part in divide(step, accumulate)
    ]


def _heaviest(steps: list[list[Part]], prefix: int) -> list[list[Part]]:
    """The step with the largest part in tokens, and that in answer tokens, which have logits."""

    def tokens(part: Part) -> int:
        return len(part) * (prefix + _longest(part)) if prefix else len(part)

    def answers(part: Part) -> int:
        return sum(len(row.answer) for rows in part for row in rows)

    if not steps:
        return []
    found = [max(steps, key=lambda step: max(map(size, step))) for size in (tokens, answers)]
    return found[:1] if found[0] is found[1] else found


def _longest(part: Part) -> int:
    """Tokens of the rows of its longest sequence."""
    return max(sum(map(len, rows)) for rows in part)
