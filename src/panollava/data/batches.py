"""What `prepare` and `features` wrote, memory-mapped, and its batches."""

from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from panollava.arrays import open_array
from panollava.data.dialogue import Dialogue, Packed, Row, pack
from panollava.data.steps import Step, divide, plan_epoch
from panollava.errors import UserError

BatchT = TypeVar("BatchT", covariant=True)


class Reader(Protocol[BatchT]):
    """Plans a split's epochs, and loads the parts of a step."""

    files: tuple[Path, ...]  # all that it reads

    def plan(self, epoch: int | None) -> list[Step]: ...

    def load(self, part: Step) -> BatchT: ...


class StepDataset(Dataset[list[BatchT]], Generic[BatchT]):
    """The steps of an epoch from `start` on, each in at most `accumulate` parts."""

    def __init__(
        self, reader: Reader[BatchT], epoch: int | None, accumulate: int, start: int = 0
    ) -> None:
        self.reader = reader
        self.steps = reader.plan(epoch)[start:]
        self.accumulate = accumulate

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> list[BatchT]:
        parts = divide(self.steps[index], self.accumulate)
        return [self.reader.load(part) for part in parts]


def read_prepared_rows(path: Path) -> pd.DataFrame:
    """Columns panorama, row, url, query, annotation; all text as it stands."""
    try:
        return pd.read_csv(
            path, dtype={"url": str, "query": str, "annotation": str}, keep_default_na=False
        )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run: dvc repro prepare") from None


def labelled_rows(rows: pd.DataFrame, share: float) -> pd.DataFrame:
    """The rows of a random share of the panoramas, at least of one; those of a smaller share are
    among those of a larger one."""
    panoramas = np.random.default_rng(0).permutation(rows["panorama"].unique())
    kept = panoramas[: max(1, round(share * len(panoramas)))]
    return rows[rows["panorama"].isin(kept)]


class ViewReader:
    """Views alone; a step's batch size counts panoramas."""

    def __init__(self, views: Path, batch_size: int, seed: int) -> None:
        self.files = (views,)
        self.array = open_array(views)
        self.batch_size, self.seed = batch_size, seed

    def plan(self, epoch: int | None) -> list[Step]:
        panoramas = {panorama: [panorama] for panorama in range(len(self.array))}
        return plan_epoch(panoramas, self.batch_size, self.seed, epoch)

    def load(self, part: Step) -> Tensor:
        """uint8 (panoramas, views, size, size, 3)."""
        return gather(self.array, [panorama for panorama, _ in part])


class TextBatch(NamedTuple):
    vision: Tensor  # views or features, (panoramas, views, ...)
    packed: Packed
    rows: int


class TextReader:
    """Rows packed behind their panoramas; a step's batch size counts rows."""

    def __init__(
        self,
        vision: Path,
        rows: Path,
        dialogue: Dialogue,
        vision_tokens: int,
        batch_size: int,
        seed: int,
        labelled: float,
    ) -> None:
        """Tokenizes the rows of the share `labelled` of the panoramas. Raises UserError for one
        that leaves no answer."""
        self.files = (vision, rows)
        self.array = open_array(vision)
        self.dialogue, self.vision_tokens = dialogue, vision_tokens
        self.batch_size, self.seed = batch_size, seed
        table = labelled_rows(read_prepared_rows(rows), labelled)
        self.rows: list[Row] = [
            dialogue.row(row.query, row.annotation, place=f"{rows}, row {row.row} ({row.url})")
            for row in table.itertuples()
        ]
        self.cut = sum(row.answer[-1] != dialogue.stop for row in self.rows)
        if table["panorama"].max() >= len(self.array):
            raise UserError(
                f"{vision}: holds {len(self.array)} panoramas, but {rows} has rows of panorama "
                f"{table['panorama'].max()}; run: dvc repro"
            )
        self.by_panorama: dict[int, list[int]] = {}
        for index, panorama in enumerate(table["panorama"]):
            self.by_panorama.setdefault(int(panorama), []).append(index)

    def plan(self, epoch: int | None) -> list[Step]:
        return plan_epoch(self.by_panorama, self.batch_size, self.seed, epoch)

    def load(self, part: Step) -> TextBatch:
        packed = pack(
            self.dialogue.prefix,
            self.vision_tokens,
            [[self.rows[index] for index in rows] for _, rows in part],
            self.dialogue.pad,
        )
        count = sum(len(rows) for _, rows in part)
        return TextBatch(gather(self.array, [panorama for panorama, _ in part]), packed, count)


def gather(array: NDArray, index: list[int]) -> Tensor:
    """Rows of a memory-mapped array, copied into memory; half precision becomes single."""
    rows = np.stack([array[i] for i in index])
    return torch.from_numpy(rows if rows.dtype != np.float16 else rows.astype(np.float32))
