"""Curves of a training stage as lines of a drawing, which a page shows as SVG."""

import math
from pathlib import Path
from typing import NamedTuple

from panollava import paths
from panollava.errors import UserError

WIDTH, HEIGHT = 320, 170  # of a chart's plane, in pixels of the page
_POINTS = 400  # of a line, at most
_FIRST = ("accuracy", "loss")
_NAMES = {"train": "training", "val": "validation"}


class Line(NamedTuple):
    name: str
    points: list[tuple[float, float]]  # step and value


class Chart(NamedTuple):
    """`x_ticks`, `y_ticks`: places in the plane, from its upper left corner, and their labels."""

    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    places: list[list[tuple[float, float]]]  # of the points of each line

    @property
    def description(self) -> str:
        """The chart in words, for those who do not see it."""
        ends = (f"{n} from {p[0][1]:.4g} to {p[-1][1]:.4g}" for n, p in self.lines)
        return f"{self.title} by step: {', '.join(ends)}"


def stage_charts(stage: str) -> list[Chart]:
    """A chart for each quantity that the stage recorded: training and validation, or the groups of
    parameters, are its lines. Quantities without a finite value are left out.

    Raises:
        UserError: no curves, or a damaged file.
    """
    folder = paths.curves_folder(stage) / "plots"
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; run: dvc repro {stage} "
            f"(without DVC: panollava train {stage})"
        )
    quantities: dict[str, list[Line]] = {}
    for file in sorted(folder.glob("metrics/**/*.tsv")):
        split, quantity, *group = file.relative_to(folder / "metrics").with_suffix("").parts
        name = group[0] if group else _NAMES.get(split, split)
        if points := _read(file, stage):
            quantities.setdefault(quantity, []).append(Line(name, points))
    names = sorted(quantities, key=lambda name: (name not in _FIRST, name))
    return [draw(name.replace("_", " "), quantities[name]) for name in names]


def _read(file: Path, stage: str) -> list[tuple[float, float]]:
    try:
        _, *lines = file.read_text(encoding="utf-8").splitlines()
        cells = [line.split("\t") for line in lines]
        points = [(float(step), float(value)) for step, value in cells]
    except ValueError as error:
        raise UserError(
            f"{file}: not a curve ({error}); remove it, and run: dvc repro {stage}"
        ) from None
    finite = [point for point in points if all(map(math.isfinite, point))]
    every = math.ceil(len(finite) / _POINTS) or 1
    return [*finite[:-1:every], *finite[-1:]]


def draw(title: str, lines: list[Line]) -> Chart:
    steps, values = zip(*(point for line in lines for point in line.points), strict=True)
    low, high = min(values), max(values)
    low = 0 if 0 <= low < high / 2 else low
    x, y = _Axis(0, max(steps), 0, WIDTH, whole=True), _Axis(low, high, HEIGHT, 0)
    places = [[(x.place(step), y.place(value)) for step, value in line.points] for line in lines]
    return Chart(title, lines, x.ticks(), y.ticks(), places)


class _Axis:
    """Values from `low` to `high`, rounded to ticks, in the plane between the places `start` and
    `end`. `whole`: ticks are whole numbers."""

    def __init__(self, low: float, high: float, start: int, end: int, whole: bool = False) -> None:
        span = (high - low) or 1.0
        power = 10.0 ** math.floor(math.log10(span / 4))
        step = next(n * power for n in (1, 2, 5, 10) if n * power * 5 >= span)
        self.step = max(step, 1) if whole else step
        self.first = math.floor(low / self.step)
        self.last = max(math.ceil(high / self.step), self.first + 1)
        self.start, self.end = start, end

    def place(self, value: float) -> float:
        share = (value / self.step - self.first) / (self.last - self.first)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        values = (number * self.step for number in range(self.first, self.last + 1))
        return [(self.place(value), f"{value:.6g}") for value in values]
