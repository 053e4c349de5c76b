"""What LoRA gains on the demo: answers in a form that the language model has never seen.

The demo's answers are rewritten, `finetune` is trained on them with and without an adapter, and the
answers of valid are compared with the rewritten references:

    reversed     the words in reverse order
    substituted  each word stands for another one, always the same: as if in another language
    original     as they are, for comparison

Everything else is that of a finished run (`make repro`), in a copy of it. Prints the scores of
both, their difference, and 95% intervals over panoramas of the mean over seeds.

    python benchmarks/lora.py --seeds 3 --forms reversed substituted
"""

import argparse
import csv
import logging
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from panollava import paths
from panollava.config import load_settings
from panollava.demo.facts import READER
from panollava.evaluation.confidence import interval_of_mean
from panollava.files import read_prepared_rows
from panollava.model.panollava import PanoLLaVA
from panollava.provenance import resume
from panollava.stages import STAGES
from panollava.training.train import train

log = logging.getLogger(__name__)

Rewrite = Callable[[str], str]
Scores = dict[str, dict[tuple[int, str], float]]  # by name, of each (panorama, query)

ARMS = {"frozen": False, "LoRA": True}
SCORES = {"exact": "a reference, word by word", "facts": "its facts, in the right form"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--project", type=Path, default=Path(), help="folder with a finished run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", default=["reversed", "substituted"])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--labeled", type=float, default=0.5, help="share of train's panoramas")
    parser.add_argument("--threads", type=int, default=1)
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
    (folder / "data/demo/towers").symlink_to(project / "data/demo/towers")
    shutil.copytree(project / "runs/prepared", folder / "runs/prepared", copy_function=os.symlink)
    (folder / "runs/features").symlink_to(project / "runs/features")
    (folder / "runs/vlm_resampler").symlink_to(project / "runs/vlm_resampler")
    shutil.copyfile(Path(__file__).parents[1] / "params.yaml", folder / "params.yaml")


def _compare(form: str, project: Path, options: argparse.Namespace) -> None:
    rewrite, undo = _forms(project)[form]
    for split in ("train", "valid"):
        _rewrite_rows(project / "runs/prepared" / split / "rows.csv", rewrite)
    scores: dict[str, list[Scores]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm, lora in ARMS.items():
            start = time.monotonic()
            _train(seed, lora, options)
            seconds = time.monotonic() - start
            scores[arm].append(_evaluate(undo))
            means = {k: f"{np.mean([*v.values()]):.3f}" for k, v in scores[arm][-1].items()}
            log.info("%s, seed %d, %s: %s, %.0f s", form, seed, arm, means, seconds)
    rows = []
    for name in SCORES:
        frozen, adapted = (_mean_over_seeds([each[name] for each in scores[arm]]) for arm in ARMS)
        difference = {key: value - frozen[key] for key, value in adapted.items()}
        columns = map(_with_interval, (frozen, adapted, difference))
        rows.append([f"{form}: {name}", *columns])
    log.info("%s", tabulate(rows, ("", *ARMS, "difference"), "github"))


def _forms(project: Path) -> dict[str, tuple[Rewrite, Rewrite]]:
    """Each form's rewriting and its inverse."""
    rows = read_prepared_rows(project / "runs/prepared/train/rows.csv")
    words = sorted({word for text in rows["annotation"] for word in re.findall(r"\w+", text)})
    others = random.Random(0).sample(words, len(words))
    table = dict(zip(words, others, strict=True))
    inverse = dict(zip(others, words, strict=True))

    def reverse(text: str) -> str:
        return " ".join(reversed(text.split(" ")))

    def by(table: dict[str, str]) -> Rewrite:
        return lambda text: re.sub(r"\w+", lambda word: table.get(word[0], "?"), text)

    return {
        "original": (str, str),
        "reversed": (reverse, reverse),
        "substituted": (by(table), by(inverse)),
    }


def _rewrite_rows(source: Path, rewrite: Rewrite) -> None:
    rows = read_prepared_rows(source)
    rows["annotation"] = rows["annotation"].map(rewrite)
    target = paths.PREPARED / source.parent.name / source.name
    target.unlink()
    rows.to_csv(target, index=False, quoting=csv.QUOTE_NONNUMERIC)


def _settings(seed: int, lora: bool, options: argparse.Namespace) -> Any:
    changes = {
        "seed": seed,
        "stage.finetune.lora": lora,
        "stage.finetune.epochs": options.epochs,
        "stage.finetune.labeled": options.labeled,
        "trainer.threads": options.threads,
    }
    return load_settings(paths.PARAMS, STAGES["finetune"].reads, changes)


def _train(seed: int, lora: bool, options: argparse.Namespace) -> None:
    train(STAGES["finetune"], _settings(seed, lora, options))
    resume.remove_finished(except_stage=None)


def _evaluate(undo: Rewrite) -> Scores:
    """Scores of the answers to valid's queries."""
    model = PanoLLaVA.from_pretrained(paths.weights_file("finetune"), accelerator="cpu")
    features = np.load(paths.FEATURES / "valid.npy")
    references: dict[tuple[int, str], set[str]] = {}
    for row in read_prepared_rows(paths.PREPARED / "valid/rows.csv").itertuples():
        references.setdefault((int(row.panorama), row.query), set()).add(row.annotation)
    scores: Scores = {name: {} for name in SCORES}
    for panorama in sorted({panorama for panorama, _ in references}):
        queries = [query for number, query in references if number == panorama]
        batch = torch.from_numpy(features[panorama : panorama + 1]).float()
        (answers,) = model.answer_features(batch, [queries], max_new_tokens=48)
        for query, answer in zip(queries, answers, strict=True):
            correct = references[panorama, query]
            facts = READER.read(query, undo(next(iter(correct))))
            scores["exact"][panorama, query] = float(answer.text in correct)
            scores["facts"][panorama, query] = float(READER.read(query, undo(answer.text)) == facts)
    return scores


def _mean_over_seeds(values: list[dict[tuple[int, str], float]]) -> dict[tuple[int, str], float]:
    return {key: float(np.mean([each[key] for each in values])) for key in values[0]}


def _with_interval(values: dict[tuple[int, str], float]) -> str:
    bounds = interval_of_mean(values)
    return f"{np.mean([*values.values()]):.3f} [{bounds['low']:.3f}, {bounds['high']:.3f}]"


if __name__ == "__main__":
    main()
