"""How the benchmarks measure: alternating runs in one process, medians; peak memory in a process of
its own, because the peak of a process never falls. Also their options and their table."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

ROOT = Path(__file__).parents[1]
PANOLLAVA = (sys.executable, str(ROOT / "src/run.py"))  # the command line, without installation

_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
# A process inherits the peak of the process that starts it. This small one starts the command.
_WATCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Line(NamedTuple):
    """A row of the table. The default `ratio` is the usual way's value over ours."""

    what: str
    unit: str
    ours: float
    usual: float | None = None
    limit: float | None = None  # what the machine allows, in the same unit
    ratio: float | None = None
    at_least: float | None = None  # goal for the ratio
    at_most: float | None = None  # goal for our value, as a multiple of the limit if there is one


def options_parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """The options that all sections of `compare` have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the lines here as JSON, print nothing")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each")
    return parser


def time_alternately(
    *functions: Callable[[], object], repeats: int, warm: bool = False
) -> list[float]:
    """Median seconds of each function. Unless they are `warm`, a first run is not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(int(warm), repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def run(command: Sequence[str | Path], folder: Path) -> tuple[float, float]:
    """Seconds and peak GB of a process. Its output is shown only if it fails."""
    start = time.perf_counter()
    peak = folder / "peak"
    watched = [sys.executable, "-I", "-S", "-c", _WATCH, str(peak), *command]
    with (folder / "output.log").open("w+") as output:
        done = subprocess.run(watched, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        seconds = time.perf_counter() - start
        if done.returncode:
            output.seek(0)
            sys.stderr.write(output.read())
            raise subprocess.CalledProcessError(done.returncode, command)
    return seconds, int(peak.read_text()) * _BYTES / 1e9


def report(lines: Sequence[Line], out: Path | None) -> None:
    """Write the lines to `out`, or print them as a table."""
    if out is None:
        sys.stdout.write(format_table(lines) + "\n")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([line._asdict() for line in lines], indent=1) + "\n")


def read(path: Path) -> list[Line]:
    return [Line(**line) for line in json.loads(path.read_text())]


def format_table(lines: Sequence[Line]) -> str:
    headers = ("what", "unit", "ours", "the usual way", "ratio", "limit", "goal", "reached")
    formats = ("", "", ".4g", ".4g", ".2f", ".4g")
    rows = [_cells(line) for line in lines]
    return tabulate(rows, headers, tablefmt="plain", floatfmt=formats, missingval="-")


def _cells(line: Line) -> tuple[str | float | None, ...]:
    ratio = line.ratio
    if ratio is None and line.usual is not None:
        ratio = line.usual / line.ours
    goals = []
    if line.at_least is not None:
        goals.append((f"ratio ≥ {line.at_least:g}", (ratio or 0) >= line.at_least))
    if line.at_most is not None and line.limit is not None:
        goals.append((f"≤ {line.at_most:g} x limit", line.ours <= line.at_most * line.limit))
    elif line.at_most is not None:
        goals.append((f"≤ {line.at_most:g}", line.ours <= line.at_most))
    return (
        line.what,
        line.unit,
        *map(_to_float, (line.ours, line.usual, ratio, line.limit)),
        ", ".join(text for text, _ in goals) or None,
        ", ".join("yes" if good else "no" for _, good in goals) or None,
    )


def _to_float(value: float | None) -> float | None:
    return None if value is None else float(value)
