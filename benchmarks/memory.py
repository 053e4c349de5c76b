"""Peak memory of one optimizer step at the real profile's size, each way in a process of its own:
see `training`."""

import argparse
import sys
import tempfile
from pathlib import Path

from measure import Line, run, write
from training import Steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--turns", type=int, default=1, help="more don't change a peak")
    parser.add_argument("--step", nargs=2, metavar=("STAGE", "WAY"), help="take it, say nothing")
    options = parser.parse_args()
    if options.step:
        stage, way = options.step
        steps = Steps(stage)
        steps.take(getattr(steps, way))
    else:
        write(options.out, [of_stage(stage) for stage in ("resampler", "finetune")])


def of_stage(stage: str) -> Line:
    command = [sys.executable, str(Path(__file__).resolve()), "--step", stage]
    with tempfile.TemporaryDirectory() as folder:
        ours = run([*command, "our_loss"], Path(folder))[1]
        usual = run([*command, "usual_loss"], Path(folder))[1]
    return Line(f"step of {stage}, peak memory", "GB", ours, usual, at_least=2.0)


if __name__ == "__main__":
    main()
