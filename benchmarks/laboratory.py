"""The laboratory: choices about panoramas, each tried alone, decided by numbers.

Every variant is the committed profile with a few parameters changed, run as a DVC experiment
(`dvc exp run --temp`) for several seeds, and named `lab-<variant>-<seed>`; `dvc exp show` shows
them. An experiment of this commit and of these settings (`--set`) that is there already isn't run
again, so that a broken-off laboratory goes on. Choices are to be made on valid: that is the split
that is evaluated.

    make laboratory                                     # all: hours
    make laboratory ARGS="--only default overlap --seeds 3"
    make laboratory ARGS="--seeds 3 --report docs/log"     # a page of what is there
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

log = logging.getLogger(__name__)

FEW = {  # the rows of two hundred panoramas; the vision stage sees all eight hundred
    "stage.resampler.labeled": 0.25,
    "stage.finetune.labeled": 0.25,
    "stage.resampler.epochs": 10,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "few": FEW,
    "few-overlap-none": {**FEW, "stage.vision.epochs": 0},
    "overlap-naive": {"stage.vision.overlap": "naive"},
    "overlap-none": {"stage.vision.epochs": 0},
    # The time of stage 1 given to stage 2.
    "overlap-none-longer": {"stage.vision.epochs": 0, "stage.resampler.epochs": 6},
    "finetune-none": {"stage.finetune.epochs": 0},
    # The time of stage 3 given to stage 2.
    "finetune-none-longer": {"stage.finetune.epochs": 0, "stage.resampler.epochs": 6},
    "loss-infonce": {"stage.vision.objective": "infonce"},
    "position-view": {"model.resampler.position": "view"},
    "position-none": {"model.resampler.position": "none"},
    "views-global": {"views.global_view": "true"},
    # Faces of 90 degrees share no token.
    "views-cubemap": {"views.strategy": "cubemap", "views.fov": 100},
    "views-sliding-window": {"views.strategy": "sliding_window"},
    "views-resize": {"views.strategy": "resize", "stage.vision.epochs": 0},
    "few-overlap-naive": {**FEW, "stage.vision.overlap": "naive"},
    "few-loss-infonce": {**FEW, "stage.vision.objective": "infonce"},
    "loss-vicreg-expander": {"stage.vision.expander": 512},
}
SCORES = {  # what is shown: a place in runs/evaluate/details.json
    "color by direction": "facts.color_by_direction.f1",
    "color, shape by direction": "facts.color_shape_by_direction.f1",
    "colors": "facts.colors.f1",
    "number": "facts.count.f1",
    "all around": "facts.around.f1",
    "stays, turned by 45°": "rotation.45.stays.f1",
    "turns, by 180°": "rotation.180.turns.f1",
}
DETAILS = "runs/evaluate/details.json"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="variants that begin so")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all of them")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="run nothing: write a page")
    options = parser.parse_args()
    chosen = [v for v in VARIANTS if not options.only or v.startswith(tuple(options.only))]
    if not chosen:
        sys.exit(f"no variant begins with {options.only}; there are {', '.join(VARIANTS)}")
    runs = [(variant, seed) for seed in range(options.seeds) for variant in chosen]
    if not options.report:
        run_missing(runs, options.set)
    results = read_results(chosen, options.seeds, options.set)
    log.info("%s", table(results))
    if options.report:
        write_report(results, options.report)


def experiment(variant: str, seed: int, common: list[str]) -> str:
    """Its name, in which other `common` settings are another experiment."""
    digest = [hashlib.sha256(" ".join(sorted(common)).encode()).hexdigest()[:6]] if common else []
    return "-".join(["lab", variant, str(seed), *digest])


def run_missing(runs: Iterable[tuple[str, int]], common: list[str]) -> None:
    there = subprocess.run(
        ["dvc", "exp", "list", "--name-only"], capture_output=True, text=True, check=True
    ).stdout.split()
    for variant, seed in runs:
        name = experiment(variant, seed, common)
        if name in there:
            continue
        settings = {"seed": seed, "evaluate.split": "valid", **VARIANTS[variant]}
        changes = [*(f"{key}={value}" for key, value in settings.items()), *common]
        options = [word for change in changes for word in ("-S", change)]
        log.info("%s: %s", name, " ".join(changes))
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        command = ["dvc", "exp", "run", "--temp", "-n", name, *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{name} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def read_results(
    variants: list[str], seeds: int, common: list[str]
) -> dict[str, dict[int, dict[str, float]]]:
    """Scores by variant and seed, of the experiments that there are."""
    names = {experiment(v, seed, common): (v, seed) for v in variants for seed in range(seeds)}
    repo = Repo()
    results: dict[str, dict[int, dict[str, float]]] = {variant: {} for variant in variants}
    there = [name for own in repo.experiments.ls(rev="HEAD").values() for name, _ in own]
    for name in filter(names.__contains__, there):
        details = repo.metrics.show([DETAILS], revs=[name])[name]["data"][DETAILS]["data"]
        variant, seed = names[name]
        results[variant][seed] = {
            score: value
            for score, at in SCORES.items()
            if (value := look_up(details, at)) is not None
        }
    return {variant: own for variant, own in results.items() if own}


def look_up(tree: Any, place: str) -> float | None:
    for key in place.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t (nan for one value)."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    spread = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values)), float(spread)


def compared(results: dict[str, dict[int, dict[str, float]]], variant: str, score: str) -> str:
    """Mean over seeds; for variants of another also the difference to that, seed by seed."""
    base_name = "few" if variant.startswith("few") else "default"
    own, base = results[variant], results.get(base_name, {})
    values = [run[score] for run in own.values() if score in run]
    if not values:
        return "–"
    text = f"{np.mean(values):.3f}"
    pairs = [
        own[seed][score] - base[seed][score]
        for seed in own
        if seed in base and score in own[seed] and score in base[seed]
    ]
    if variant == base_name or len(pairs) < 2:
        _, half = interval(values)
        return text if np.isnan(half) else f"{text} ± {half:.3f}"
    mean, half = interval(pairs)
    # Equal differences seed by seed are those of a score with few values, and prove nothing.
    better = " **" if abs(mean) > half >= 0.0005 else " "
    return f"{text}{better}({mean:+.3f} ± {half:.3f}){better.strip()}"


def table(results: dict[str, dict[int, dict[str, float]]]) -> str:
    lines = [
        f"| variant | seeds | {' | '.join(SCORES)} |",
        f"|---|---|{'---|' * len(SCORES)}",
    ]
    for variant, own in results.items():
        cells = [compared(results, variant, score) for score in SCORES]
        lines.append(f"| {variant} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(results: dict[str, dict[int, dict[str, float]]], folder: Path) -> None:
    """The page's table, between its marks, and the plot beside it."""
    page = folder / "laboratory.md"
    begin, end = "<!-- table -->\n", "<!-- end of the table -->"
    text = page.read_text(encoding="utf-8")
    head, tail = text.split(begin)[0], text.split(end)[1]
    picture = "![Each run as a point, the mean as a bar](laboratory.png)"
    found = f"{begin}\n{table(results)}\n\n{picture}\n\n{end}"
    page.write_text(f"{head}{found}{tail}", encoding="utf-8")
    plot(results, folder / "laboratory.png")


def plot(results: dict[str, dict[int, dict[str, float]]], file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(SCORES), figsize=(3 * len(SCORES), 0.4 * len(results) + 1.5), sharey=True
    )
    for axis, score in zip(axes, SCORES, strict=True):
        for row, own in enumerate(results.values()):
            values = [run[score] for run in own.values() if score in run]
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
