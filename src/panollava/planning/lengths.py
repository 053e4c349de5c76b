"""Checks, before any work, that every panorama with its text fits the language model in all stages
and in the evaluation. Each stage checks its own lengths as well, but may start hours later."""

import pandas as pd

from panollava.config import Settings, TextStage
from panollava.data.batches import labeled_rows
from panollava.data.dialogue import Dialogue
from panollava.data.rows import SPLITS
from panollava.planning.plan import read_split
from panollava.stages import STAGES
from panollava.training.objective import load_objective


def check_lengths(settings: Settings) -> None:
    """Loads the towers' configurations and the tokenizer; no weights. The language model must exist
    even if only the vision stage is to run, because all stages after it need it.

    Raises:
        UserError: a sequence may be too long, a query leaves no room for its answer, or a tower
            cannot be loaded. Without rows, their largest lengths are assumed.
    """
    text_stages = {n: s for n, s in vars(settings.stage).items() if isinstance(s, TextStage)}
    tables = {split: read_split(settings, split) for split in SPLITS}
    objective = load_objective(STAGES[next(iter(text_stages))], settings, weights=False)
    model, dialogue = objective.model, objective.dialogue
    start = objective.text_prefix + objective.vision_tokens
    needs: list[tuple[int, str]] = []  # tokens of a sequence, and what makes it shorter

    for name, stage in text_stages.items():
        dialogue.max_text_length = length = stage.max_text_length
        train, file = tables["train"]
        if train is not None:
            rows = labeled_rows(train, stage.labeled)
            if start + length <= model.window:
                rows = rows.drop_duplicates("query")  # any answer is cut to a length that fits
            length, _ = _longest(dialogue, rows, f"stage.{name}: {file}", truncate=True)
        remedy = f"lower stage.{name}.max_text_length ({stage.max_text_length})"
        needs.append((start + length, remedy))

    valid, file = tables["valid"]
    if valid is not None:
        length, place = _longest(dialogue, valid, str(file), truncate=False)
        needs.append((start + length, f"shorten {place}"))

    evaluation = settings.evaluate
    rows, _ = tables[evaluation.split]
    queries = [""] if rows is None else rows["query"].unique()
    length = max(len(dialogue.query(query)) for query in queries) + evaluation.max_new_tokens
    needs.append((start + length, f"lower evaluate.max_new_tokens ({evaluation.max_new_tokens})"))

    remedies = [remedy for tokens, remedy in needs if tokens > model.window]
    model.check_length(max(tokens for tokens, _ in needs), " and ".join(remedies))


def _longest(dialogue: Dialogue, rows: pd.DataFrame, file: str, truncate: bool) -> tuple[int, str]:
    """Tokens of the longest row, and its place."""
    lengths = []
    for row in rows.itertuples():
        place = f"{file}, row {row.row} ({row.url})"
        tokens = len(dialogue.row(row.query, row.annotation, place, truncate))
        lengths.append((tokens, place))
    return max(lengths, default=(0, file))
