"""`panollava convert-rows`: entries of LLaVA's JSON or JSONL as rows of a CSV file. An entry that
is not one question about one picture is rejected with its reason."""

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from panollava.data.rows import COLUMNS
from panollava.data.tables import read_text
from panollava.data.texts import is_blank
from panollava.errors import UserError
from panollava.files import write_csv

log = logging.getLogger(__name__)

_IMAGE = "<image>"
_ROLES = {"human": "query", "user": "query", "gpt": "annotation", "assistant": "annotation"}
_PICTURES = ("image", "images")
_TURNS = ("conversations", "conversation", "messages")


class _RejectedError(Exception):
    """An entry that cannot be a row. The message is the reason."""


def convert_rows(source: Path, out: Path) -> None:
    """Write the entries of `source` to `out` with columns url, query and annotation, and the
    number (from 0), id and reason of each rejected one to OUT.rejects.csv.

    Raises:
        UserError: `source` is no such file, no entry can be a row, or an output exists already.
    """
    rejects_file = out.with_name(f"{out.stem}.rejects.csv")
    for file in (out, rejects_file):
        if file.exists():
            raise UserError(f"{file}: exists already; move it away, or name another file")
    rows, rejects = [], []
    entries = _entries(source)
    for number, entry in enumerate(entries):
        try:
            rows.append(_row(entry))
        except _RejectedError as error:
            name = entry.get("id", "") if isinstance(entry, dict) else ""
            rejects.append((number, _printable(str(name)), str(error)))
    counts = Counter(reason for *_, reason in rejects)
    summary = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())
    if not rows:
        raise UserError(f"{source}: none of {len(entries)} entries can be a row: {summary}")
    if rejects:
        write_csv(rejects_file, pd.DataFrame(rejects, columns=["entry", "id", "reason"]))
        log.info("%d entries rejected, see %s: %s", len(rejects), rejects_file, summary)
    write_csv(out, pd.DataFrame(rows, columns=list(COLUMNS)))
    log.info("%d of %d entries are rows of %s", len(rows), len(entries), out)


def _entries(source: Path) -> list[Any]:
    text = read_text(source, "name a file in LLaVA's JSON or JSONL")
    if not text.strip():
        raise UserError(f"{source}: empty; expected LLaVA's JSON or JSONL")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("{"):
            raise UserError(
                f"{source}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}; "
                "get the file anew, or correct it there"
            ) from None
        return [_line(line) for line in re.split(r"[\r\n]+", text) if line.strip()]
    except RecursionError:
        raise UserError(f"{source}: nested too deeply for LLaVA's JSON") from None
    return value if isinstance(value, list) else [value]


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def _row(entry: Any) -> tuple[str, str, str]:
    """url, query and annotation. Raises _RejectedError."""
    if not isinstance(entry, dict):
        raise _RejectedError("not a JSON object")
    turns = next((entry[key] for key in _TURNS if entry.get(key)), None)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _RejectedError("no conversations")
    url = _picture(entry)
    texts: dict[str, str] = {}
    for turn in turns:
        role = _ROLES.get(str(turn.get("from", turn.get("role"))))
        text = turn.get("value", turn.get("content"))
        if role is None:
            raise _RejectedError("a turn of neither human nor gpt")
        if not isinstance(text, str):
            raise _RejectedError("a turn without a text")
        if role in texts:
            raise _RejectedError("several turns")
        if role == "annotation" and not texts:
            raise _RejectedError("an answer before its question")
        texts[role] = text
    if len(texts) < 2:
        raise _RejectedError("no answer" if texts else "no conversations")
    query, annotation = texts["query"], texts["annotation"]
    if query.count(_IMAGE) > 1:
        raise _RejectedError("several pictures")
    if _IMAGE in annotation:
        raise _RejectedError(f"{_IMAGE} in the answer")
    query = re.sub(rf"\s*{_IMAGE}\s*", " ", query).strip() if _IMAGE in query else query
    for name, text in zip(COLUMNS, (url, query, annotation), strict=True):
        if is_blank(text):
            raise _RejectedError(f"empty {name}")
        if text != _printable(text):
            raise _RejectedError(f"{name} with half a character")
    return url, query, annotation


def _picture(entry: dict[str, Any]) -> str:
    pictures = next((entry[key] for key in _PICTURES if entry.get(key)), None)
    if pictures is None:
        raise _RejectedError("a video" if entry.get("video") else "no picture")
    if isinstance(pictures, list) and len(pictures) == 1:
        pictures = pictures[0]
    if isinstance(pictures, list):
        raise _RejectedError("several pictures")
    if not isinstance(pictures, str):
        raise _RejectedError("a picture that is no file name")
    return pictures


def _printable(text: str) -> str:
    """Without parts of characters (JSON may escape them), which UTF-8 has no form for."""
    return text.encode("utf-8", "replace").decode("utf-8")
