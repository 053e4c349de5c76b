"""Ablations: the committed profile with a few parameters changed, one choice at a time.

Each variant is run as a DVC experiment (`dvc exp run --temp`) for several seeds, and named
`lab-<variant>-<seed>`; `dvc exp show` lists them. Experiments that exist for this commit and these
parameters (`--set`) are not repeated, so that an interrupted laboratory can be resumed. Models are
evaluated on valid, because choices are made from the results.

    make laboratory                                     # all: hours
    make laboratory ARGS="--only default overlap --seeds 3"
    make laboratory ARGS="--seeds 3 --report docs/log"     # a page of existing results
"""

import argparse
import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from dvc.repo import Repo

sys.path.append(f"{sys.prefix}/bench")  # requirements-bench.txt

from scipy import stats

from panollava import paths

log = logging.getLogger(__name__)

FEW = {  # the rows of 200 panoramas; the vision stage uses all 800
    "stage.resampler.labeled": 0.25,
    "stage.finetune.labeled": 0.25,
    "stage.resampler.epochs": 10,
}
VIEWS = {"model.tokens": "views"}  # pooled in each view; merging needs perspective views and rays
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "few": FEW,
    "few-overlap-none": {**FEW, "stage.vision.epochs": 0},
    "overlap-naive": {"stage.vision.overlap": "naive"},
    "overlap-none": {"stage.vision.epochs": 0},
    # The time of stage 1 is spent on stage 2.
    "overlap-none-longer": {"stage.vision.epochs": 0, "stage.resampler.epochs": 3},
    "finetune-none": {"stage.finetune.epochs": 0},
    # The time of stage 3 is spent on stage 2.
    "finetune-none-longer": {"stage.finetune.epochs": 0, "stage.resampler.epochs": 3},
    "loss-infonce": {"stage.vision.objective": "infonce"},
    "tokens-views": VIEWS,
    "few-tokens-views": {**FEW, **VIEWS},
    "position-view": {**VIEWS, "model.resampler.position": "view"},
    "position-none": {"model.resampler.position": "none"},
    "views-global": {"views.global_view": "true"},
    # Wider than 90 degrees, because faces of 90 degrees share no token.
    "views-cubemap": {"views.strategy": "cubemap", "views.fov": 100},
    "views-sliding-window": {**VIEWS, "views.strategy": "sliding_window"},
    "views-resize": {**VIEWS, "views.strategy": "resize", "stage.vision.epochs": 0},
    "few-overlap-naive": {**FEW, "stage.vision.overlap": "naive"},
    "few-loss-infonce": {**FEW, "stage.vision.objective": "infonce"},
    "loss-vicreg-expander": {"stage.vision.expander": 512},
}
SCORES = {  # columns of the table, by their keys in metrics/evaluate/metrics.json
    "color by direction": "facts.color_by_direction",
    "color, shape by direction": "facts.color_shape_by_direction",
    "number": "facts.count",
    "all around": "facts.around",
    "rotation: stays": "rotation.stays",
    "rotation: turns": "rotation.turns",
}

Results = dict[str, dict[int, dict[str, float]]]  # scores by variant and seed


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="prefixes of variants")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all variants"
    )
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only write the page")
    options = parser.parse_args()
    selected = [v for v in VARIANTS if not options.only or v.startswith(tuple(options.only))]
    if not selected:
        sys.exit(f"no variant starts with {options.only}; the variants are {', '.join(VARIANTS)}")
    runs = [(variant, seed) for seed in range(options.seeds) for variant in selected]
    if not options.report:
        run_missing(runs, options.set)
    results = read_results(selected, options.seeds, options.set)
    log.info("%s", format_table(results))
    if options.report:
        write_report(results, options.report)


def experiment(variant: str, seed: int, common: list[str]) -> str:
    """The experiment's name, which depends on the parameters `common` to all variants."""
    digest = [hashlib.sha256(" ".join(sorted(common)).encode()).hexdigest()[:6]] if common else []
    return "-".join(["lab", variant, str(seed), *digest])


def run_missing(runs: Iterable[tuple[str, int]], common: list[str]) -> None:
    existing = subprocess.run(
        ["dvc", "exp", "list", "--name-only"], capture_output=True, text=True, check=True
    ).stdout.split()
    for variant, seed in runs:
        name = experiment(variant, seed, common)
        if name in existing:
            continue
        parameters = {"seed": seed, "evaluate.split": "valid", **VARIANTS[variant]}
        changes = [*(f"{key}={value}" for key, value in parameters.items()), *common]
        options = [word for change in changes for word in ("-S", change)]
        log.info("%s: %s", name, " ".join(changes))
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        # Nobody reads a report of each.
        command = ["dvc", "exp", "run", "--temp", "-n", name, *options, "evaluate"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{name} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def read_results(variants: list[str], seeds: int, common: list[str]) -> Results:
    """Scores of the experiments that exist."""
    names = {experiment(v, seed, common): (v, seed) for v in variants for seed in range(seeds)}
    repo = Repo()
    results: Results = {variant: {} for variant in variants}
    groups = repo.experiments.ls(rev="HEAD").values()
    for name in (name for group in groups for name, _ in group if name in names):
        shown = repo.metrics.show(revs=[name])[name]
        metrics = shown["data"][str(paths.EVALUATION)]["data"]
        variant, seed = names[name]
        results[variant][seed] = {
            score: value
            for score, key in SCORES.items()
            if (value := look_up(metrics, key)) is not None
        }
    return {variant: runs for variant, runs in results.items() if runs}


def look_up(tree: Any, dotted_key: str) -> float | None:
    for key in dotted_key.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t (nan for one value)."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    half_width = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values)), float(half_width)


def compare_to_base(results: Results, variant: str, score: str) -> str:
    """Mean over seeds, and the mean paired difference to the base variant."""
    base_name = "few" if variant.startswith("few") else "default"
    runs, base = results[variant], results.get(base_name, {})
    values = [run[score] for run in runs.values() if score in run]
    if not values:
        return "–"
    text = f"{np.mean(values):.3f}"
    differences = [
        runs[seed][score] - base[seed][score]
        for seed in runs
        if seed in base and score in runs[seed] and score in base[seed]
    ]
    if variant == base_name or len(differences) < 2:
        _, half_width = interval(values)
        return text if np.isnan(half_width) else f"{text} ± {half_width:.3f}"
    mean, half_width = interval(differences)
    # An interval of almost no width comes from a score with few distinct values; it proves nothing.
    bold = " **" if abs(mean) > half_width >= 0.0005 else " "
    return f"{text}{bold}({mean:+.3f} ± {half_width:.3f}){bold.strip()}"


def format_table(results: Results) -> str:
    lines = [
        f"| variant | seeds | {' | '.join(SCORES)} |",
        f"|---|---|{'---|' * len(SCORES)}",
    ]
    for variant, runs in results.items():
        cells = [compare_to_base(results, variant, score) for score in SCORES]
        lines.append(f"| {variant} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(results: Results, folder: Path) -> None:
    """Replace the table in laboratory.md, between its markers, and draw laboratory.png."""
    page = folder / "laboratory.md"
    begin, end = "<!-- table -->\n", "<!-- end of the table -->"
    text = page.read_text(encoding="utf-8")
    head, tail = text.split(begin)[0], text.split(end)[1]
    picture = "![Each run as a point, the mean as a bar](laboratory.png)"
    middle = f"{begin}\n{format_table(results)}\n\n{picture}\n\n{end}"
    page.write_text(f"{head}{middle}{tail}", encoding="utf-8")
    plot(results, folder / "laboratory.png")


def plot(results: Results, file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(SCORES), figsize=(3 * len(SCORES), 0.4 * len(results) + 1.5), sharey=True
    )
    for axis, score in zip(axes, SCORES, strict=True):
        for row, runs in enumerate(results.values()):
            values = [run[score] for run in runs.values() if score in run]
            axis.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.5)
            if values:
                axis.plot(np.mean(values), row, "|", color="black", markersize=14)
        axis.set_title(score, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(results)), list(results))
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
