"""Checks, before any work, that every panorama with its text fits the language model in all stages
and in the evaluation. Each stage checks its own lengths as well, but may start hours later."""

from panollava.config import Settings, TextStage
from panollava.data.rows import SPLITS
from panollava.planning.rows import read_split
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
    splits = {split: read_split(settings, split) for split in SPLITS}
    objective = load_objective(STAGES[next(iter(text_stages))], settings, weights=False)
    model, dialogue = objective.model, objective.dialogue
    start = objective.text_prefix + objective.vision_tokens
    needs: list[tuple[int, str]] = []  # tokens of a sequence, and what makes it shorter

    for name, stage in text_stages.items():
        dialogue.max_text_length = length = stage.max_text_length
        if train := splits["train"]:
            rows, used = train.tokenize(dialogue, True, stage.labeled, f"stage.{name}: ")
            length = int(rows.lengths[used].max())
        remedy = f"lower stage.{name}.max_text_length ({stage.max_text_length})"
        needs.append((start + length, remedy))

    if valid := splits["valid"]:
        rows, _ = valid.tokenize(dialogue, truncate=False)
        longest = int(rows.lengths.argmax())
        tokens = start + int(rows.lengths[longest])
        needs.append((tokens, f"shorten {valid.place(longest)}" if tokens > model.window else ""))

    evaluation = settings.evaluate
    evaluated = splits[evaluation.split]
    queries = evaluated.read()["query"].unique() if evaluated else [""]
    length = max(len(dialogue.query(query)) for query in queries) + evaluation.max_new_tokens
    needs.append((start + length, f"lower evaluate.max_new_tokens ({evaluation.max_new_tokens})"))

    remedies = [remedy for tokens, remedy in needs if tokens > model.window]
    model.check_length(max(tokens for tokens, _ in needs), " and ".join(remedies))
