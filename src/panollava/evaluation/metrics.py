"""Metrics of a model's answers: `compute_details` measures everything, `headline` selects the few
numbers that people compare. How the answers are generated is in `evaluate`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from panollava.evaluation.captions import Scores, agreement, score
from panollava.evaluation.confidence import interval_of_mean
from panollava.evaluation.facts import FactReader, Key, compare, rotation, seam
from panollava.evaluation.grounding import grounding_gap, reported_score

# Names of answers, by what the model saw; also the columns of predictions.csv.
PREDICTION = "prediction"  # the panorama itself
SWAPPED = "swapped"  # another panorama

Answers = Mapping[str, Mapping[Key, str]]  # by name
References = Mapping[Key, list[str]]


def rolled_name(degrees: float) -> str:
    """The name of the answers for panoramas rolled by `degrees`."""
    return f"turned by {degrees:g}"


def compute_details(
    answers: Answers, references: References, rolls: Sequence[float], reader: FactReader | None
) -> dict[str, Any]:
    """Caption scores; the grounding gap, the difference to the scores with another panorama;
    agreement with the answers for rolled panoramas; and, if there is a `reader`, F1 of the stated
    facts, their consistency under rotation and the seam's accuracy. `interval` holds 95% intervals
    of the scores that are means. The first reference of each query holds the correct facts."""
    scores = score(answers[PREDICTION], references)
    details: dict[str, Any] = {
        "panoramas": len({panorama for panorama, _ in references}),
        "references": sum(map(len, references.values())),
        **_with_intervals(scores),
    }
    if SWAPPED in answers:
        swapped = score(answers[SWAPPED], references)
        details["swapped"] = {k: v for k, v in swapped.values.items() if isinstance(v, float)}
        gap = grounding_gap(scores, swapped)
        details["grounding_gap"] = {**_with_intervals(gap), "headline": reported_score(gap)}
    if rolls:
        rolled = {f"{degrees:g}": answers[rolled_name(degrees)] for degrees in rolls}
        details["rotation"] = {
            angle: _with_intervals(agreement(texts, answers[PREDICTION]))
            for angle, texts in rolled.items()
        }
    if reader is not None:
        predicted = {name: reader.read_all(texts) for name, texts in answers.items()}
        reference = reader.read_all({key: texts[0] for key, texts in references.items()})
        original = predicted[PREDICTION]
        details["facts"] = compare(original, reference)
        if SWAPPED in predicted:
            details["swapped"]["facts"] = compare(predicted[SWAPPED], reference)
        by_roll = {degrees: predicted[rolled_name(degrees)] for degrees in rolls}
        for degrees, facts in by_roll.items():
            details["rotation"][f"{degrees:g}"] |= rotation(reader, original, facts, degrees)
        details["seam"] = seam(reader, reference, {0.0: original, **by_roll})
    return details


def headline(details: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of `details` that people compare: 14 for the demo. `rotation` is the mean over
    angles. Numbers that could not be computed are left out."""
    gap, seam_f1 = details.get("grounding_gap", {}), details.get("seam", {"gap": {}})
    rolls = details.get("rotation", {}).values()
    if "facts" in details:
        rotations = {k: [r[k]["f1"] for r in rolls if k in r] for k in ("stays", "turns")}
    else:
        rotations = {"rouge_l": [result.get("rouge_l") for result in rolls]}
    return _drop_missing(
        {
            **{name: details.get(name) for name in ("bleu_4", "rouge_l", "cider_d")},
            "grounding_gap": gap.get(gap.get("headline")),
            "rotation": {name: _mean(values) for name, values in rotations.items()},
            "seam": seam_f1["gap"].get("value"),
            "facts": {kind: result["f1"] for kind, result in details.get("facts", {}).items()},
        }
    )


def _with_intervals(scores: Scores) -> dict[str, Any]:
    intervals = {name: interval_of_mean(values) for name, values in scores.each.items()}
    return {**scores.values, "interval": intervals}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _drop_missing(metrics: dict[str, Any]) -> dict[str, Any]:
    pruned = {k: _drop_missing(v) if isinstance(v, dict) else v for k, v in metrics.items()}
    return {name: value for name, value in pruned.items() if value not in (None, {})}
