"""The training stages without DVC: one, or all after each other, with what has to be run again
before them."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from panollava import paths
from panollava.config import Model, load_settings
from panollava.errors import UserError
from panollava.provenance.resume import alone
from panollava.stages import STAGES, Stage, find_stage

log = logging.getLogger(__name__)

Changes = Mapping[str, Any]  # of params.yaml for this run, such as {"machine.loader_workers": 2}


def run_stage(
    name: str,
    changes: Changes,
    start: Path | None = None,
    must_resume: bool = False,
    run_name: str | None = None,
) -> None:
    """Train one stage. Other data (`data.dir` among the changes) is prepared before, and other
    data or another `start` has its features computed before, where the stage reads them.

    Raises UserError for what the user can mend."""
    stage = find_stage(name)
    if start is not None and stage.starts_from is None:
        raise UserError(
            f"{start}: stage '{name}' starts from the pretrained encoder and from no file; "
            "set model.encoder.path to start from another one"
        )
    if "data.dir" in changes:
        _prepare(changes)
    if stage.reads_features and (start is not None or "data.dir" in changes):
        _features(changes, start)
    _train(stage, changes, start, must_resume, run_name)


def run_all(changes: Changes, must_resume: bool = False, run_name: str | None = None) -> None:
    """Prepare, all training stages, and the features before the stage that reads them. Work of
    finished stages is kept until all are, so that a killed run goes on where it was."""
    _prepare(changes)
    for stage in STAGES.values():
        if stage.reads_features:
            _features(changes, None)
        # The first one's work is there as long as a run is unfinished, the others' may not be.
        first = stage.starts_from is None
        own_name = f"{run_name}_{stage.name}" if run_name else None
        with alone(f"stage{stage.number}_{stage.name}"):  # as the stage's own command is
            _train(stage, changes, None, must_resume and first, own_name)


def _prepare(changes: Changes) -> None:
    from panollava.data.prepare import READS, prepare_project
    from panollava.training.features import choose_device

    # A training follows, which may be an hour away.
    choose_device(load_settings(paths.PARAMS, changes=changes).trainer.accelerator)
    settings = load_settings(paths.PARAMS, READS, changes)
    with alone("prepare"):
        prepare_project(settings)


def _features(changes: Changes, source: Path | None) -> None:
    from panollava.training.features import READS, write_features

    with alone("features"):
        write_features(load_settings(paths.PARAMS, READS, changes), source)


def _train(
    stage: Stage, changes: Changes, start: Path | None, must_resume: bool, run_name: str | None
) -> None:
    from panollava.planning.out_of_memory import shortage_told
    from panollava.provenance.made_from import check_prepared
    from panollava.training.train import train

    settings = load_settings(paths.PARAMS, stage.reads, changes)
    everything = load_settings(paths.PARAMS, changes=changes)
    check_prepared(everything.views, everything.data)
    _warn_of_unwatched_towers(everything.model)
    with shortage_told(stage, everything):
        train(stage, settings, start, must_resume, run_name)


def _warn_of_unwatched_towers(model: Model) -> None:
    """Of folders that aren't in `model.towers`, which is all that dvc.yaml names of towers."""
    watched = Path(model.towers).resolve()
    for name, tower in (("encoder", model.encoder), ("language_model", model.language_model)):
        folder = Path(tower.path).resolve()
        if folder.is_dir() and watched not in (folder, *folder.parents):
            log.warning(
                "model.%s.path: %s is not in %s (model.towers); DVC watches that folder alone, and "
                "runs nothing again when a tower elsewhere changes",
                *(name, tower.path, model.towers),
            )
