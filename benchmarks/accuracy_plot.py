"""Plots the validation accuracy of the three training stages, from their curves in metrics/.

python benchmarks/accuracy_plot.py docs/validation_accuracy.png
"""

import argparse
import sys
from pathlib import Path

sys.path.append(f"{sys.prefix}/bench")  # requirements-bench.txt

import pandas as pd
from matplotlib import pyplot

from measure import ROOT
from panollava import paths

STAGES = {  # what their accuracy is
    "vision": "top-1 retrieval of matched tokens",
    "resampler": "answer tokens predicted",
    "finetune": "answer tokens predicted",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the picture to write")
    options = parser.parse_args()
    figure, axes = pyplot.subplots(1, len(STAGES), figsize=(9, 2.6), sharey=True)
    for axis, (stage, meaning) in zip(axes, STAGES.items(), strict=True):
        file = ROOT / paths.curves_folder(stage) / "plots/metrics/val/accuracy.tsv"
        curve = pd.read_csv(file, sep="\t")
        axis.plot(curve["step"], curve["accuracy"], "o-")
        for step, value in zip(curve["step"], curve["accuracy"], strict=True):
            axis.annotate(
                f"{value:.3f}", (step, value), (-10, 6), textcoords="offset points", size=7
            )
        axis.set_title(f"{stage}: {meaning}", fontsize=8)
        axis.set_xlim(-0.15 * curve["step"].max(), 1.15 * curve["step"].max())
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1.1)
    figure.tight_layout()
    figure.savefig(options.file, dpi=110)


if __name__ == "__main__":
    main()
