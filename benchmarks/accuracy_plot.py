"""Validation accuracy over steps, of the training stages that have run here, as one picture.

python benchmarks/accuracy_plot.py docs/validation_accuracy.png
"""

import sys
from pathlib import Path

sys.path.append(f"{sys.prefix}/bench")  # requirements-bench.txt

import pandas as pd
from matplotlib import pyplot

METRICS = Path(__file__).parents[1] / "metrics"
STAGES = {  # what accuracy means there
    "vision": "matched tokens found in the next view",
    "resampler": "answer tokens predicted",
    "finetune": "answer tokens predicted",
}


def main() -> None:
    figure, axes = pyplot.subplots(1, len(STAGES), figsize=(9, 2.6), sharey=True)
    for axis, (stage, meaning) in zip(axes, STAGES.items(), strict=True):
        curve = pd.read_csv(METRICS / stage / "plots/metrics/val/accuracy.tsv", sep="\t")
        axis.plot(curve["step"], curve["accuracy"], "o-")
        for step, value in zip(curve["step"], curve["accuracy"], strict=True):
            axis.annotate(f"{value:.3f}", (step, value), (-10, 6), textcoords="offset points")
        axis.set_title(f"{stage}: {meaning}", fontsize=8)
        axis.set_xlim(0, 1.15 * curve["step"].max())
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1.1)
    figure.tight_layout()
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
