"""What the prepared data and the features were made of, kept beside them. DVC knows when they have
to be made anew; where commands are run without it, what an earlier one left may be of other data,
views or weights."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # prepare needs no torch
    from torch import nn

from panollava import config, paths
from panollava.errors import UserError
from panollava.files import write_json
from panollava.provenance.fingerprint import file_sha256, fingerprint

_NAME = "provenance.json"


def invalidate(folder: Path) -> None:
    """Before what lies in the folder is made anew."""
    (folder / _NAME).unlink(missing_ok=True)


def record_prepared(data: config.Data, views: config.Views, out: Path) -> None:
    """Write `out`/provenance.json, where `prepare` has written the rest."""
    files = {str(file.relative_to(out)): file_sha256(file) for file in sorted(out.rglob("*.npy"))}
    _write(out, {"data.dir": os.path.normpath(data.dir), **_flat(views), "files": files})


def check_prepared(views: config.Views, data: config.Data | None = None) -> None:
    """Raises UserError if `runs/prepared` is of other views, or of other data than `data`."""
    expected = _flat(views)
    if data is not None:
        expected["data.dir"] = os.path.normpath(data.dir)
    _check(paths.PREPARED, expected, "prepare")


def record_features(settings: config.Settings, encoder: "nn.Module") -> None:
    """Write runs/features/provenance.json."""
    _write(paths.FEATURES, _features(settings, encoder))


def check_features(settings: config.Settings, encoder: "nn.Module") -> None:
    """Raises UserError if `runs/features` is of another encoder than this, or of other views than
    those of `runs/prepared`."""
    _check(paths.FEATURES, _features(settings, encoder), "features")


def _features(settings: config.Settings, encoder: "nn.Module") -> dict[str, Any]:
    return {
        "encoder weights": fingerprint(None, [], encoder.state_dict()),
        "model.resampler.pool": settings.model.resampler.pool,
        "model.features": settings.model.features,
        "prepared views": _read(paths.PREPARED, "prepare")["files"],
    }


def _check(folder: Path, expected: dict[str, Any], command: str) -> None:
    found = _read(folder, command)
    for key, value in expected.items():
        if found.get(key) != value:
            of_params = "." in key
            difference = f"{key} {found.get(key)}, now {value}" if of_params else f"other {key}"
            option = f", or go on with --data-dir {found.get(key)}" if key == "data.dir" else ""
            raise UserError(
                f"{folder}: made with {difference}; run: dvc repro {command} "
                f"(without DVC: panollava {command}{option})"
            )


def _read(folder: Path, command: str) -> dict[str, Any]:
    file = folder / _NAME
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such file; run: dvc repro {command} (without DVC: panollava {command})"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error}); remove it and run: dvc repro") from None


def _write(folder: Path, described: dict[str, Any]) -> None:
    write_json(folder / _NAME, described)


def _flat(views: config.Views) -> dict[str, Any]:
    return {f"views.{name}": value for name, value in dataclasses.asdict(views).items()}
