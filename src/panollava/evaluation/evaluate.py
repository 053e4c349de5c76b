"""Answers every (panorama, query) of a split with the trained model; writes answers and metrics.

Each query is also asked with the panorama rolled by several angles, where answers should stay the
same except for directions, and once without a picture."""

import json
import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from tqdm import tqdm

from panollava import paths
from panollava.config import Settings
from panollava.data.batches import gather, roll_views
from panollava.data.shards import Shards, verify
from panollava.evaluation import metrics
from panollava.evaluation.captions import Scores, score
from panollava.evaluation.facts import Key, find_reader
from panollava.evaluation.grounding import swapped_answers
from panollava.evaluation.metrics import NO_PICTURE, PREDICTION, Answers, References, rolled_name
from panollava.files import read_prepared_rows, write_csv, write_json
from panollava.geometry.views import layout, resampled, view_shift
from panollava.model import ranks
from panollava.model.device import configure_cpu
from panollava.model.generate import Answer
from panollava.model.panollava import PanoLLaVA, load_finetuned
from panollava.provenance.made_from import check_features
from panollava.stages import INFERENCE

log = logging.getLogger(__name__)

READS = ("views", "model", "evaluate", *INFERENCE)
SCORES = ("rouge_l", "cider_d")  # of single answers
_SHOWN_QUERIES = 30


class Inputs(NamedTuple):
    """What the model sees: for panorama p, `features[indices[p]]`, rolled by `shift` view strides;
    no picture without `features`."""

    name: str
    features: Shards | None
    indices: NDArray
    shift: int = 0


def evaluate(settings: Settings) -> None:
    """Write the answers (runs/evaluate/predictions.csv), everything measured (details.json), mean
    scores of each query (scores_by_query.csv) and the headline numbers
    (metrics/evaluate/metrics.json)."""
    configure_cpu(settings.trainer.threads)
    model = load_finetuned(settings)
    check_features(settings, model.network.encoder)
    rows = read_prepared_rows(paths.PREPARED / settings.evaluate.split / "rows.csv")
    references = metrics.group_references(rows)
    answered = {
        inputs.name: _answer_all(model, inputs, [*references], settings)
        for inputs in _find_inputs(settings)
    }
    answered[NO_PICTURE] = _answer_without_picture(model, [*references], settings)
    if ranks.rank():
        return
    answers = {n: {key: a.text for key, a in each.items()} for n, each in answered.items()}
    scores = score(answers[PREDICTION], references)
    table = _tabulate(answers, references, dict(zip(rows["panorama"], rows["url"], strict=True)))
    table = table.assign(**{name: _column(scores, name, references) for name in SCORES})
    write_csv(paths.PREDICTIONS, table)
    write_csv(paths.SCORES_BY_QUERY, _by_query(table))
    facts = settings.evaluate.facts
    reader = None if facts is None else find_reader(facts)
    details = metrics.compute_details(answers, references, settings.evaluate.rolls, reader, scores)
    details["cut_answers"] = _count_cut(answered[PREDICTION], settings.evaluate.max_new_tokens)
    headline = metrics.headline(details, reader)
    log.info("%s", tabulate(pd.json_normalize(headline).T, tablefmt="plain", floatfmt=".3f"))
    write_json(paths.EVALUATION_DETAILS, details)
    write_json(paths.EVALUATION, headline)


def _find_inputs(settings: Settings) -> list[Inputs]:
    """Each panorama itself, and each roll. A roll that only reorders the views reads the features
    of the panorama itself."""
    features = Shards(paths.FEATURES / settings.evaluate.split)
    rolled = Shards(paths.FEATURES / paths.ROLLED.name)
    ranks.on_first(lambda: verify([features, rolled]))
    indices = np.arange(len(features))
    inputs = [Inputs(PREDICTION, features, indices)]
    sampled = resampled(settings.views, settings.evaluate.rolls)
    for degrees in settings.evaluate.rolls:
        shift, name = view_shift(settings.views, degrees), rolled_name(degrees)
        if shift is None:
            places = indices * len(sampled) + sampled.index(degrees)
            inputs.append(Inputs(name, rolled, places))
        else:
            inputs.append(Inputs(name, features, indices, shift))
    return inputs


def _answer_all(
    model: PanoLLaVA, inputs: Inputs, keys: list[Key], settings: Settings
) -> dict[Key, Answer]:
    """The model's answers to all (panorama, query) in `keys`, in batches of panoramas, which ranks
    take in turn."""
    views = len(layout(settings.views).projections)
    queries_of: dict[int, list[str]] = {}
    for panorama, query in keys:
        queries_of.setdefault(panorama, []).append(query)
    panoramas = list(queries_of)
    size = settings.evaluate.batch_size

    def answer(start: int) -> dict[Key, Answer]:
        batch = panoramas[start : start + size]
        features = None
        if inputs.features is not None:
            features = gather(inputs.features, [int(inputs.indices[p]) for p in batch])
            rolled = [roll_views(each, inputs.shift, views) for each in features]
            features = torch.stack(rolled).to(model.device)
        queries = [queries_of[panorama] for panorama in batch]
        texts = model.answer_features(features, queries, settings.evaluate.max_new_tokens)
        return {
            (panorama, query): text
            for panorama, answered in zip(batch, texts, strict=True)
            for query, text in zip(queries_of[panorama], answered, strict=True)
        }

    starts = range(0, len(panoramas), size)
    answers: dict[Key, Answer] = {}
    batches = ranks.map_in_turn(answer, starts)
    for batch in tqdm(batches, desc=f"answers, {inputs.name}", total=len(starts)):
        answers |= batch
    return answers


def _answer_without_picture(
    model: PanoLLaVA, keys: list[Key], settings: Settings
) -> dict[Key, Answer]:
    """The model's answers to queries without a picture: one per query, for all panoramas."""
    queries = dict.fromkeys(query for _, query in keys)
    once = [(number, query) for number, query in enumerate(queries)]
    inputs = Inputs(NO_PICTURE, None, np.arange(len(once)))
    answers = _answer_all(model, inputs, once, settings)
    of_query = {query: answer for (_, query), answer in answers.items()}
    return {(panorama, query): of_query[query] for panorama, query in keys}


def _count_cut(answers: Mapping[Key, Answer], limit: int) -> int:
    """Number of answers that were cut, with a warning."""
    if cut := sum(answer.cut for answer in answers.values()):
        message = "%d of %d answers are cut at evaluate.max_new_tokens %d"
        log.warning(message, cut, len(answers), limit)
    return cut


def _tabulate(answers: Answers, references: References, urls: dict[int, str]) -> pd.DataFrame:
    """One row for each (panorama, query). `swapped` is another panorama's prediction, of the first
    draw; empty where no other panorama was asked the query."""
    swapped, *_ = swapped_answers(answers[PREDICTION]) or [{}]
    return pd.DataFrame(
        {
            "panorama": panorama,
            "url": urls[panorama],
            "query": query,
            PREDICTION: answers[PREDICTION][panorama, query],
            "swapped": swapped.get((panorama, query), ""),
            **{name: texts[panorama, query] for name, texts in answers.items()},
            "references": json.dumps(reference, ensure_ascii=False),
        }
        for (panorama, query), reference in references.items()
    )


def _column(scores: Scores, name: str, references: References) -> list[float | None]:
    """A score of each answer; None where there is none."""
    each = scores.each.get(name, {})
    return [each.get(key) for key in references]


def _by_query(table: pd.DataFrame) -> pd.DataFrame:
    """Mean scores of the queries that most panoramas were asked, for a plot."""
    groups = table.groupby("query", sort=False)
    means = groups[[*SCORES]].mean().assign(panoramas=groups.size())
    return means.nlargest(_SHOWN_QUERIES, "panoramas").reset_index()
