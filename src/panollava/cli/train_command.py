"""`panollava train`: its options, each of which overrides a parameter for one run, and training one
stage, or all of them, without DVC."""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from panollava import paths
from panollava.cli.single_instance import single_instance
from panollava.config import Model, Settings, load_settings
from panollava.errors import UserError
from panollava.stages import STAGES, Stage, find_stage

log = logging.getLogger(__name__)

ALL = "all"


class Option(NamedTuple):
    flags: tuple[str, ...]
    kind: type
    key: str  # of params.yaml; STAGE stands for each stage that is trained
    meaning: str


OPTIONS = (
    Option(("--epochs",), int, "stage.STAGE.epochs", "passes over the rows; vision: panoramas"),
    Option(("--batch-size",), int, "stage.STAGE.batch_size", "rows a step; vision: panoramas"),
    Option(("--lr",), float, "stage.STAGE.lr", "learning rate"),
    Option(("--max-text-length",), int, "stage.STAGE.max_text_length", "tokens, query and answer; "
           "vision reads no text"),
    Option(("--data-dir",), str, "data.dir", "folder of train.csv, valid.csv and test.csv, which "
           "is prepared first"),
    Option(("--workers", "--num-workers"), int, "machine.loader_workers", "processes that "
           "load batches"),
    Option(("--project",), str, "machine.wandb", "project on Weights & Biases for the curves"),
)  # fmt: skip


def add_to(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", help=f"{', '.join(STAGES)}, or {ALL}: prepare and all stages")
    for option in OPTIONS:
        parser.add_argument(*option.flags, type=option.kind, help=option.meaning)
    parser.add_argument(
        "--name",
        help="name of the run on Weights & Biases (default: stage<number>_<stage>)",
    )
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="PATH",
        help=".safetensors or .ckpt of the stage before, to start from "
        "(default: runs/vlm_<stage before>/model_final.safetensors)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="end with an error if there is no unfinished run of the same settings, data and code "
        "to go on from (default: go on from it if there is one, or else start anew)",
    )


def changes(options: argparse.Namespace) -> dict[str, Any]:
    """What the given options override, by dotted keys of params.yaml."""
    trained = STAGES if options.stage == ALL else (options.stage,)
    return {
        option.key.replace("STAGE", stage): value
        for option in OPTIONS
        if (value := getattr(options, _destination(option))) is not None
        for stage in trained
    }


class HelpWithParameters(argparse.ArgumentParser):
    """Its help says the parameter that each option overrides, and the value that this has now."""

    def format_help(self) -> str:
        options = {_destination(option): option for option in OPTIONS}
        if any(action.dest == "start" for action in self._actions):  # it is train's
            settings = _settings()
            for action in self._actions:
                if option := options.get(action.dest):
                    text = f"{option.meaning} (default: {_values(settings, option.key)})"
                    action.help = text.replace("%", "%%")
        return super().format_help()


def _destination(option: Option) -> str:
    return option.flags[0].removeprefix("--").replace("-", "_")


def _settings() -> Settings | None:
    try:
        return load_settings(paths.PARAMS)
    except UserError:  # told by the command itself, not by its help
        return None


def _values(settings: Settings | None, key: str) -> str:
    """The key's value, or its values in the stages."""
    if settings is None:
        return f"{key} of params.yaml"
    if "STAGE" not in key:
        return f"{key} of params.yaml, {_value(settings, key)}"
    values = (f"{stage} {_value(settings, key.replace('STAGE', stage))}" for stage in STAGES)
    return f"{key} of params.yaml: {', '.join(values)}"


def _value(settings: Any, key: str) -> str:
    for name in key.split("."):
        settings = getattr(settings, name)
    return "null" if settings is None else f"{settings:g}" if key.endswith("lr") else str(settings)


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
        with single_instance(f"stage{stage.number}_{stage.name}"):  # as the stage's own command is
            _train(stage, changes, None, must_resume and first, own_name)


def _prepare(changes: Changes) -> None:
    from panollava.data.prepare import READS, prepare_project
    from panollava.model.device import choose_device

    # A training follows, which may be an hour away.
    choose_device(load_settings(paths.PARAMS, changes=changes).trainer.accelerator)
    settings = load_settings(paths.PARAMS, READS, changes)
    with single_instance("prepare"):
        prepare_project(settings)


def _features(changes: Changes, source: Path | None) -> None:
    from panollava.training.features import READS, write_features

    with single_instance("features"):
        write_features(load_settings(paths.PARAMS, READS, changes), source)


def _train(
    stage: Stage, changes: Changes, start: Path | None, must_resume: bool, run_name: str | None
) -> None:
    from panollava.planning.out_of_memory import explain_out_of_memory
    from panollava.provenance.made_from import check_prepared
    from panollava.training.train import train

    settings = load_settings(paths.PARAMS, stage.reads, changes)
    everything = load_settings(paths.PARAMS, changes=changes)
    check_prepared(everything.views, everything.data)
    _warn_of_unwatched_towers(everything.model)
    with explain_out_of_memory(stage, everything):
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
