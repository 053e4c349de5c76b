"""Two processes of one thread against one process of one thread, in turns: `features`, and steps of
`resampler`. Both end in the same bytes.

The project is a small one with random towers, whose work takes much longer than its exchange. Rates
leave out the start of a command.

    python benchmarks/devices.py --repeats 3
"""

import argparse
import hashlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tabulate import tabulate

from helpers import (
    WORDS,
    save_encoder,
    save_language_model,
    save_panorama,
    write_params,
    write_rows,
)
from measure import PANOLLAVA

GOALS = {"features": 1.6, "resampler": 1.5}
ROWS, PARTS = 3, 4
_FEATURES = re.compile(r"^(\S+ \S+) INFO .*: features of (\d+) panoramas", re.MULTILINE)


def make_project(folder: Path, panoramas: int) -> None:
    """Panoramas with their rows, and towers with random weights."""
    save_encoder(folder / "towers/encoder", 64, width=192)
    save_language_model(folder / "towers/language_model", width=128)
    for split, count in (("train", panoramas), ("valid", panoramas), ("test", 2)):
        rows = []
        for index in range(count):
            name = f"images/{split}_{index}.jpg"
            save_panorama(folder / "data" / name, index)
            rows += [(name, WORDS[row], f"the {WORDS[5 + row]} box.") for row in range(ROWS)]
        write_rows(folder / f"data/{split}.csv", rows)
    params = folder / "params.yaml"
    write_params(params, folder / "towers", folder / "data")
    text = (
        params.read_text().replace("size: 32", "size: 64").replace("threads: 2 #", "threads: 1 #")
    )
    for key, value in (("save_every", 1000), ("log_every", 1), ("accumulate", PARTS)):
        text = re.sub(rf"\b{key}: \d+", f"{key}: {value}", text)
    text = re.sub(r"batch_size: \d+", f"batch_size: {ROWS * 16}", text)
    params.write_text(text)
    run(folder, "prepare")
    run(folder, "train", "vision", "--epochs", "0")


def run(folder: Path, *arguments: str) -> str:
    """The new log of a command."""
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    shutil.rmtree(folder / "logs", ignore_errors=True)
    subprocess.run([*PANOLLAVA, *arguments], cwd=folder, env=environment, check=True)
    (log,) = (folder / "logs").iterdir()
    return log.read_text()


def features(folder: Path, devices: int) -> float:
    """Panoramas of `valid` per second, whose work lies between two lines of the log."""
    params = folder / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("  devices: 1 #", f"  devices: {devices} #"))
    log = run(folder, "features")
    params.write_text(text)
    (start, _), (end, count), *_ = _FEATURES.findall(log)
    times = (datetime.strptime(each, "%Y-%m-%d %H:%M:%S,%f") for each in (end, start))
    last, first = times
    return int(count) / (last - first).total_seconds()


def resampler(folder: Path, devices: int) -> float:
    """Rows per second, the median over the steps."""
    shutil.rmtree(folder / ".resume", ignore_errors=True)
    run(folder, "train", "resampler", "--epochs", "4", "--devices", str(devices))
    file = folder / "metrics/speed/resampler/plots/metrics/rows_per_second.tsv"
    return statistics.median(float(line.split()[1]) for line in file.read_text().splitlines()[2:])


def results(folder: Path) -> str:
    files = [*(folder / "runs/features").rglob("*.npy"), *folder.glob("runs/*/*.safetensors")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    parser.add_argument("--panoramas", type=int, default=64, help="in train and valid each")
    options = parser.parse_args()
    rates: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_project(folder, options.panoramas)
        seen = set()
        for _ in range(options.repeats):
            for devices in (1, 2):
                for work in (resampler, features):
                    rates.setdefault((work.__name__, devices), []).append(work(folder, devices))
                seen.add(results(folder))
    lines = []
    for work_name, goal in GOALS.items():
        one, two = (statistics.median(rates[work_name, devices]) for devices in (1, 2))
        lines.append((work_name, one, two, two / one, goal))
    headers = ("per second", "1 process", "2 processes", "ratio", "goal")
    sys.stdout.write(tabulate(lines, headers, floatfmt=".2f") + "\n")
    sys.stdout.write(f"same bytes: {len(seen) == 1}\n")
    sys.exit(len(seen) != 1)


if __name__ == "__main__":
    main()
