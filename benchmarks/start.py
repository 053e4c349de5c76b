"""From the command `train resampler` to its first step: seconds, seconds of the processor (other
programs do not count), and the peak memory of the main process. 10^4, 10^5 and 10^6 panoramas of
one tiny view and three rows of different texts, first without cached tokens, then with them.

    python benchmarks/start.py --sizes 10000 100000"""

import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import psutil

from helpers import WORDS, save_encoder, save_language_model
from measure import PANOLLAVA, ROOT, Line, options_parser, report
from panollava import paths
from panollava.config import load_settings
from panollava.data.rows import SPLITS
from panollava.data.shards import Shard, write_manifest
from panollava.provenance.fingerprint import file_sha256
from panollava.provenance.made_from import hash_source, record_prepared

SIZE = 16  # pixels of a view
SHARD = 1000  # panoramas
ROWS = (1, 5)  # per panorama: 3 on average
OTHERS = 8  # panoramas of valid and test
SECONDS, GB = 30.0, 4.0  # goals with the most panoramas
CURVE = paths.curves_folder("resampler") / "plots/metrics/train/loss.tsv"


def main() -> None:
    parser = options_parser(__doc__, repeats=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 10**6])
    options = parser.parse_args()
    lines: list[Line] = []
    for count in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            make_project(Path(name), count)
            for tokens in ("no tokens", "tokens"):
                what = f"start of resampler, {count} panoramas, {tokens} cached"
                units = ("s", "s of CPU", "GB")
                goals = (SECONDS, None, GB) if tokens == "tokens" else (None, None, None)
                for value, unit, goal in zip(first_step(Path(name)), units, goals, strict=True):
                    lines.append(Line(what, unit, value, at_most=goal))
    report(lines, options.out)


def make_project(folder: Path, panoramas: int) -> None:
    """Random towers, prepared views and rows, and the result of `vision` after no epochs."""
    save_encoder(folder / "towers/encoder", SIZE)
    save_language_model(folder / "towers/language_model")
    text = (ROOT / "params.yaml").read_text()
    for old, new in (
        ("data/demo/towers", "towers"),
        ("dir: data/demo", "dir: data"),
        ("strategy: e2p", "strategy: resize"),
        (r"size: 64", f"size: {SIZE}"),
        ("tokens: sphere\n", "tokens: views\n"),
        (r"max_text_length: \d+", "max_text_length: 200"),
        (r"log_every: \d+", "log_every: 1"),
        (r"rolls: \[.*\]", "rolls: []"),
    ):
        text, found = re.subn(old, new, text)
        assert found, old
    (folder / paths.PARAMS).write_text(text)
    prepare(folder, OTHERS)
    command = [*PANOLLAVA, "train", "vision", "--epochs", "0"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    prepare(folder, panoramas)


def prepare(folder: Path, panoramas: int) -> None:
    """What `prepare` leaves, with so many panoramas in train."""
    out, digests, sources = folder / paths.PREPARED, {}, {}
    for split in SPLITS:
        count, source = panoramas if split == "train" else OTHERS, folder / f"data/{split}.csv"
        digests[f"{split}/{paths.PANORAMAS}"] = write_views(out / split / paths.PANORAMAS, count)
        write_rows(out / split, source, count)
        sources[split] = hash_source(source)
    record_prepared(load_settings(folder / paths.PARAMS), out, digests, sources)


def write_views(out: Path, count: int) -> str:
    generator, shape, shards = np.random.default_rng(0), (1, SIZE, SIZE, 3), []
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for number, first in enumerate(range(0, count, SHARD)):
        file, panoramas = out / f"{number:06d}.npy", min(SHARD, count - first)
        np.save(file, generator.integers(0, 256, (panoramas, *shape), dtype=np.uint8))
        shards.append(Shard(file.name, panoramas, file.stat().st_size, file_sha256(file)))
    return write_manifest(out, shards, None, shape, "uint8")


def write_rows(out: Path, source: Path, count: int) -> None:
    """rows.csv and rejects.csv, and the CSV file that they come from."""
    source.parent.mkdir(exist_ok=True)
    header = '"url","query","annotation"'
    with (out / "rows.csv").open("w") as rows, source.open("w") as csv:
        rows.write(f'"panorama","row",{header}\n')
        csv.write(f"{header}\n")
        for number, (panorama, texts) in enumerate(make_rows(count)):
            rows.write(f"{panorama},{number},{texts}\n")
            csv.write(f"{texts}\n")
    (out / "rejects.csv").write_text(f'"row",{header},"reason"\n')


def make_rows(count: int) -> Iterator[tuple[int, str]]:
    """A panorama, and the texts of one of its rows."""
    draw, number = random.Random(0), 0
    for panorama in range(count):
        for _ in range(draw.randint(*ROWS)):
            asked, said = (" ".join(draw.choices(WORDS, k=words)) for words in (6, 12))
            yield panorama, f'"{panorama}.jpg","{asked} {number}","{said} {number}"'
            number += 1


def first_step(folder: Path) -> tuple[float, float, float]:
    """Seconds until the first point of a curve is written, those of CPU of the main process and its
    finished children, and the peak of the main process in GB. The command is killed then."""
    curve = folder / CURVE
    curve.unlink(missing_ok=True)
    shutil.rmtree(folder / paths.RESUME, ignore_errors=True)
    start = time.perf_counter()
    with (folder / "output.log").open("w") as output:
        command = [*PANOLLAVA, "train", "resampler"]
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
    while not curve.is_file():
        assert process.poll() is None, (folder / "output.log").read_text()
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    status = Path(f"/proc/{process.pid}/status").read_text()
    used = sum(psutil.Process(process.pid).cpu_times()[:4])
    process.send_signal(signal.SIGKILL)
    process.wait()
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert peak
    return seconds, used, int(peak[1]) / 1e6


if __name__ == "__main__":
    main()
