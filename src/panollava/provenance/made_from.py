"""Records what `runs/prepared` and `runs/features` were made from (data, views, rolls, encoder
weights), in `provenance.json` in each folder, and raises an error where these have changed since.

DVC reruns what is outdated. Commands that run without DVC rely on these checks."""

import dataclasses
import json
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is slow to import, and `prepare` does not need it
    from torch import nn

from panollava import config, paths
from panollava.errors import UserError
from panollava.files import write_json
from panollava.provenance.fingerprint import file_sha256, fingerprint

_NAME = "provenance.json"
# That determine the features, besides views and encoder.
_FEATURE_PARAMETERS = (
    *("model.tokens", "model.sphere_rows", "model.sphere_columns", "model.resampler.pool"),
    *("model.features", "trainer.precision"),
)


def invalidate(folder: Path) -> None:
    """Delete the folder's record, before the other files are overwritten."""
    (folder / _NAME).unlink(missing_ok=True)


def record_prepared(
    settings: config.Settings, out: Path, digests: Mapping[str, str], sources: Mapping[str, str]
) -> None:
    """Write `out`/provenance.json, after `prepare` has written the shard sets with these
    `digests`, and the rows. `sources`: of each split, the `hash_source` of its CSV file."""
    parameters = _parameters(settings.views, settings.data, settings.evaluate)
    rows = {split: [source, *_hash_rows(out / split)] for split, source in sources.items()}
    write_json(out / _NAME, {**parameters, "digests": {**digests}, "rows": rows})


def hash_source(csv: Path) -> str:
    """The SHA-256 of a CSV file; empty if there is none."""
    return file_sha256(csv) if csv.is_file() else ""


def is_prepared_from(csv: Path, folder: Path) -> bool:
    """Whether `prepare` wrote the rows in `folder`, that of a split, from this CSV file, and none
    of these files has changed since. False if that is not recorded."""
    try:
        recorded = json.loads((folder.parent / _NAME).read_text())["rows"][folder.name]
        return recorded == [hash_source(csv), *_hash_rows(folder)]
    except (OSError, ValueError, LookupError):
        return False


def _hash_rows(folder: Path) -> list[str]:
    return [file_sha256(folder / name) for name in ("rows.csv", "rejects.csv")]


def check_prepared(
    views: config.Views,
    data: config.Data | None = None,
    evaluate: config.Evaluate | None = None,
) -> None:
    """Raises UserError if `runs/prepared` was made with other view parameters, from another
    `data.dir`, or for other rolls or another split of the evaluation. None: not compared."""
    _check(paths.PREPARED, _parameters(views, data, evaluate), "prepare")


def record_features(settings: config.Settings, encoder: "nn.Module") -> None:
    """Write runs/features/provenance.json."""
    write_json(paths.FEATURES / _NAME, _describe_features(settings, encoder))


def check_features(settings: config.Settings, encoder: "nn.Module") -> None:
    """Raises UserError if `runs/features` was made with another encoder or precision,
    or from views, rolled ones included, other than those in `runs/prepared`."""
    _check(paths.FEATURES, _describe_features(settings, encoder), "features")


def _describe_features(settings: config.Settings, encoder: "nn.Module") -> dict[str, Any]:
    # The prepared views, of which `prepare` records rolls and split, are compared by content: rolls
    # that only reorder views ask for no other features.
    return {
        "model.encoder.layer": encoder.layer,
        "encoder configuration": fingerprint(encoder.describe(), [], {}),  # type: ignore[operator]
        "encoder weights": fingerprint(None, [], encoder.state_dict()),
        **{key: operator.attrgetter(key)(settings) for key in _FEATURE_PARAMETERS},
        "prepared views": _read(paths.PREPARED, "prepare")["digests"],
    }


def _parameters(
    views: config.Views, data: config.Data | None, evaluate: config.Evaluate | None
) -> dict[str, Any]:
    result: dict[str, Any] = {f"views.{k}": v for k, v in dataclasses.asdict(views).items()}
    if data:
        result["data.dir"] = os.path.normpath(data.dir)
    if evaluate:
        result |= {"evaluate.rolls": evaluate.rolls, "evaluate.split": evaluate.split}
    return result


def _check(folder: Path, expected: dict[str, Any], command: str) -> None:
    recorded = _read(folder, command)
    for key, value in expected.items():
        before = recorded.get(key)
        if before != value:
            is_parameter = "." in key
            difference = f"{key} {before}, now {value}" if is_parameter else f"other {key}"
            option = f", or pass --data-dir {before}" if key == "data.dir" else ""
            raise UserError(f"{folder}: made with {difference}; {_remedy(command)}{option}")


def _read(folder: Path, command: str) -> dict[str, Any]:
    file = folder / _NAME
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {_remedy(command)}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); {_remedy(command)}") from None


def _remedy(command: str) -> str:
    return f"run: dvc repro {command} (without DVC: panollava {command})"
