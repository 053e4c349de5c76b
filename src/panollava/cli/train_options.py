"""The options of `panollava train`, each of which overrides a parameter for one run."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from panollava import paths
from panollava.config import Settings, Stages, load_settings
from panollava.errors import UserError

STAGES = tuple(field.name for field in dataclasses.fields(Stages))
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
