"""What the files of a project say about data, training and evaluation, as Markdown tables. What
they do not say is "unknown"."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from panollava import paths
from panollava.config import load_settings
from panollava.data.rows import SPLITS
from panollava.errors import UserError
from panollava.provenance.fingerprint import file_sha256
from panollava.stages import STAGES, Stage

UNKNOWN = "unknown"
SCORES = ("bleu_4", "rouge_l", "cider_d")
SCORES_NOTE = (
    "Intervals are 95%, by a cluster bootstrap over panoramas. The grounding gap is the score "
    "minus that of the answers about other panoramas."
)
_STARTED, _WROTE = " INFO panollava: log: ", " INFO panollava.training.train: wrote "
_DEVICE = " INFO panollava.training.train: device: "


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def data(prepared: dict[str, Any]) -> str:
    folder = Path(prepared["data.dir"])
    rows = []
    for split in SPLITS:
        kept = _rows(paths.PREPARED / split / "rows.csv")
        rejects = _rows(paths.PREPARED / split / "rejects.csv")
        source = folder / f"{split}.csv"
        rows.append(
            (
                split,
                UNKNOWN if kept is None else len(kept),
                UNKNOWN if kept is None else kept["panorama"].nunique(),
                _kinds(rejects),
                f"`{file_sha256(source)}`" if source.is_file() else UNKNOWN,
                f"`{prepared.get('digests', {}).get(f'{split}/{paths.PANORAMAS}', UNKNOWN)}`",
            )
        )
    head = [
        "split",
        "rows",
        "panoramas",
        "rejected rows",
        "SHA-256 of the rows",
        "of the panoramas",
    ]
    return f"`{folder}`\n\n{table(head, rows)}"


def _rows(path: Path) -> pd.DataFrame | None:
    return pd.read_csv(path, keep_default_na=False) if path.is_file() else None


def _kinds(rejects: pd.DataFrame | None) -> str:
    if rejects is None:
        return UNKNOWN
    kinds = rejects["reason"].astype(str).str.split(": ").str[0].value_counts()
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return f"{len(rejects)} ({listed})" if listed else "0"


def training(stage: Stage) -> str:
    try:
        settings: Any = load_settings(paths.PARAMS)
    except UserError:
        settings = None
    rows = []
    for each in [*stages_before(stage), stage]:
        chosen = getattr(settings.stage, each.name) if settings else None
        metrics, speed = (
            read(paths.metrics_file(each.name)),
            read(paths.speed_folder(each.name) / "metrics.json"),
        )
        epochs = getattr(chosen, "epochs", UNKNOWN)
        if early := metrics.get("stopped_after_epochs"):
            epochs = f"{early} of {epochs}"
        device, time = _log(each)
        rows.append(
            (
                each.name,
                epochs,
                *(getattr(chosen, key, UNKNOWN) for key in ("batch_size", "lr")),
                metrics.get("best", {}).get("step", UNKNOWN),
                _number(metrics.get("val_loss")),
                device,
                time,
                _number(speed.get("rows_per_second")),
                _number(speed.get("peak_memory_gb")),
            )
        )
    head = ["stage", "epochs", "batch size", "learning rate", "best step", "validation loss"]
    head += ["hardware", "time of the last run", "rows a second", "peak memory, GB"]
    seed = settings.seed if settings else UNKNOWN
    return f"{table(head, rows)}\n\nSeed: {seed}. AdamW; the best epoch by validation loss is kept."


def _log(stage: Stage) -> tuple[str, str]:
    """Hardware and wall-clock time of the stage's last finished run, from its log."""
    for log in sorted(paths.LOGS.glob(f"{stage.log_name}_*.log"), reverse=True):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        started, wrote = ([line for line in lines if text in line] for text in (_STARTED, _WROTE))
        if started and wrote:
            begin, end = (datetime.fromisoformat(each[0][:19]) for each in (started, wrote))
            device = [line.split(_DEVICE)[1] for line in lines if _DEVICE in line]
            return (device or [UNKNOWN])[0], str(end - begin)
    return UNKNOWN, UNKNOWN


def evaluation(details: dict[str, Any], prepared: dict[str, Any]) -> str:
    rows = []
    for each in scores(details):
        interval = "" if each.low is None else f"{each.low:.4g} to {each.high:.4g}"
        rows.append((each.name, _number(each.value), interval))
    return (
        f"Split `{prepared.get('evaluate.split', UNKNOWN)}`: {details.get('captions', UNKNOWN)} "
        f"queries about {details.get('panoramas', UNKNOWN)} panoramas. {SCORES_NOTE}\n\n"
        + table(["metric", "value", "95% interval"], rows)
    )


class Score(NamedTuple):
    """A line of a table of scores, with the bounds of its 95% interval. `swapped` and `no_picture`:
    the same score of other panoramas' answers and of those without a picture."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    swapped: float | None = None
    no_picture: float | None = None


def scores(details: dict[str, Any]) -> list[Score]:
    gap, intervals = details.get("grounding_gap", {}), details.get("interval", {})
    others = [details.get(name, {}) for name in ("swapped", "no_picture")]
    best = gap.get("headline")
    rows = [
        Score(n, details.get(n), *_bounds(intervals.get(n)), *(each.get(n) for each in others))
        for n in SCORES
    ]
    between = _bounds(gap.get("interval", {}).get(best))
    rows.append(Score(f"grounding gap ({best or UNKNOWN})", gap.get(best), *between))
    for kind, fact in details.get("facts", {}).items():
        compared = (each.get("facts", {}).get(kind, {}).get("f1") for each in others)
        rows.append(Score(f"facts: {kind}, F1", fact["f1"], *_bounds(fact), *compared))
    if seam := details.get("seam", {}).get("gap"):
        name = "facts elsewhere minus at the seam, F1"
        rows.append(Score(name, seam["value"], *_bounds(seam)))
    rows.append(Score("answers that were cut", details.get("cut_answers")))
    return rows


def rotation_scores(details: dict[str, Any]) -> list[Score]:
    """For each roll, F1 of the facts that stay and of those that turn with the panorama, or the
    agreement of the answers where no facts are read."""
    rows = []
    for degrees, each in details.get("rotation", {}).items():
        kinds = [kind for kind in ("stays", "turns") if kind in each]
        rows += [
            Score(f"{degrees}°: facts, {kind}, F1", each[kind]["f1"], *_bounds(each[kind]))
            for kind in kinds
        ]
        if not kinds:
            bounds = _bounds(each.get("interval", {}).get("rouge_l"))
            name = f"{degrees}°: agreement with the answer unrotated, ROUGE-L"
            rows.append(Score(name, each.get("rouge_l"), *bounds))
    return rows


def _bounds(interval: dict[str, Any] | None) -> tuple[float | None, float | None]:
    """None where there is no interval: of one panorama, or of no facts."""
    return (interval["low"], interval["high"]) if interval else (None, None)


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4g}"


def stages_before(stage: Stage) -> list[Stage]:
    """The stages whose results this one was trained from, the first one first."""
    if stage.starts_from is None:
        return []
    earlier = STAGES[stage.starts_from]
    return [*stages_before(earlier), earlier]


def read(path: Path) -> dict[str, Any]:
    """The JSON values of a file; none if there is no such file. Raises UserError for a file that is
    not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); remove it, and run: dvc repro"
        ) from None
