"""The model's answers to every (panorama, query) of a split, and what they score.

Each query is asked of the panorama itself; of another one in its place, where the difference is
the grounding gap, which a model that doesn't look at the picture lacks; and of the panorama turned
by several angles, where answers that name no direction should stay and directions should turn."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from panollava import paths
from panollava.config import Settings
from panollava.data.batches import gather, read_prepared_rows
from panollava.data.dialogue import Dialogue
from panollava.errors import UserError
from panollava.evaluation.captions import agreement, score
from panollava.evaluation.confidence import interval_of_mean
from panollava.evaluation.facts import FactReader, Key, compare, find_reader, rotation, seam
from panollava.files import atomic_write, open_array, write_csv
from panollava.model.device import autocast, cast_frozen_linears, choose_device
from panollava.model.generate import answer
from panollava.model.language_model import end_tokens
from panollava.model.panollava import PanoLLaVA, build_model
from panollava.model.weights import load_weights
from panollava.provenance.made_from import check_features, check_prepared
from panollava.stages import find_stage

log = logging.getLogger(__name__)

READS = (
    "views",
    "model",
    "evaluate",
    "trainer.accelerator",
    "trainer.threads",
    "trainer.precision",
)
_RESULT_OF = find_stage("finetune")


def evaluate(settings: Settings) -> None:
    """Write metrics/evaluate/metrics.json and runs/evaluate/predictions.csv."""
    own, device = settings.evaluate, choose_device(settings.trainer.accelerator)
    reader = None if own.facts is None else find_reader(own.facts)
    torch.set_num_threads(settings.trainer.threads)
    model, tokenizer = build_model(settings.model, settings.views)
    source = paths.weights_file(_RESULT_OF.name)
    load_weights(source, model, _RESULT_OF.saves, _RESULT_OF)
    check_prepared(settings.views)
    check_features(settings, model.encoder)
    model.eval().requires_grad_(False)
    cast_frozen_linears(model, settings.trainer.precision)
    model.to(device)
    features = open_array(paths.FEATURES / f"{own.split}.npy")
    rows = read_prepared_rows(paths.PREPARED / own.split / "rows.csv")
    references: dict[Key, list[str]] = {}
    for row in rows.itertuples():
        references.setdefault((int(row.panorama), row.query), []).append(row.annotation)
    index = np.arange(len(features))
    shown = {"own": (features, index)}
    if len(features) > 1:
        shown["swapped"] = (features, np.roll(index, len(features) // 2))
    else:
        log.warning("one panorama alone can't be swapped: no grounding gap")
    rolled = open_array(file := paths.FEATURES / "rolled.npy")
    if len(rolled) != len(index) * len(own.rolls):
        raise UserError(
            f"{file}: holds {len(rolled)} panoramas, expected {len(index)} of {own.split}, each "
            f"turned by the {len(own.rolls)} angles of evaluate.rolls; run: dvc repro features"
        )
    for turn, degrees in enumerate(own.rolls):
        shown[_turned(degrees)] = (rolled, index * len(own.rolls) + turn)
    answers: dict[str, dict[Key, str]] = {}
    dialogue = Dialogue(tokenizer, ends=end_tokens(model.language_model))
    with autocast(device, settings.trainer.precision):
        for name, seen in shown.items():
            answers[name] = _ask(model, dialogue, seen, list(references), settings, name)
    metrics = summarise(answers, references, own.rolls, reader)
    log.info("%s", json.dumps(metrics, indent=2))
    urls = dict(zip(rows["panorama"], rows["url"], strict=True))
    _write_predictions(paths.PREDICTIONS, answers, references, urls)
    with atomic_write(paths.EVALUATION) as beside:
        beside.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def summarise(
    answers: Mapping[str, Mapping[Key, str]],
    references: Mapping[Key, list[str]],
    rolls: Sequence[float],
    reader: FactReader | None,
) -> dict[str, Any]:
    """Scores with the own panorama, with another's, and their difference; the agreement of answers
    with those to the turned panorama; and how many of the stated facts are true, if `reader` says
    how to read them. What is a mean has its 95% interval under `interval`."""
    own = score(answers["own"], references)
    metrics: dict[str, Any] = {
        "captions": len(references),
        "panoramas": len({panorama for panorama, _ in references}),
        "references": sum(map(len, references.values())),
        **own.values,
        "interval": _intervals(own.each),
    }
    if "swapped" in answers:
        other = score(answers["swapped"], references)
        swapped = {name: value for name, value in other.values.items() if isinstance(value, float)}
        metrics["swapped"] = swapped
        gaps = {
            name: {key: value - other.each[name][key] for key, value in values.items()}
            for name, values in own.each.items()
            if name in other.each
        }
        metrics["grounding_gap"] = {
            **{name: metrics[name] - value for name, value in swapped.items() if name in metrics},
            "interval": _intervals(gaps),
        }
    if rolls:
        metrics["rotation"] = {}
        for angle in rolls:
            alike = agreement(answers[_turned(angle)], answers["own"])
            metrics["rotation"][f"{angle:g}"] = {
                **alike.values,
                "interval": _intervals(alike.each),
            }
    if reader is not None:
        said = {name: reader.of_panoramas(texts, references) for name, texts in answers.items()}
        first = {key: texts[0] for key, texts in references.items()}
        true = reader.of_panoramas(first, references)
        metrics["facts"] = compare(said["own"], true)
        if "swapped" in said:
            metrics["swapped"]["facts"] = compare(said["swapped"], true)
        turned = {degrees: said[_turned(degrees)] for degrees in rolls}
        for degrees, kept in rotation(reader, said["own"], turned).items():
            metrics["rotation"][degrees].update(kept)
        metrics["seam"] = seam(reader, true, {0.0: said["own"], **turned})
    return metrics


def _intervals(each: Mapping[str, Mapping[Key, float]]) -> dict[str, dict[str, float | None]]:
    return {name: interval_of_mean(values) for name, values in each.items()}


def _turned(degrees: float) -> str:
    return f"turned by {degrees:g}"


def _ask(
    model: PanoLLaVA,
    dialogue: Dialogue,
    shown: tuple[np.ndarray, np.ndarray],
    keys: list[Key],
    settings: Settings,
    name: str,
) -> dict[Key, str]:
    """Answers where panorama p is seen with the features `shown[0][shown[1][p]]`."""
    features, index = shown
    device = next(model.parameters()).device
    asked: dict[int, list[str]] = {}
    for panorama, query in keys:
        asked.setdefault(panorama, []).append(query)
    panoramas = list(asked)
    size = settings.evaluate.batch_size
    result: dict[Key, str] = {}
    for at in tqdm(range(0, len(panoramas), size), desc=f"answers, {name}"):
        batch = panoramas[at : at + size]
        seen = gather(features, [int(index[panorama]) for panorama in batch]).to(device)
        queries = [asked[panorama] for panorama in batch]
        texts = answer(model, dialogue, seen, queries, settings.evaluate.max_new_tokens)
        for panorama, own, said in zip(batch, queries, texts, strict=True):
            result.update({(panorama, q): text for q, text in zip(own, said, strict=True)})
    return result


def _write_predictions(
    path: Path,
    answers: dict[str, dict[Key, str]],
    references: dict[Key, list[str]],
    urls: dict[int, str],
) -> None:
    table = pd.DataFrame(
        {
            "panorama": panorama,
            "url": urls[panorama],
            "query": query,
            "prediction": answers["own"][panorama, query],
            **{name: texts[panorama, query] for name, texts in answers.items() if name != "own"},
            "references": json.dumps(own, ensure_ascii=False),
        }
        for (panorama, query), own in references.items()
    )
    write_csv(path, table)
