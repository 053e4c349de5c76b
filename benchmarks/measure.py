"""How the benchmarks measure: pairs in turns in one process, medians; memory in a process of its
own, because a process's peak never falls."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from panollava.logs import table

_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


# A process begins with the peak of the one that starts it, so that a small one in between does.
_WATCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Line(NamedTuple):
    """A row of the table. `ratio` is the usual way's value through ours, where it isn't given."""

    what: str
    unit: str
    ours: float
    usual: float | None = None
    limit: float | None = None  # what the machine itself allows, in the same unit
    ratio: float | None = None
    at_least: float | None = None  # that the ratio should be
    at_most: float | None = None  # that ours should be; with a limit: through the limit


def in_turns(*functions: Callable[[], object], turns: int, warm: bool = False) -> list[float]:
    """Median seconds of each; if they aren't `warm`, a first turn isn't counted."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(int(warm), turns + 1):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def run(command: Sequence[str | Path], folder: Path) -> tuple[float, float]:
    """Seconds and peak GB of a process; its output is shown if it fails."""
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


def write(path: Path, lines: Sequence[Line]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([line._asdict() for line in lines], indent=1) + "\n")


def read(path: Path) -> list[Line]:
    return [Line(**line) for line in json.loads(path.read_text())]


def show(lines: Sequence[Line]) -> str:
    header = ("what", "unit", "ours", "the usual way", "ratio", "limit", "to reach", "reached")
    return table([_cells(line) for line in lines], header)


def _cells(line: Line) -> tuple[str, ...]:
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
        f"{line.ours:.4g}",
        "-" if line.usual is None else f"{line.usual:.4g}",
        "-" if ratio is None else f"{ratio:.2f}",
        "-" if line.limit is None else f"{line.limit:.4g}",
        ", ".join(text for text, _ in goals) or "-",
        ", ".join("yes" if good else "no" for _, good in goals) or "-",
    )
