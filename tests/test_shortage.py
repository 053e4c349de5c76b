"""Too little memory, for real: the process may have no more than a limit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, save_encoder, save_panorama, write_rows
from panollava import paths
from panollava.cli import main as cli

LIMITED = """
import resource, sys
import psutil
from panollava.cli import main as cli
from panollava.planning import out_of_memory as shortage
from panollava.training import train
limit = psutil.Process().memory_info().vms + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
cli.main(["train", "vision"])
"""
ROOM = 600_000_000  # bytes beside the program: enough for half of a step


@pytest.fixture
def wide(project: Path) -> Path:
    """Sixteen panoramas a step, and an encoder whose activations are large beside its weights."""
    save_encoder(Path("towers/encoder"), size=64, width=512)
    for split in ("train", "valid", "test"):
        names = [f"images/{split}_{index}.jpg" for index in range(16)]
        for index, name in enumerate(names):
            save_panorama(Path("wide") / name, index)
        write_rows(Path(f"wide/{split}.csv"), [(name, "what", "a box") for name in names])
    text = re.sub(r"dir: .*", "dir: wide", paths.PARAMS.read_text(), count=1)
    text = re.sub(r"path: \S+encoder", "path: towers/encoder", text)
    text = text.replace("size: 32", "size: 64").replace("batch_size: 4", "batch_size: 16")
    paths.PARAMS.write_text(text)
    cli.main(["prepare"])
    return project


def train(room: int) -> tuple[int, str]:
    """Exit status and last line."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(room)],
        env={"PYTHONPATH": str(ROOT / "src"), "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_a_training_that_runs_out_of_memory_fits_with_the_value_that_it_names(wide: Path) -> None:
    status, said = train(ROOM)
    pattern = (
        r"error: out of memory: (\S+) GB were used at the peak, and (\S+) GB are there for this "
        r"run\. Set stage\.vision\.accumulate to (\d+) \(now 1\): that takes about (\S+) GB"
    )
    found = re.match(pattern, said)
    assert status == 1 and found, said
    peak, free, parts, need = map(float, found.groups())
    assert need < peak <= free * 1.05
    text = paths.PARAMS.read_text()
    paths.PARAMS.write_text(text.replace("accumulate: 1", f"accumulate: {parts:.0f}", 1))
    status, said = train(ROOM)
    assert status == 0, said


def test_where_nothing_fits_the_least_is_told(wide: Path) -> None:
    status, said = train(150_000_000)
    assert status == 1 and "is the least that this batch can do with: lower" in said, said
    assert re.search(r"stage\.vision\.accumulate 16 with trainer\.gradient_checkpointing", said)
