"""Metrics of a model's answers: `compute_details` measures everything, `headline` selects the few
numbers that people compare. How the answers are generated is in `evaluate`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from panollava.evaluation.captions import Scores, agreement, score
from panollava.evaluation.confidence import interval_of_mean
from panollava.evaluation.facts import FactReader, Key, compare, rotation, seam
from panollava.evaluation.grounding import (
    grounding_gap,
    mean_scores,
    reported_score,
    swapped_answers,
)

log = logging.getLogger(__name__)

# Names of answers, by what the model saw; also the columns of predictions.csv.
PREDICTION = "prediction"  # the panorama itself
NO_PICTURE = "without picture"  # only the query

Answers = Mapping[str, Mapping[Key, str]]  # by name
References = Mapping[Key, list[str]]


def rolled_name(degrees: float) -> str:
    """The name of the answers for panoramas rolled by `degrees`."""
    return f"turned by {degrees:g}"


def group_references(rows: pd.DataFrame) -> dict[Key, list[str]]:
    """The annotations of prepared rows, by (panorama, query)."""
    references: dict[Key, list[str]] = {}
    for row in rows.itertuples():
        references.setdefault((int(row.panorama), row.query), []).append(row.annotation)
    return references


def compute_details(
    answers: Answers,
    references: References,
    rolls: Sequence[float],
    reader: FactReader | None,
    scores: Scores | None = None,
) -> dict[str, Any]:
    """Caption scores; those of other panoramas' answers and the grounding gap, the difference to
    them; those of the answers without a picture; agreement with the answers for rolled panoramas;
    and, if there is a `reader`, F1 of the stated facts, their consistency under rotation and the
    seam's accuracy. `interval` holds 95% intervals of the scores that are means. The first
    reference of each query holds the correct facts. `scores`: those of the answers, if known."""
    original = answers[PREDICTION]
    details: dict[str, Any] = {
        "panoramas": len({panorama for panorama, _ in references}),
        "references": sum(map(len, references.values())),
        **_with_intervals(scores or score(original, references)),
        **_grounding(original, references, reader),
    }
    if NO_PICTURE in answers:
        details["no_picture"] = _numbers(score(answers[NO_PICTURE], references, quiet=True))
    if rolls:
        rolled = {f"{degrees:g}": answers[rolled_name(degrees)] for degrees in rolls}
        details["rotation"] = {
            angle: _with_intervals(agreement(texts, original)) for angle, texts in rolled.items()
        }
    if reader is not None:
        predicted = {name: reader.read_all(texts) for name, texts in answers.items()}
        reference = reader.read_all({key: texts[0] for key, texts in references.items()})
        details["facts"] = compare([predicted[PREDICTION]], reference)
        if NO_PICTURE in answers:
            details["no_picture"]["facts"] = compare([predicted[NO_PICTURE]], reference)
        by_roll = {degrees: predicted[rolled_name(degrees)] for degrees in rolls}
        for degrees, facts in by_roll.items():
            turned = rotation(reader, predicted[PREDICTION], facts, degrees)
            details["rotation"][f"{degrees:g}"] |= turned
        details["seam"] = seam(reader, reference, {0.0: predicted[PREDICTION], **by_roll})
    return details


def _grounding(
    answers: Mapping[Key, str], references: References, reader: FactReader | None
) -> dict[str, Any]:
    """`swapped`: scores of other panoramas' answers, averaged over several draws, and their facts,
    pooled over them. `grounding_gap`: the scores of the answers themselves minus those, both over
    the queries that were asked of two panoramas or more."""
    swaps = swapped_answers(answers)
    if not swaps:
        log.warning("no query was asked of two panoramas: skipping the grounding gap")
        return {}
    shared = {key: texts for key, texts in references.items() if key in swaps[0]}
    unswapped = score({key: answers[key] for key in shared}, shared, quiet=True)
    swapped = mean_scores([score(swap, shared, quiet=True) for swap in swaps])
    gap = grounding_gap(unswapped, swapped)
    facts = {}
    if reader is not None:
        reference = reader.read_all({key: texts[0] for key, texts in shared.items()})
        facts["facts"] = compare([reader.read_all(swap) for swap in swaps], reference)
    return {
        "swapped": {**swapped.values, **facts},
        "grounding_gap": {
            **_with_intervals(gap),
            "headline": reported_score(gap),
            "queries": len({query for _, query in shared}),
            "captions": len(shared),
            "left_out": len(references) - len(shared),
        },
    }


def headline(details: Mapping[str, Any], reader: FactReader | None) -> dict[str, Any]:
    """The numbers of `details` that people compare: 14 for the demo. `rotation` is the mean over
    angles. Numbers that could not be computed are left out."""
    gap, seam_f1 = details.get("grounding_gap", {}), details.get("seam", {"gap": {}})
    rolls = details.get("rotation", {}).values()
    facts, kinds = details.get("facts", {}), reader.headline if reader else ()
    if facts:
        rotations = {k: [r[k]["f1"] for r in rolls if k in r] for k in ("stays", "turns")}
    else:
        rotations = {"rouge_l": [result.get("rouge_l") for result in rolls]}
    return _drop_missing(
        {
            **{name: details.get(name) for name in ("bleu_4", "rouge_l", "cider_d")},
            "grounding_gap": gap.get(gap.get("headline")),
            "rotation": {name: _mean(values) for name, values in rotations.items()},
            "seam": seam_f1["gap"].get("value"),
            "facts": {kind: facts[kind]["f1"] for kind in kinds if kind in facts},
            "cut_answers": details.get("cut_answers"),
        }
    )


def _numbers(scores: Scores) -> dict[str, Any]:
    return {name: value for name, value in scores.values.items() if isinstance(value, float)}


def _with_intervals(scores: Scores) -> dict[str, Any]:
    intervals = {name: interval_of_mean(values) for name, values in scores.each.items()}
    return {**scores.values, "interval": intervals}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _drop_missing(metrics: dict[str, Any]) -> dict[str, Any]:
    pruned = {k: _drop_missing(v) if isinstance(v, dict) else v for k, v in metrics.items()}
    return {name: value for name, value in pruned.items() if value not in (None, {})}
