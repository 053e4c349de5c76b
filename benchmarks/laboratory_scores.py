"""What the laboratory measures of trained replicas: answers, and the facts that they state."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from panollava import paths
from panollava.evaluation.facts import FactReader, count_facts, find_reader
from panollava.evaluation.metrics import (
    PREDICTION,
    Answers,
    References,
    group_references,
    rolled_name,
)
from panollava.files import read_prepared_rows
from panollava.geometry.views import layout, resampled, view_shift
from replicas import Replicas

ANSWERED_ON_GPU = 100  # panoramas of each replica at once


def score_replicas(replicas: Replicas) -> list[dict[str, list]]:
    """For each replica and score: correct, predicted and reference facts of each panorama."""
    settings = replicas.settings
    rows = read_prepared_rows(paths.PREPARED / settings.evaluate.split / "rows.csv")
    references = group_references(rows)
    reader = find_reader(settings.evaluate.facts or "")
    return [
        count_scores(reader, answers, references, settings.evaluate.rolls)
        for answers in answer_all(replicas, references)
    ]


def answer_all(replicas: Replicas, references: References) -> Sequence[Answers]:
    """Each replica's answers to all queries, about the panoramas and about the rolled ones."""
    settings = replicas.settings
    queries: dict[int, list[str]] = {}
    for panorama, query in references:
        queries.setdefault(panorama, []).append(query)
    size = settings.evaluate.batch_size if replicas.device.type == "cpu" else ANSWERED_ON_GPU
    panoramas = [*queries]
    features = replicas.features(settings.evaluate.split)
    answered: list[dict] = [{} for _ in replicas.objectives]
    for name, seen in _rolled(replicas, features).items():
        for at in range(0, len(panoramas), size):
            batch = panoramas[at : at + size]
            texts = replicas.answers(seen[:, batch], [queries[panorama] for panorama in batch])
            for of_replica, many in zip(answered, texts, strict=True):
                of_replica.setdefault(name, {}).update(
                    ((panorama, query), text)
                    for panorama, each in zip(batch, many, strict=True)
                    for query, text in zip(queries[panorama], each, strict=True)
                )
    return answered


def _rolled(replicas: Replicas, features: np.ndarray) -> dict[str, np.ndarray]:
    """Features by the name of the answers, as `panollava evaluate` finds them."""
    settings = replicas.settings
    named, count = {PREDICTION: features}, len(layout(settings.views).projections)
    sampled = resampled(settings.views, settings.evaluate.rolls)
    others = replicas.features("rolled") if sampled else features
    for degrees in settings.evaluate.rolls:
        shift = view_shift(settings.views, degrees)
        if shift is None:
            values = others[:, sampled.index(degrees) :: len(sampled)]
        else:
            values = np.roll(features, shift * (features.shape[2] // count), axis=2)
        named[rolled_name(degrees)] = values
    return named


def count_scores(
    reader: FactReader, answers: Answers, references: References, rolls: Any
) -> dict[str, list]:
    predicted = {name: reader.read_all(texts) for name, texts in answers.items()}
    original = predicted[PREDICTION]
    reference = reader.read_all({key: texts[0] for key, texts in references.items()})
    kinds = sorted({kind for facts in reference.values() for kind, _ in facts})

    def of(wanted: str) -> Callable[[str, Any], bool]:
        return lambda kind, _: kind == wanted

    counts = {kind: count_facts(original, reference, of(kind)) for kind in kinds}

    def stays(kind: str, _: Any) -> bool:
        return kind not in reader.directed

    def turns(kind: str, _: Any) -> bool:
        return kind in reader.directed

    for degrees in rolls:
        expected, rolled = reader.roll(original, degrees), predicted[rolled_name(degrees)]
        counts[f"stays, turned by {degrees:g}"] = count_facts(rolled, expected, stays)
        if reader.maps_directions(degrees):
            counts[f"turns, turned by {degrees:g}"] = count_facts(rolled, expected, turns)
    return {name: values.tolist() for name, values in counts.items()}
