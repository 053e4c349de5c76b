"""The first signal requests a stop, the second one stops at once."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT
from panollava.training.interrupt import SIGNALS, Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_second_signal_stops_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    interrupt = Interrupt()
    interrupt.listen()
    signal.raise_signal(number)
    assert interrupt.requested
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_the_previous_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    interrupt = Interrupt()
    interrupt.listen()
    interrupt.listen()  # in the validation of the start, and again when steps begin
    interrupt.restore()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not interrupt.requested


TRAINING = """
import time
from pathlib import Path
from panollava.training.interrupt import Interrupt
interrupt = Interrupt()
interrupt.listen()
Path("training").touch()
for _ in range(1200):
    time.sleep(0.05)
    if interrupt.requested:
        Path("saved").touch()
        raise SystemExit(130)
"""


@pytest.mark.parametrize("signaled", [True, False])
def test_the_documented_batch_script_saves_and_requeues(signaled: bool, tmp_path: Path) -> None:
    """With stand-ins for SLURM, DVC (which dies of the signal) and the training."""
    text = (ROOT / "docs/reproducibility.md").read_text()
    [script] = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", text, re.DOTALL)
    assert "#SBATCH --signal=B:USR1@120" in script and "#SBATCH --requeue" in script
    program = TRAINING if signaled else "raise SystemExit(3)"
    for name, content in {
        "job.sh": script,
        "training.py": program,
        "bin/dvc": f"#!{sys.executable}\nimport subprocess, sys\n"
        "sys.exit(subprocess.run('python training.py', shell=True).returncode)\n",
        "bin/scontrol": '#!/bin/sh\necho "$@" > requeued\n',
        ".venv/bin/activate": 'PATH="$PWD/bin:$PATH"\n',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "SLURM_JOB_ID": "7"}
    with subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment) as job:
        if signaled:
            while not (tmp_path / "training").exists():
                assert job.poll() is None
                time.sleep(0.05)
            job.send_signal(signal.SIGUSR1)
        status = job.wait(timeout=60)
    assert (tmp_path / "saved").exists() == signaled
    if signaled:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    else:
        assert not (tmp_path / "requeued").exists() and status == 3
