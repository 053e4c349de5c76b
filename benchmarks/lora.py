"""What LoRA gains on the demo: answers in a form that the language model has never seen.

The demo's answers are rewritten, `finetune` is trained on them with and without an adapter, and the
greedy answers to valid's queries are compared with the rewritten references. Forms:

    keywords  without articles, verbs and the like: "behind red box."
    reversed  the words in reverse order

Everything else is that of a finished run (`make repro`), in a copy of it. Prints the share of
answers that are a reference word by word, and its 95% interval over panoramas of the mean over
seeds.

    python benchmarks/lora.py --seeds 3 --forms keywords reversed
"""

import argparse
import csv
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from helpers import read_array
from panollava import paths
from panollava.config import load_settings
from panollava.evaluation.confidence import interval_of_mean
from panollava.files import read_prepared_rows
from panollava.model.panollava import PanoLLaVA
from panollava.provenance import resume
from panollava.stages import STAGES
from panollava.training.train import train

log = logging.getLogger(__name__)

Scores = dict[tuple[int, str], float]  # by panorama and query

ARMS = {"frozen": False, "LoRA": True}
_DROPPED = re.compile(
    r"\b(there is|one can see|it is|this is|they are|is|are|an?|the|in|on|to|at) "
)
FORMS: dict[str, Callable[[str], str]] = {
    "keywords": lambda text: _DROPPED.sub("", text),
    "reversed": lambda text: " ".join(reversed(text.split(" "))),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--project", type=Path, default=Path(), help="folder with a finished run")
    add("--seeds", type=int, default=3)
    add("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    add("--epochs", type=int, default=2)
    add("--labeled", type=float, default=0.25, help="share of train's panoramas")
    add("--batch-size", type=int, default=36)
    add("--lora-lr", type=float, default=3e-3)
    add("--valid", type=int, default=50, help="panoramas of valid")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    project = options.project.resolve()
    with tempfile.TemporaryDirectory() as folder:
        _copy(project, Path(folder))
        os.chdir(folder)
        for form in options.forms:
            _compare(form, project, options)


def _copy(project: Path, folder: Path) -> None:
    """What `finetune` reads; the arrays as links."""
    (folder / "data/demo").mkdir(parents=True)
    for name in ("data/demo/towers", "runs/features", "runs/vlm_resampler"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(project / name)
    shutil.copytree(project / "runs/prepared", folder / "runs/prepared", copy_function=os.symlink)
    shutil.copyfile(Path(__file__).parents[1] / "params.yaml", folder / "params.yaml")


def _compare(form: str, project: Path, options: argparse.Namespace) -> None:
    for split, most in (("train", None), ("valid", options.valid)):
        source = project / "runs/prepared" / split / "rows.csv"
        _rewrite_rows(source, FORMS[form], most)
    scores: dict[str, list[Scores]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm, lora in ARMS.items():
            start = time.monotonic()
            _train(seed, lora, options)
            seconds = time.monotonic() - start
            scores[arm].append(_evaluate())
            exact = np.mean([*scores[arm][-1].values()])
            accuracy = json.loads(paths.metrics_file("finetune").read_text())["val_accuracy"]
            text = "%s, seed %d, %s: exact %.3f, accuracy of tokens %.3f, %.0f s"
            log.info(text, form, seed, arm, exact, accuracy, seconds)
    frozen, adapted = (_mean_over_seeds(scores[arm]) for arm in ARMS)
    difference = {key: value - frozen[key] for key, value in adapted.items()}
    columns = map(_with_interval, (frozen, adapted, difference))
    log.info("%s", tabulate([[form, *columns]], ("", *ARMS, "difference"), "github"))


def _rewrite_rows(source: Path, rewrite: Callable[[str], str], most: int | None) -> None:
    """Rewrite the answers of the first panoramas, all if `most` is None."""
    rows = read_prepared_rows(source)
    rows = rows if most is None else rows[rows["panorama"] < most]
    rows = rows.assign(annotation=rows["annotation"].map(rewrite))
    target = paths.PREPARED / source.parent.name / source.name
    target.unlink()
    rows.to_csv(target, index=False, quoting=csv.QUOTE_NONNUMERIC)


def _train(seed: int, lora: bool, options: argparse.Namespace) -> None:
    changes = {
        "seed": seed,
        "stage.finetune.lora": lora,
        "stage.finetune.lora_lr": options.lora_lr,
        "stage.finetune.epochs": options.epochs,
        "stage.finetune.labeled": options.labeled,
        "stage.finetune.batch_size": options.batch_size,
        "trainer.threads": 1,
    }
    train(STAGES["finetune"], load_settings(paths.PARAMS, STAGES["finetune"].reads, changes))
    resume.remove_finished(except_stage=None)


def _evaluate() -> Scores:
    """1 for each answer that is one of its references, else 0."""
    model = PanoLLaVA.from_pretrained(paths.weights_file("finetune"), accelerator="cpu")
    features = torch.from_numpy(read_array(paths.FEATURES / "valid")).float()
    references: dict[int, dict[str, set[str]]] = {}
    for row in read_prepared_rows(paths.PREPARED / "valid/rows.csv").itertuples():
        by_query = references.setdefault(int(row.panorama), {})
        by_query.setdefault(row.query, set()).add(row.annotation)
    scores: Scores = {}
    for panorama, by_query in references.items():
        batch = features[panorama : panorama + 1]
        (answers,) = model.answer_features(batch, [list(by_query)], max_new_tokens=48)
        for (query, correct), answer in zip(by_query.items(), answers, strict=True):
            scores[panorama, query] = float(answer.text in correct)
    return scores


def _mean_over_seeds(scores: list[Scores]) -> Scores:
    return {key: float(np.mean([each[key] for each in scores])) for key in scores[0]}


def _with_interval(values: Scores) -> str:
    bounds = interval_of_mean(values)
    return f"{np.mean([*values.values()]):.3f} [{bounds['low']:.3f}, {bounds['high']:.3f}]"


if __name__ == "__main__":
    main()
