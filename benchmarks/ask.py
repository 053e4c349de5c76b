"""Time from starting `panollava ask` to its first word, with the demo's towers and an untrained
resampler, against importing torch and transformers alone."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from measure import PANOLLAVA, ROOT, Line, options_parser, report
from panollava import paths
from panollava.config import load_settings
from panollava.demo.questions import QUERIES
from panollava.demo.render import render
from panollava.demo.scenes import make_scene
from panollava.model.header import TOWERS, make_header
from panollava.model.network import build_model
from panollava.model.weights import save_weights
from panollava.stages import STAGES

IMPORTS = (sys.executable, "-c", "import torch, transformers; print('imported')")
MOST_MORE = 2.5  # seconds


def main() -> None:
    options = options_parser(__doc__, repeats=7).parse_args()
    os.chdir(ROOT)  # where the demo's towers are
    with tempfile.TemporaryDirectory() as folder:
        model, panorama = Path(folder) / paths.WEIGHTS, Path(folder) / "panorama.png"
        settings, stage = load_settings(paths.PARAMS), STAGES["finetune"]
        network, _ = build_model(settings.model, settings.views)
        save_weights(model, network, stage.saves, make_header(stage, settings, TOWERS))
        Image.fromarray(render(make_scene(9, 0), 256)).save(panorama)
        query = QUERIES["scene"]
        ask = (*PANOLLAVA, "ask", str(panorama), query, "--model", str(model), "--max-new-tokens=1")
        times: dict[tuple[str, ...], list[float]] = {IMPORTS: [], ask: []}
        for repeat in range(options.repeats + 1):
            for command, seconds in times.items():
                start = time.perf_counter()
                done = subprocess.run(command, check=True, capture_output=True)
                assert done.stdout.strip(), command
                if repeat:
                    seconds.append(time.perf_counter() - start)
    imports, first_word = (statistics.median(seconds) for seconds in times.values())
    name = "panollava ask: first word, after importing torch and transformers"
    report([Line(name, "s", first_word - imports, at_most=MOST_MORE)], options.out)


if __name__ == "__main__":
    main()
