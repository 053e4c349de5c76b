"""Peak memory of one optimizer step of `training`, each way in a process of its own."""

import sys
import tempfile
from pathlib import Path

from measure import Line, options_parser, report, run
from training import Steps


def main() -> None:
    parser = options_parser(__doc__, repeats=1)
    parser.add_argument("--step", nargs=2, metavar=("STAGE", "WAY"), help="only take this step")
    options = parser.parse_args()
    if options.step:
        stage, way = options.step
        steps = Steps(stage)
        steps.take(getattr(steps, way))
    else:
        report([measure_stage(stage) for stage in ("resampler", "finetune")], options.out)


def measure_stage(stage: str) -> Line:
    command = [sys.executable, str(Path(__file__).resolve()), "--step", stage]
    with tempfile.TemporaryDirectory() as folder:
        ours = run([*command, "our_loss"], Path(folder))[1]
        usual = run([*command, "usual_loss"], Path(folder))[1]
    return Line(f"step of {stage}, peak memory", "GB", ours, usual, at_least=2.0)


if __name__ == "__main__":
    main()
