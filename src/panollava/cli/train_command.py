"""`panollava train`: its options, each of which overrides a parameter for one run, and training one
stage, or all of them, without DVC."""

import argparse
import logging
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from panollava import paths
from panollava.cli.single_instance import single_instance
from panollava.errors import UserError
from panollava.provenance import resume
from panollava.stages import STAGES, Stage

if TYPE_CHECKING:  # pydantic is slow to import, and `--help` does not need it
    from panollava.config import Model, Settings

log = logging.getLogger(__name__)

ALL = "all"

Changes = Mapping[str, Any]  # of params.yaml for this run, such as {"machine.loader_workers": 2}


class Option(NamedTuple):
    flags: tuple[str, ...]
    type: type
    key: str  # of params.yaml; STAGE is replaced by each stage that is trained
    help: str

    @property
    def destination(self) -> str:
        return self.flags[0].removeprefix("--").replace("-", "_")


OPTIONS = (
    Option(("--epochs",), int, "stage.STAGE.epochs", "passes over the rows; vision: panoramas"),
    Option(("--batch-size",), int, "stage.STAGE.batch_size", "rows per step; vision: panoramas"),
    Option(("--lr",), float, "stage.STAGE.lr", "learning rate"),
    Option(("--max-text-length",), int, "stage.STAGE.max_text_length", "tokens of a query and its "
           "answer; vision: unused"),
    Option(("--data-dir",), str, "data.dir", "folder of train.csv, valid.csv and test.csv, which "
           "are prepared first"),
    Option(("--workers", "--num-workers"), int, "machine.loader_workers", "processes that "
           "load batches"),
    Option(("--project",), str, "machine.wandb", "project on Weights & Biases for the curves"),
)  # fmt: skip


def add_to(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "stage", choices=(*STAGES, ALL), help=f"training stage; {ALL}: prepare, then all stages"
    )
    for option in OPTIONS:
        parser.add_argument(*option.flags, type=option.type, help=option.help)
    parser.add_argument(
        "--name",
        help="name of the run on Weights & Biases (default: stage<number>_<stage>)",
    )
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="PATH",
        help="start from this .safetensors or .ckpt file of the previous stage "
        "(default: runs/vlm_<previous stage>/model_final.safetensors)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="fail if there is no unfinished work of the same settings, data and code "
        "(default: resume it if there is any, otherwise start from the beginning)",
    )


class HelpWithParameters(argparse.ArgumentParser):
    """Its help shows the parameter that each option overrides, and the parameter's value."""

    def format_help(self) -> str:
        options = {option.destination: option for option in OPTIONS}
        if any(action.dest == "start" for action in self._actions):  # the parser of `train`
            try:
                settings = _settings({})
            except UserError:  # the command itself reports it
                settings = None
            for action in self._actions:
                if option := options.get(action.dest):
                    text = f"{option.help} (default: {_describe(settings, option.key)})"
                    action.help = text.replace("%", "%%")
        return super().format_help()


def _describe(settings: "Settings | None", key: str) -> str:
    """The key, and its value or its values in the stages."""
    if settings is None:
        return f"{key} of params.yaml"
    if "STAGE" not in key:
        return f"{key} of params.yaml, {_value(settings, key)}"
    values = (f"{stage} {_value(settings, key.replace('STAGE', stage))}" for stage in STAGES)
    return f"{key} of params.yaml: {', '.join(values)}"


def _value(settings: "Settings", key: str) -> str:
    value = operator.attrgetter(key)(settings)
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def run(options: argparse.Namespace) -> None:
    """Raises UserError for errors that the user can fix."""
    stages = [STAGES[options.stage]] if options.stage != ALL else list(STAGES.values())
    changes = {
        option.key.replace("STAGE", stage.name): value
        for option in OPTIONS
        if (value := getattr(options, option.destination)) is not None
        for stage in stages
    }
    if options.stage == ALL:
        if options.start is not None:
            raise UserError(f"{options.start}: --from needs one stage, not '{ALL}'")
        _run_all(changes, options.resume, options.name)
    else:
        _run_stage(stages[0], changes, options.start, options.resume, options.name)


def _run_stage(
    stage: Stage, changes: Changes, start: Path | None, must_resume: bool, run_name: str | None
) -> None:
    """Train one stage. Another `data.dir` is prepared first. Features are computed first if the
    stage reads them and `data.dir` or `start` is another."""
    if start is not None and stage.starts_from is None:
        raise UserError(
            f"{start}: stage '{stage.name}' starts from the pretrained encoder, not from a file; "
            "set model.encoder.path instead"
        )
    if "data.dir" in changes:
        _prepare(changes)
    if stage.reads_features and (start is not None or "data.dir" in changes):
        _features(changes, start)
    _train(stage, changes, start, must_resume, run_name)


def _run_all(changes: Changes, must_resume: bool, run_name: str | None) -> None:
    """Prepare, all training stages, and the features before the stage that reads them. The work of
    finished stages is kept until all are finished, so that a killed run resumes where it was."""
    _prepare(changes)
    for stage in STAGES.values():
        if stage.reads_features:
            _features(changes, None)
        # Work of the first stage exists in every unfinished run; that of later stages may not.
        first = stage.starts_from is None
        name = f"{run_name}_{stage.name}" if run_name else None
        with single_instance(stage.log_name):  # as the stage's own command does
            _train(stage, changes, None, must_resume and first, name)
    resume.remove_finished(except_stage=None)


def _prepare(changes: Changes) -> None:
    from panollava.data.prepare import READS, prepare_project
    from panollava.model.device import choose_device

    # Fail now if the device is missing: training may start an hour later.
    choose_device(_settings(changes).trainer.accelerator)
    with single_instance("prepare"):
        prepare_project(_settings(changes, READS))


def _features(changes: Changes, start: Path | None) -> None:
    from panollava.training.features import READS, write_features

    with single_instance("features"):
        write_features(_settings(changes, READS), start)


def _settings(changes: Changes, only: tuple[str, ...] | None = None) -> "Settings":
    from panollava.config import load_settings

    return load_settings(paths.PARAMS, only, changes)


def _train(
    stage: Stage, changes: Changes, start: Path | None, must_resume: bool, run_name: str | None
) -> None:
    from panollava.planning.out_of_memory import explain_out_of_memory
    from panollava.provenance.made_from import check_prepared
    from panollava.training.train import train

    settings = _settings(changes)
    check_prepared(settings.views, settings.data)
    _warn_of_untracked_towers(settings.model)
    with explain_out_of_memory(stage, settings):
        train(stage, _settings(changes, stage.reads), start, must_resume, run_name)


def _warn_of_untracked_towers(model: "Model") -> None:
    """Warn of towers in folders outside `model.towers`, the only one that dvc.yaml lists."""
    tracked = Path(model.towers).resolve()
    for name, tower in (("encoder", model.encoder), ("language_model", model.language_model)):
        folder = Path(tower.path).resolve()
        if folder.is_dir() and tracked not in (folder, *folder.parents):
            log.warning(
                "model.%s.path: %s is not in %s (model.towers); DVC reruns nothing when it changes",
                *(name, tower.path, model.towers),
            )
