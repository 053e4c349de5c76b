"""Metrics of a model's answers: `compute_details` measures everything, `headline` selects the few
numbers that people compare. How the answers are generated is in `evaluate`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from panollava.evaluation.captions import Scores, agreement, score
from panollava.evaluation.confidence import interval_of_mean
from panollava.evaluation.facts import FactReader, Key, compare, rotation, seam

# Names of answers, by what the model saw; also the columns of predictions.csv.
PREDICTION = "prediction"  # the panorama itself
SWAPPED = "swapped"  # another panorama

Answers = Mapping[str, Mapping[Key, str]]


def rolled_name(degrees: float) -> str:
    """The name of the answers for panoramas rolled by `degrees`."""
    return f"turned by {degrees:g}"


def compute_details(
    answers: Answers,
    references: Mapping[Key, list[str]],
    rolls: Sequence[float],
    reader: FactReader | None,
) -> dict[str, Any]:
    """Caption scores; the grounding gap, the difference to the scores with another panorama;
    agreement with the answers for rolled panoramas; and, if there is a `reader`, F1 of the stated
    facts. `interval` holds 95% intervals of the scores that are means."""
    scores = score(answers[PREDICTION], references)
    details: dict[str, Any] = {
        "captions": len(references),
        "panoramas": len({panorama for panorama, _ in references}),
        "references": sum(map(len, references.values())),
        **scores.values,
        "interval": _intervals(scores.each),
    }
    if SWAPPED in answers:
        swapped = score(answers[SWAPPED], references)
        details["swapped"] = {k: v for k, v in swapped.values.items() if isinstance(v, float)}
        details["grounding_gap"] = _grounding_gap(scores, swapped)
    if rolls:
        details["rotation"] = {
            f"{degrees:g}": _agreement(answers[rolled_name(degrees)], answers[PREDICTION])
            for degrees in rolls
        }
    if reader is not None:
        _add_facts(details, answers, references, rolls, reader)
    return details


def headline(details: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of `details` that people compare, at most 16 for the demo. Those that could not
    be computed are left out."""
    gap, seam_gap = details.get("grounding_gap", {}), (details.get("seam") or {}).get("gap", {})
    facts = {kind: result["f1"] for kind, result in details.get("facts", {}).items()}
    selected = {
        **{name: details.get(name) for name in ("bleu_4", "rouge_l", "cider_d")},
        "grounding_gap": gap.get(gap.get("headline")),
        "rotation": _mean_over_rolls([*details.get("rotation", {}).values()]),
        "seam": seam_gap.get("value"),
        "facts": {kind: f1 for kind, f1 in facts.items() if f1 is not None},
    }
    return {name: value for name, value in selected.items() if value not in (None, {})}


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """("rotation.stays", value) for every number in nested metrics."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _grounding_gap(scores: Scores, swapped: Scores) -> dict[str, Any]:
    """Differences of all scores; `headline` names the one that is reported."""
    gaps = {
        name: scores.values[name] - value
        for name, value in swapped.values.items()
        if isinstance(value, float) and name in scores.values
    }
    each = {
        name: {key: value - swapped.each[name][key] for key, value in values.items()}
        for name, values in scores.each.items()
        if name in swapped.each
    }
    reported = next((name for name in ("cider_d", "rouge_l") if name in gaps), None)
    return {**gaps, "interval": _intervals(each), "headline": reported}


def _agreement(rolled: Mapping[Key, str], original: Mapping[Key, str]) -> dict[str, Any]:
    scores = agreement(rolled, original)
    return {**scores.values, "interval": _intervals(scores.each)}


def _add_facts(
    details: dict[str, Any],
    answers: Answers,
    references: Mapping[Key, list[str]],
    rolls: Sequence[float],
    reader: FactReader,
) -> None:
    """Add F1 of facts for each input, their consistency under rotation, and the seam's accuracy.
    The first reference of each query holds the correct facts."""
    predicted = {name: reader.read_all(texts, references) for name, texts in answers.items()}
    first = {key: texts[0] for key, texts in references.items()}
    reference = reader.read_all(first, references)
    details["facts"] = compare(predicted[PREDICTION], reference)
    if SWAPPED in predicted:
        details["swapped"]["facts"] = compare(predicted[SWAPPED], reference)
    rolled = {degrees: predicted[rolled_name(degrees)] for degrees in rolls}
    for degrees, consistency in rotation(reader, predicted[PREDICTION], rolled).items():
        details["rotation"][degrees].update(consistency)
    details["seam"] = seam(reader, reference, {0.0: predicted[PREDICTION], **rolled})


def _mean_over_rolls(by_angle: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean F1 of the facts that should stay and of those that should turn. Without facts, the mean
    ROUGE-L agreement."""
    f1 = {
        name: [r[name]["f1"] for r in by_angle if name in r and r[name]["f1"] is not None]
        for name in ("stays", "turns")
    }
    rouge = [result["rouge_l"] for result in by_angle if "rouge_l" in result]
    values = f1 if any("stays" in result for result in by_angle) else {"rouge_l": rouge}
    return {name: float(np.mean(v)) for name, v in values.items() if v}


def _intervals(each: Mapping[str, Mapping[Key, float]]) -> dict[str, dict[str, float | None]]:
    return {name: interval_of_mean(values) for name, values in each.items()}
