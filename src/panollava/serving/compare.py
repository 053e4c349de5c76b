"""The differences between the results in the working directory and those of another commit or
experiment, read through git and DVC's cache."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from dvc.scm import RevError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from panollava import paths
from panollava.config import ALWAYS_READABLE
from panollava.errors import UserError
from panollava.serving.gallery import read_predictions
from panollava.stages import STAGES

_SHOWN = 50  # answers
_COLUMNS = ("panorama", "url", "query", "prediction", "references")
_METRICS = {
    **{stage: paths.metrics_file(stage) for stage in STAGES},
    "evaluate": paths.EVALUATION,
}


class Answer(NamedTuple):
    url: str
    query: str
    before: str
    now: str
    reference: str


class Differences(NamedTuple):
    """Metrics and parameters: name, value there and value here; None where there is none."""

    revision: str
    metrics: list[tuple[str, float | None, float | None]]  # all of them
    parameters: list[tuple[str, str, str]]  # those that differ
    shared: int  # queries of both
    only_one: int
    changed: int  # answers
    answers: list[Answer]  # the first of those


def compare(revision: str) -> Differences:
    """`revision`: a commit, branch, tag or experiment.

    Raises:
        UserError: it is unknown or has no results, they are not in DVC's cache, or those here are
            missing.
    """
    files = DVCFileSystem(rev=revision)

    def both(file: Path, parse: Callable[[bytes, str], Any]) -> tuple[Any, Any]:
        there = parse(_read(files, revision, file), f"{file} of {revision}")
        return there, parse(_here(file), str(file))

    parameters = both(paths.PARAMS, _yaml)
    metrics = [both(file, _json) for file in _METRICS.values()]
    there, here = both(paths.PREDICTIONS, functools.partial(read_predictions, columns=_COLUMNS))
    before_answers, now_answers = _answers(there), _answers(here)
    shared = [key for key in now_answers if key in before_answers]
    references = dict(zip(now_answers, here["references"], strict=True))
    changed = [
        Answer(*key, before_answers[key], now_answers[key], "".join(references[key][:1]))
        for key in shared
        if before_answers[key] != now_answers[key]
    ]
    return Differences(
        revision,
        [
            (f"{name}: {key}", old, new)
            for name, each in zip(_METRICS, metrics, strict=True)
            for key, old, new in _pairs(*map(_flatten, each))
        ],
        [
            (name, json.dumps(old, ensure_ascii=False), json.dumps(new, ensure_ascii=False))
            for name, old, new in _pairs(*map(_flatten, parameters))
            if old != new and name.split(".")[0] not in ALWAYS_READABLE
        ],
        len(shared),
        len(before_answers.keys() ^ now_answers.keys()),
        len(changed),
        changed[:_SHOWN],
    )


def _read(files: DVCFileSystem, revision: str, file: Path) -> bytes:
    """Of the revision, from git or from DVC's cache or remote."""
    place = f"--compare {revision}"
    try:
        return files.read_bytes(file.as_posix())
    except RevError:
        raise UserError(
            f"{place}: no such commit or experiment; `git log` and `dvc exp list` show those "
            "that exist"
        ) from None
    except FileNotFoundError:
        if file != paths.PREDICTIONS:
            raise UserError(
                f"{place}: no {file} there; compare with a commit or experiment after whose run "
                "dvc.lock and metrics/ were committed"
            ) from None
        raise UserError(
            f"{place}: its {file} is not in DVC's cache; fetch it (dvc fetch --all-commits), or "
            "run the pipeline on that commit"
        ) from None
    except DvcException as error:
        raise UserError(f"{place}: cannot read {file} with DVC: {error}") from None


def _here(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; run: dvc repro") from None


def _json(content: bytes, place: str) -> dict[str, Any]:
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error}); run: dvc repro") from None


def _yaml(content: bytes, place: str) -> dict[str, Any]:
    try:
        return YAML(typ="safe", pure=True).load(content.decode())
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{place}: not valid YAML: {error}") from None


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Values by dotted keys."""
    if not isinstance(value, Mapping):
        return {key: value}
    parts = (_flatten(each, f"{key}.{name}".lstrip(".")) for name, each in value.items())
    return {name: leaf for part in parts for name, leaf in part.items()}


def _pairs(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys([*now, *before]):
        yield name, before.get(name), now.get(name)


def _answers(table: pd.DataFrame) -> dict[tuple[str, str], str]:
    return dict(
        zip(zip(table["url"], table["query"], strict=True), table["prediction"], strict=True)
    )
