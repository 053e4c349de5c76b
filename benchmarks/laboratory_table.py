"""The laboratory's table: each variant's scores, and the differences to the variant it is compared
with, paired by seed."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from crossed_intervals import influence, interval
from variants import base_of

SCORES = {  # columns, by the name of the counts
    "color by direction": "color_by_direction",
    "color, shape by direction": "color_shape_by_direction",
    "number": "count",
    "largest": "largest",
    "all around": "around",
    "stays, turned by 45°": "stays, turned by 45",
    "turns, by 180°": "turns, turned by 180",
}
ENOUGH_SEEDS = 8  # for a claim
SMALLEST = 0.0005  # an interval of almost no width comes from a score with few distinct values

Counts = dict[int, dict[str, list]]  # by seed and score


def read_results(folder: Path, commit: str, variants: list[str]) -> dict[str, Counts]:
    """The results of one version of the code, by variant."""
    results: dict[str, Counts] = {}
    for file in folder.glob(f"*.{commit}.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        results.setdefault(result["variant"], {})[result["seed"]] = result["counts"]
    return {variant: results[variant] for variant in variants if variant in results}


def format_table(results: dict[str, Counts]) -> str:
    rows = [
        (variant, len(runs), *(describe(results, variant, key) for key in SCORES.values()))
        for variant, runs in results.items()
    ]
    return tabulate(rows, ("variant", "seeds", *SCORES), tablefmt="github", disable_numparse=True)


def describe(results: dict[str, Counts], variant: str, score: str) -> str:
    """The mean over seeds with its 95% interval; or, with the variant it is compared with, the
    paired difference and its interval, in bold if it excludes 0 with enough seeds."""
    runs, base = results[variant], results.get(base_of(variant) or "", {})
    seeds = sorted(runs.keys() & base.keys()) or sorted(runs)
    values = _values(runs, seeds, score)
    if values is None:
        return "–"
    mean, half_width = interval(values)
    if not runs.keys() & base.keys():
        return f"{mean:.3f}" if np.isnan(half_width) else f"{mean:.3f} ± {half_width:.3f}"
    compared = _values(base, seeds, score)
    assert compared is not None, "both answered the same questions"
    difference, half_width = interval(values - compared)
    known = f" ± {half_width:.3f}" if not np.isnan(half_width) else ""
    text = f"({difference:+.3f}{known})"
    clear = len(seeds) >= ENOUGH_SEEDS and abs(difference) > half_width >= SMALLEST
    return f"{mean:.3f} **{text}**" if clear else f"{mean:.3f} {text}"


def _values(runs: Counts, seeds: list[int], score: str) -> NDArray | None:
    """(seeds, panoramas), see `influence`; None for a score that some of them do not have."""
    if any(score not in runs[seed] for seed in seeds):
        return None
    return influence(np.array([runs[seed][score] for seed in seeds]))


def write_table(table: str, page: Path) -> None:
    """Replace the table in a page, between its markers."""
    begin, end = "<!-- table -->\n", "<!-- end of the table -->"
    text = page.read_text(encoding="utf-8")
    head, tail = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{head}{begin}\n{table}\n\n{end}{tail}", encoding="utf-8")
