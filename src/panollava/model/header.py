"""The header of a result: its stage, the settings that rebuild the model, and which pretrained
towers it belongs to. Training writes it; `PanoLLaVA.from_pretrained` reads it."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from panollava import config
from panollava.errors import UserError
from panollava.model.pretrained import check_files, describe_tower
from panollava.model.weights import read_header
from panollava.stages import STAGES, Stage

TOWERS = ("encoder", "language_model")


class Header(NamedTuple):
    stage: Stage  # `saves` are the parts in the file
    model: config.Model
    views: config.Views
    precision: str  # trainer.precision of the training
    towers: dict[str, Any]  # of each tower, see `describe_tower`


def make_header(stage: Stage, settings: config.Settings, towers: Iterable[str]) -> dict[str, Any]:
    """The header as JSON values. `towers`: those that the stage's model has, already loaded."""
    described = {
        "views": dataclasses.asdict(settings.views),
        "encoder": dataclasses.asdict(settings.model.encoder),
    }
    if "resampler" in stage.saves:
        described["model"] = dataclasses.asdict(settings.model)
    return {
        "stage": stage.name,
        "parts": list(stage.saves),
        "settings": described,
        "precision": settings.trainer.precision,
        "towers": {name: describe_tower(getattr(settings.model, name)) for name in towers},
    }


def load_header(path: Path) -> Header:
    """The header of a text stage's result.

    Raises:
        UserError: the file is missing or unreadable, has no language model, or was written by a
            version with other settings.
    """
    return parse_header(read_header(path), path)


def parse_header(raw: dict[str, Any], path: Path) -> Header:
    """The header that `path` holds. Raises UserError, see `load_header`."""
    stage = STAGES.get(raw.get("stage", ""))
    if stage is None or "resampler" not in stage.saves:
        raise UserError(
            f"{path}: a result of stage '{raw.get('stage')}' has no language model and cannot "
            "answer; use one of resampler or finetune"
        )
    try:
        settings, precision, towers = raw["settings"], raw["precision"], raw["towers"]
        stage = dataclasses.replace(stage, saves=tuple(raw["parts"]))
        model = config.checked(config.Model, settings["model"], f"{path}: settings.model")
        views = config.checked(config.Views, settings["views"], f"{path}: settings.views")
    except (KeyError, TypeError, UserError) as error:
        raise UserError(
            f"{path}: the header is of another version of PanoLLaVA ({error}); train it again, or "
            "use that version"
        ) from None
    return Header(stage, model, views, precision, towers)


def check_header(header: Header, stage: Stage, settings: config.Settings, path: Path) -> None:
    """Raises UserError if the result in `path` is not of `stage`, or was trained with another model
    or other views than `settings` name."""
    if header.stage.name != stage.name:
        raise UserError(f"{path}: a result of stage '{header.stage.name}', expected '{stage.name}'")
    for section in ("views", "model"):
        before, now = (_flatten(section, getattr(each, section)) for each in (header, settings))
        for key, value in before.items():
            if value != now[key]:
                raise UserError(
                    f"{path}: trained with {key} {value!r}, params.yaml has {now[key]!r}; restore "
                    f"it, or train again: dvc repro {stage.name}"
                )


def check_lora(raw: dict[str, Any], settings: config.Lora, path: Path) -> None:
    """Raises UserError if the adapter in `path` was trained with another alpha, which scales it.
    Its tensors show every other difference."""
    before = raw["settings"]["model"]["lora"]["alpha"]
    if before != settings.alpha:
        raise UserError(
            f"{path}: its adapter was trained with model.lora.alpha {before}, params.yaml has "
            f"{settings.alpha}; restore it, or train again: dvc repro {raw['stage']}"
        )


def _flatten(key: str, value: Any) -> dict[str, Any]:
    """The values of nested sections, by their dotted keys."""
    if not isinstance(value, config.Section):
        return {key: value}
    parts = [_flatten(f"{key}.{name}", part) for name, part in vars(value).items()]
    return {name: each for part in parts for name, each in part.items()}


def with_tower(
    header: Header, name: str, file: Path, place: str | Path | None, trust: bool
) -> Header:
    """The header with the place to load the tower `name` from: `place` if it is given, otherwise
    the hub, or the folder of the training, relative to the working directory or to a folder above
    the result's `file`.

    Raises:
        UserError: the folder is missing or has other files than in training, or the tower needs
            code that comes with its weights, and `trust` is False.
    """
    tower, recorded = getattr(header.model, name), header.towers[name]
    if tower.trust_remote_code and not trust:
        raise UserError(
            f"{file}: its {name} '{tower.path}' runs code that comes with its weights; if you "
            "trust that code, pass trust_remote_code=True"
        )
    path, revision = str(place or tower.path), recorded.get("commit")
    if "files" in recorded:
        above = file.absolute().parents
        candidates = [Path(path), *([] if place else (folder / path for folder in above))]
        found = next((folder for folder in candidates if folder.is_dir()), None)
        if found is None:
            raise UserError(
                f"{path}: no such folder; expected the {name} that {file} was trained with; pass "
                f"{name}= with its place"
            )
        check_files(found, recorded["files"], name)
        path = str(found)
    tower = dataclasses.replace(tower, path=path, revision=revision)
    return header._replace(model=dataclasses.replace(header.model, **{name: tower}))
