"""`panollava train`: its options, each of which overrides a parameter for one run, and training one
stage, or all of them, without DVC."""

import argparse
import contextlib
import json
import logging
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from panollava import paths
from panollava.cli.single_instance import single_instance
from panollava.errors import UserError
from panollava.provenance import resume
from panollava.stages import STAGES, Stage, configured_stages

if TYPE_CHECKING:  # pydantic is slow to import, and `--help` does not need it
    from panollava.config import Model, Settings

log = logging.getLogger(__name__)

ALL = "all"

Changes = Mapping[str, Any]  # of params.yaml for this run, such as {"machine.loader_workers": 2}


# By the parameter that an option overrides: its flags, type and help. STAGE stands for each stage
# that is trained and has the parameter.
OPTIONS = {
    "stage.STAGE.epochs": ("--epochs", int, "passes over the rows; vision: panoramas"),
    "stage.STAGE.batch_size": ("--batch-size", int, "rows per step; vision: panoramas"),
    "stage.STAGE.lr": ("--lr", float, "learning rate"),
    "stage.STAGE.encoder_lr": ("--encoder-lr", float, "learning rate of the encoder"),
    "stage.STAGE.max_text_length": ("--max-text-length", int, "tokens of a row; vision: unused"),
    "data.dir": ("--data-dir", str, "folder of the CSV files, which are prepared first"),
    "machine.devices": ("--devices", int, "processes that share the work, see docs/devices.md"),
    "machine.loader_workers": ("--workers --num-workers", int, "processes that load batches"),
    "machine.wandb": ("--project", str, "project on Weights & Biases for the curves"),
}


class _HelpWithParameters(argparse.HelpFormatter):
    """Shows the parameter that an option overrides, and its value or its values in the stages."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        key = action.dest
        if key not in OPTIONS:
            return action.help
        text = f"{action.help} (default: {key} of params.yaml{_values(key)})"
        return text.replace("%", "%%")


def _values(key: str) -> str:
    """The value of a parameter, or its values in the stages, after a separator."""
    try:
        settings = _settings({})
    except UserError:  # the command itself reports it
        return ""
    if "STAGE" not in key:
        return f", {_value(settings, key)}"
    values = (f"{stage} {_value(settings, name)}" for stage, name in _by_stage(key, STAGES).items())
    return f": {', '.join(values)}"


def _by_stage(key: str, stages: Iterable[str]) -> dict[str, str]:
    """The parameter of each of the stages that has it."""
    from panollava.config import Stages

    name, kinds = key.split(".")[-1], get_type_hints(Stages)
    return {
        stage: key.replace("STAGE", stage)
        for stage in stages
        if name in get_type_hints(kinds[stage])
    }


def _value(settings: "Settings", key: str) -> str:
    return json.dumps(operator.attrgetter(key)(settings), ensure_ascii=False)


def add_to(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "stage", choices=(*STAGES, ALL), help=f"training stage; {ALL}: prepare, then all stages"
    )
    for key, (flags, kind, help) in OPTIONS.items():
        parser.add_argument(*flags.split(), dest=key, type=kind, metavar="VALUE", help=help)
    parser.add_argument(
        "--name", help="name of the run on Weights & Biases (default: stage<number>_<stage>)"
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
    # Last, because newer versions of Python format the help of each option that is added.
    parser.formatter_class = _HelpWithParameters


def changes_of(options: argparse.Namespace) -> dict[str, Any]:
    """The parameters that the options override. Raises UserError for one that the stage lacks."""
    stages = STAGES if options.stage == ALL else {options.stage: STAGES[options.stage]}
    changes: dict[str, Any] = {}
    for key, (flags, *_) in OPTIONS.items():
        if (value := getattr(options, key)) is not None:
            names = list(_by_stage(key, stages).values()) if "STAGE" in key else [key]
            if not names:
                name = key.removeprefix("stage.STAGE.")
                raise UserError(
                    f"{flags}: stage '{options.stage}' has no {name}; leave the option out"
                )
            changes |= dict.fromkeys(names, value)
    return changes


def run(options: argparse.Namespace) -> None:
    """Raises UserError for errors that the user can fix."""
    from panollava.planning.lengths import check_lengths

    changes = changes_of(options)
    check_lengths(_settings(changes))
    if options.stage != ALL:
        _run_stage(STAGES[options.stage], changes, options)
    elif options.start is None:
        _run_all(changes, options)
    else:
        raise UserError(f"{options.start}: --from needs one stage, not '{ALL}'")


def _run_stage(stage: Stage, changes: Changes, options: argparse.Namespace) -> None:
    """Train one stage. Another `data.dir` is prepared first. Features are computed first if the
    stage reads them and `data.dir` or the start is another."""
    start = options.start
    if start is not None and stage.starts_from is None:
        raise UserError(
            f"{start}: stage '{stage.name}' starts from the pretrained encoder, not from a file; "
            "set model.encoder.path instead"
        )
    if "data.dir" in changes:
        _prepare(changes)
    if stage.reads_features and (start is not None or "data.dir" in changes):
        _features(changes, start)
    _train(stage, changes, start, options.resume, options.name)


def _run_all(changes: Changes, options: argparse.Namespace) -> None:
    """Prepare, all training stages, and the features before the stage that reads them. The work of
    finished stages is kept until all are finished, so that a killed run resumes where it was."""
    _prepare(changes)
    for stage in STAGES.values():
        if stage.reads_features:
            _features(changes, None)
        # Work of the first stage exists in every unfinished run; that of later stages may not.
        must_resume = options.resume and stage.starts_from is None
        name = options.name and f"{options.name}_{stage.name}"
        with _single_instance(stage.log_name):  # as the stage's own command does
            _train(stage, changes, None, must_resume, name)
    from panollava.model import ranks

    ranks.on_first(lambda: resume.remove_finished(except_stage=None))


def _single_instance(command: str) -> contextlib.AbstractContextManager:
    """Of a command that several ranks run together."""
    from panollava.model import ranks

    return contextlib.nullcontext() if ranks.rank() else single_instance(command)


def _prepare(changes: Changes) -> None:
    from panollava.data.prepare import READS, prepare_project
    from panollava.model import ranks
    from panollava.model.device import choose_device

    # Fail now if the device is missing: training may start an hour later.
    choose_device(_settings(changes).trainer.accelerator)
    settings = _settings(changes, READS)

    def prepare() -> None:
        with single_instance("prepare"):
            prepare_project(settings)

    ranks.on_first(prepare)


def _features(changes: Changes, start: Path | None) -> None:
    from panollava.training.features import READS, write_features

    with _single_instance("features"):
        write_features(_settings(changes, READS), start)


def _settings(changes: Changes, only: tuple[str, ...] | None = None) -> "Settings":
    from panollava.config import load_settings

    return load_settings(paths.PARAMS, only, changes)


def _train(
    stage: Stage, changes: Changes, start: Path | None, must_resume: bool, run_name: str | None
) -> None:
    from panollava.model import ranks
    from panollava.planning.out_of_memory import explain_out_of_memory
    from panollava.provenance.made_from import check_prepared
    from panollava.training.train import train

    settings = _settings(changes)
    check_prepared(settings.views, settings.data)
    _warn_of_untracked_towers(settings.model)
    with explain_out_of_memory(configured_stages(settings.stage)[stage.name], settings):
        train(stage, _settings(changes, stage.reads), start, must_resume, run_name)
    # The result is written, and nobody reads unfinished work any more.
    ranks.gather(None, ranks.FIRST_PATIENCE)


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
