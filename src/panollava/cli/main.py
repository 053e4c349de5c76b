"""The command line: one short function per command, which imports only what the command needs."""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from panollava import logs, paths
from panollava.cli import convert_command, train_command, use_commands
from panollava.cli.single_instance import single_instance
from panollava.errors import UserError, system_errors_as_user_errors
from panollava.provenance import resume
from panollava.stages import STAGES

_MORE_MEMORY = "close other programs, or use a machine with more memory"
_MEMORY_HINTS = {
    "prepare": f"lower machine.decode_threads, or {_MORE_MEMORY}",
    "train": "lower machine.loader_workers, or the stage's batch_size",
    "evaluate": "lower evaluate.batch_size",
}

Run = Callable[[argparse.Namespace], None]

# These follow each other in a pipeline: when one starts, the results of the others are recorded.
_STEPS = ("prepare", "train", "features", "evaluate")
_FULL_PIPELINE = "full_pipeline"  # the log's name for `train all`


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    name = _log_name(options)
    if options.logs is None:
        _run_anywhere(options)
        return
    try:
        with (
            logs.start(name, options.logs),
            system_errors_as_user_errors(_MEMORY_HINTS.get(options.command, _MORE_MEMORY)),
            single_instance(name),
        ):
            # `train all` resumes from finished stages too.
            if options.command in _STEPS and name != _FULL_PIPELINE:
                resume.remove_finished(except_stage=getattr(options, "stage", None))
            options.run(options)
    except UserError:  # logged by `logs.start`
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _run_anywhere(options: argparse.Namespace) -> None:
    """Run a command that only reads a trained model: it needs no project, and writes no log."""
    try:
        with logs.to_console(), system_errors_as_user_errors(_MORE_MEMORY):
            options.run(options)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _log_name(options: argparse.Namespace) -> str:
    if options.command != "train":
        return options.command
    return STAGES[options.stage].log_name if options.stage in STAGES else _FULL_PIPELINE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="panollava", description="train and evaluate a vision-language model on 360° panoramas"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Run, help: str, folder: Path | None = paths.LOGS
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run, logs=folder)
        return command

    _add_download(add("download", _download, "download the pictures that rows link to"))
    help = "make upright 2:1 panoramas of stereo pairs, cube faces, parts or tilted ones"
    convert_command.add_to(add("convert", convert_command.run, help, None))
    _add_check(add("check", _check, "report every problem of rows and pictures"))
    prepare = _with_settings("panollava.data.prepare", "prepare_project")
    add("prepare", prepare, "check the rows and convert each panorama into views")
    train_command.add_to(add("train", train_command.run, "train one or all stages without DVC"))
    _add_plan(add("plan", _plan, "estimate parameters, memory and disk space of a training"))
    features = _with_settings("panollava.training.features", "write_features", uses_model=True)
    add("features", features, "compute the frozen encoder's features (runs/features)")
    evaluate = _with_settings("panollava.evaluation.evaluate", "evaluate", uses_model=True)
    add("evaluate", evaluate, "answer every query of a split and score the answers")
    use_commands.add_ask(add("ask", use_commands.ask, "answer questions about panoramas", None))
    _add_score(add("score", _score, "score another model's answers as `evaluate` scores ours"))
    help = "answer questions over HTTP, with OpenAI's chat completions API"
    use_commands.add_serve(add("serve", use_commands.serve, help, None))
    help = "write a folder that transformers loads, with a model card"
    use_commands.add_export(add("export", use_commands.export, help, None))
    add("verify", _verify, "delete corrupted files from DVC's cache")
    add("digest", _digest, "write a digest of the code that each pipeline stage runs")
    for name, module, function, help in (
        ("scenes", "dataset", "make_scenes", "render the demo's panoramas"),
        ("encoder", "encoder", "make_encoder", "pretrain the demo's encoder"),
        ("language-model", "language_model", "make_language_model", "pretrain its language model"),
    ):
        demo = _with_demo_settings(f"panollava.demo.{module}", function)
        add(f"demo-{name}", demo, f"{help} (in data/demo)", paths.LOGS_OF_DEMO)
    return parser


def _with_settings(module: str, function: str, uses_model: bool = False) -> Run:
    """A command that calls a function with the settings that its module READS."""

    def run(options: argparse.Namespace) -> None:
        from panollava.config import load_settings

        if uses_model:
            from panollava.planning.lengths import check_lengths

            check_lengths(load_settings(paths.PARAMS))
        stage = importlib.import_module(module)
        getattr(stage, function)(load_settings(paths.PARAMS, stage.READS))

    return run


def _with_demo_settings(module: str, function: str) -> Run:
    def run(options: argparse.Namespace) -> None:
        from panollava.demo.settings import load_demo_settings

        getattr(importlib.import_module(module), function)(load_demo_settings(paths.PARAMS))

    return run


def _add_download(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("data_dir", type=Path, metavar="DATA_DIR", help="folder of train.csv, valid.csv, test.csv")
    add("--connections", type=int, default=16, help="parallel downloads (default: 16)")
    add("--rate", type=float, default=10.0, help="requests per second (default: 10)")
    add("--pause", type=float, default=1.0, help="seconds before a retry, doubling (default: 1)")
    help = "treat links as dead when no complete response arrives (default: an error)"
    add("--give-up", action="store_true", help=help)


def _add_check(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("data_dir", type=Path, metavar="DATA_DIR", help="folder of train.csv, valid.csv, test.csv")
    add("--json", type=Path, metavar="FILE", help="also write the report to a file")
    add("--workers", type=int, default=2, help="threads that decode pictures (default: 2)")
    help = (
        "largest share of a split's rows that may be bad; otherwise the exit status is 1 (default: "
        "0.15, for QuIC-360; the limit of `prepare` is data.max_rejected)"
    )
    add("--max-rejected", type=float, default=0.15, metavar="SHARE", help=help)


def _add_plan(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("stage", nargs="?", choices=STAGES, help="training stage (default: all of them)")
    help = "settings to plan for, such as presets/quic360.yaml (default: params.yaml)"
    add("--params", type=Path, default=paths.PARAMS, metavar="FILE", help=help)
    add("--json", type=Path, metavar="FILE", help="also write the plan, in bytes, to a file")


def _add_score(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    help = "CSV file with columns url,query,prediction: one answer for each url and query"
    add("predictions", type=Path, metavar="PREDICTIONS", help=help)
    help = "also write all scores, with their 95%% intervals, to a file"
    add("--json", type=Path, metavar="FILE", help=help)


def _download(options: argparse.Namespace) -> None:
    from panollava.data.download import download

    download(
        options.data_dir,
        Path(),
        connections=options.connections,
        rate=options.rate,
        pause=options.pause,
        give_up=options.give_up,
    )


def _check(options: argparse.Namespace) -> None:
    from panollava.data.check import check, show
    from panollava.files import write_json

    report = check(options.data_dir, Path(), options.workers, options.max_rejected)
    if options.json:
        write_json(options.json, report.as_json())
    show(report)


def _plan(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from panollava.config import load_settings
    from panollava.files import write_json
    from panollava.planning.lengths import check_lengths
    from panollava.planning.plan import make_plan, show

    settings = load_settings(options.params)
    check_lengths(settings)
    stages = [STAGES[options.stage]] if options.stage else list(STAGES.values())
    plan = make_plan(settings, stages)
    show(plan, settings.trainer.gradient_checkpointing)
    if options.json:
        write_json(options.json, asdict(plan))


def _score(options: argparse.Namespace) -> None:
    from panollava.config import load_settings
    from panollava.evaluation.score import READS, score_file

    score_file(options.predictions, load_settings(paths.PARAMS, READS), options.json)


def _verify(options: argparse.Namespace) -> None:
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    from panollava.provenance.dvc_cache import delete_corrupted

    try:
        repo = Repo()
    except NotDvcRepoError:
        raise UserError(
            f"{Path.cwd()}: not a DVC repository; run the command in the project's folder"
        ) from None
    delete_corrupted(Path(repo.cache.local.path))


def _digest(options: argparse.Namespace) -> None:
    from panollava.provenance.code_digest import write_digests

    write_digests(paths.DIGESTS)
