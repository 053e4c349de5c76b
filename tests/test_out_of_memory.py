"""Promises about running out of memory, in a process with a real limit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, save_encoder, save_panorama, write_rows
from panollava import paths
from panollava.cli import main as cli
from panollava.config import load_settings
from panollava.errors import UserError
from panollava.planning import out_of_memory
from panollava.planning.plan import memory_with
from panollava.stages import STAGES

LIMITED = """
import resource, sys
import psutil
from panollava import config, paths
from panollava.cli import main as cli
from panollava.planning import lengths, out_of_memory
from panollava.training import train
# Address space that the tokenizer's threads reserve, mostly without using it.
lengths.check_lengths(config.load_settings(paths.PARAMS))
limit = psutil.Process().memory_info().vms + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
cli.main(["train", "vision"])
"""
BUDGET = 600_000_000  # bytes besides the program: enough for half of a step


@pytest.fixture
def wide(project: Path) -> Path:
    """Sixteen panoramas per step, and an encoder whose activations are larger than its weights."""
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


def train(budget: int) -> tuple[int, str]:
    """Exit status and last line."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(budget)],
        env={
            "PYTHONPATH": str(ROOT / "src"),
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            # Without a fixed value, glibc wastes a fifth of so little memory, or less by chance.
            "MALLOC_MMAP_THRESHOLD_": "262144",
        },
        text=True,
        capture_output=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_a_training_that_ran_out_of_memory_fits_with_the_suggested_value(wide: Path) -> None:
    status, message = train(BUDGET)
    pattern = (
        r"error: out of memory: peak use was (\S+) GB of the (\S+) GB available\. "
        r"Set stage\.vision\.accumulate to (\d+) \(now 1\): this needs about (\S+) GB"
    )
    match = re.match(pattern, message)
    assert status == 1 and match, message
    peak, available, parts, need = map(float, match.groups())
    assert need < peak <= available * 1.05
    text = paths.PARAMS.read_text()
    paths.PARAMS.write_text(text.replace("accumulate: 1", f"accumulate: {parts:.0f}", 1))
    status, message = train(BUDGET)
    assert status == 0, message


def test_if_nothing_fits_the_smallest_need_is_reported(wide: Path) -> None:
    status, message = train(280_000_000)
    assert status == 1 and "lower stage.vision.batch_size" in message, message
    assert re.search(r"Even stage\.vision\.accumulate 16 with trainer\.gradient_check", message)


def test_a_killed_loader_process_is_not_explained_by_the_size_of_the_step(project: Path) -> None:
    settings = load_settings(paths.PARAMS)
    killed = RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. ")
    with (
        pytest.raises(RuntimeError) as raised,
        out_of_memory.explain_out_of_memory(STAGES["vision"], settings),
    ):
        raise killed
    assert raised.value is killed
    with (
        pytest.raises(UserError, match="peak use was .* out of memory"),
        out_of_memory.explain_out_of_memory(STAGES["vision"], settings),
    ):
        raise RuntimeError("CUDA out of memory")


def test_the_advice_is_the_first_change_that_fits_beside_the_program(project: Path) -> None:
    cli.main(["prepare"])
    settings, stage, program = load_settings(paths.PARAMS), STAGES["vision"], 10**9
    size = settings.stage.vision.batch_size
    assert size == 4 and settings.stage.vision.accumulate == 1
    needs = {parts: memory_with(settings, stage, parts, False).total for parts in (1, 2, 4)}
    assert needs[1] > needs[2] > needs[4]
    for parts in (2, 4):
        available = round((program + needs[parts]) / 0.9) + 1
        advice = out_of_memory._advice(stage, settings, available, program)
        assert advice.startswith(f"Set stage.vision.accumulate to {parts} (now 1): this needs")
    available = round((program + needs[4]) / 0.9) - 10
    advice = out_of_memory._advice(stage, settings, available, program)
    assert "accumulate to 4 (now 1) and trainer.gradient_checkpointing to true" in advice
    assert "Even stage.vision.accumulate 4 " in out_of_memory._advice(
        stage, settings, program, program
    )
