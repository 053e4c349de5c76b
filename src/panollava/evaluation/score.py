"""Scores another model's answers as `evaluate` scores ours, and prints both in one table.

It computes what needs no model: caption scores, the grounding gap and facts. Rotation, the seam and
answers without a picture require running it."""

import logging
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from panollava import paths
from panollava.config import Settings
from panollava.data.tables import read_records
from panollava.errors import UserError
from panollava.evaluation.captions import TOKENIZER
from panollava.evaluation.facts import Key, find_reader
from panollava.evaluation.metrics import PREDICTION, compute_details, group_references, headline
from panollava.files import read_prepared_rows, write_json

log = logging.getLogger(__name__)

READS = ("evaluate.split", "evaluate.facts")
COLUMNS = ("url", "query", PREDICTION)


def score_file(file: Path, settings: Settings, out: Path | None) -> None:
    """Print the headline numbers of the answers in `file` (`theirs`) and of those of the last
    evaluation (`ours`, if there are any to the same rows). `out`: write all scores of both as JSON.
    Raises UserError, see `read_answers`."""
    prepared = paths.PREPARED / settings.evaluate.split / "rows.csv"
    rows = read_prepared_rows(prepared)
    references = group_references(rows)
    answers = {"theirs": (file, read_answers(file, rows, prepared))}
    try:
        answers["ours"] = (paths.PREDICTIONS, read_answers(paths.PREDICTIONS, rows, prepared))
    except UserError as error:
        log.warning("scoring theirs only; %s", error)
    facts = settings.evaluate.facts
    reader = None if facts is None else find_reader(facts)
    details: dict[str, dict[str, Any]] = {}
    for name, (source, texts) in answers.items():
        log.info("scoring %s: %s", name, source)
        details[name] = compute_details({PREDICTION: texts}, references, [], reader)
        details[name].pop("seam", None)  # without rolls it also tells which objects are behind
    table = pd.json_normalize([headline(each, reader) for each in details.values()]).T
    table = table.astype(object).where(table.notna(), None)  # None: an empty cell
    log.info("%s", tabulate(table, headers=["", *details], tablefmt="plain", floatfmt=".3f"))
    log.info("words: %s", TOKENIZER)
    if out is not None:
        write_json(out, details)


def read_answers(file: Path, rows: pd.DataFrame, prepared: Path) -> dict[Key, str]:
    """The answer to each (panorama, query) of `rows`, those in `prepared`, in their order.
    A panorama may be named by any of its urls.

    Raises:
        UserError: not such a CSV file, or rows are malformed, unknown, repeated or missing.
    """
    hint = f"expected a CSV file with columns {','.join(COLUMNS)}"
    header, places, records = read_records(file, COLUMNS, hint)
    panoramas = dict(zip(rows["url"], rows["panorama"].tolist(), strict=True))
    urls = {panorama: url for url, panorama in panoramas.items()}
    keys = dict.fromkeys(zip(rows["panorama"].tolist(), rows["query"], strict=True))
    answers: dict[Key, str] = {}
    malformed, unknown, repeated = [], [], []
    for number, record in enumerate(records):
        cells = record + [""] * (len(header) - len(record))
        url, query, prediction = (cells[places[name]] for name in COLUMNS)
        key = (panoramas.get(url, -1), query)
        place = f"row {number} ({url}, {query!r})"
        if len(record) != len(header):
            malformed.append(place)
        elif key not in keys:
            unknown.append(place)
        elif key in answers:
            repeated.append(place)
        else:
            answers[key] = prediction
    missing = [f"{urls[key[0]]}, {key[1]!r}" for key in keys if key not in answers]
    for found, total, fault in (
        (malformed, len(records), f"rows do not have {len(header)} cells"),
        (unknown, len(records), "rows are unknown"),
        (repeated, len(records), "rows repeat a panorama and query"),
        (missing, len(keys), "answers are missing"),
    ):
        if found:
            raise UserError(
                f"{file}: {len(found)} of {total} {fault}, the first: {found[0]}; "
                f"expected one row for each url and query of {prepared}"
            )
    return {key: answers[key] for key in keys}
