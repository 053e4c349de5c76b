"""The command line: one short function per command, which imports only what the command needs."""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from panollava import logs, paths
from panollava.cli import convert_command, data_commands, launch, train_command, use_commands
from panollava.cli.single_instance import check_first_process, single_instance
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
        place = launch.find_place() if options.command in launch.COMMANDS else None
        if place is None:
            check_first_process()
        hint = system_errors_as_user_errors(_MEMORY_HINTS.get(options.command, _MORE_MEMORY))
        if place is not None and place.rank:
            launch.run_as_rank(place, lambda: _run_with(hint, options))
    except UserError as error:
        sys.exit(f"error: {error}")
    try:
        with logs.start(name, options.logs), hint, single_instance(name):
            # `train all` resumes from finished stages too.
            if options.command in _STEPS and name != _FULL_PIPELINE:
                resume.remove_finished(except_stage=getattr(options, "stage", options.command))
            with _ranks(place, options):
                options.run(options)
    except UserError:  # logged by `logs.start`
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _run_with(hint: contextlib.AbstractContextManager, options: argparse.Namespace) -> None:
    with hint:
        options.run(options)


def _ranks(
    place: launch.Place | None, options: argparse.Namespace
) -> contextlib.AbstractContextManager:
    """The processes that the command's work is divided among."""
    if options.command not in launch.COMMANDS:
        return contextlib.nullcontext()
    from panollava.config import load_settings

    trains = options.command == "train"
    changes = train_command.changes_of(options) if trains else {}
    return launch.first(place, load_settings(paths.PARAMS, changes=changes), trains)


def _run_anywhere(options: argparse.Namespace) -> None:
    """Run a command that only reads a trained model: it needs no project, and writes no log."""
    try:
        with logs.to_console(), system_errors_as_user_errors(_MORE_MEMORY):
            options.run(options)
    except UserError as error:
        sys.exit(f"error: {logs.printable(str(error))}")
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

    help = "download a published data set, or the pictures that rows link to"
    data_commands.add_download(add("download", data_commands.download, help))
    help = "make upright 2:1 panoramas of stereo pairs, cube faces, parts or tilted ones"
    convert_command.add_to(add("convert", convert_command.run, help, None))
    help = "report every problem of rows and pictures"
    data_commands.add_check(add("check", data_commands.check, help))
    help = "convert LLaVA's JSON or JSONL into a CSV file of rows"
    data_commands.add_convert_rows(add("convert-rows", data_commands.convert_rows, help))
    prepare = _with_settings("panollava.data.prepare", "prepare_project")
    add("prepare", prepare, "check the rows and convert each panorama into views")
    train_command.add_to(add("train", train_command.run, "train one or all stages without DVC"))
    _add_plan(add("plan", _plan, "estimate parameters, memory and disk space of a training"))
    features = _with_settings("panollava.training.features", "write_features", uses_model=True)
    add("features", features, "compute the frozen encoder's features (runs/features)")
    evaluate = _with_settings("panollava.evaluation.evaluate", "evaluate", uses_model=True)
    add("evaluate", evaluate, "answer every query of a split and score the answers")
    help = "write parameters, curves, scores and answers on one page (runs/report)"
    _add_report(add("report", _report, help))
    use_commands.add_ask(add("ask", use_commands.ask, "answer questions about panoramas", None))
    _add_score(add("score", _score, "score another model's answers as `evaluate` scores ours"))
    help = "answer questions over HTTP, with OpenAI's chat completions API"
    use_commands.add_serve(add("serve", use_commands.serve, help, None))
    help = "open a page that asks the model about panoramas, and shows where it looks"
    use_commands.add_look(add("look", use_commands.look, help, None))
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


def _add_plan(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("stage", nargs="?", choices=STAGES, help="training stage (default: all of them)")
    help = "settings to plan for, such as presets/quic360.yaml (default: params.yaml)"
    add("--params", type=Path, default=paths.PARAMS, metavar="FILE", help=help)
    help = "GB/s between devices, for the time that they exchange gradients (default: %(default)s)"
    add("--bandwidth", type=float, default=10.0, metavar="GB/S", help=help)
    add("--json", type=Path, metavar="FILE", help="also write the plan, in bytes, to a file")


def _add_score(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    help = "CSV file with columns url,query,prediction: one answer for each url and query"
    add("predictions", type=Path, metavar="PREDICTIONS", help=help)
    help = "also write all scores, with their 95%% intervals, to a file"
    add("--json", type=Path, metavar="FILE", help=help)


def _add_report(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    help = "also show the differences to a commit or experiment"
    add("--compare", metavar="REV", help=help)
    help = f"file to write (default: {paths.REPORT}; with --compare: runs/report-REV.html)"
    add("--out", type=Path, metavar="FILE", help=help)
    help = "leave out the maps of where the model looks, which need its towers"
    add("--no-maps", action="store_true", help=help)


def _plan(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from panollava.config import load_settings

    if not options.bandwidth > 0:
        raise UserError(f"--bandwidth: expected GB/s above 0, found {options.bandwidth:g}")
    settings = load_settings(options.params)  # before slow imports: wrong values fail fast
    from panollava.files import write_json
    from panollava.planning.lengths import check_lengths
    from panollava.planning.plan import make_plan, show

    check_lengths(settings)
    stages = [STAGES[options.stage]] if options.stage else list(STAGES.values())
    plan = make_plan(settings, stages)
    show(plan, settings.trainer.gradient_checkpointing, options.bandwidth)
    if options.json:
        write_json(options.json, asdict(plan))


def _score(options: argparse.Namespace) -> None:
    from panollava.config import load_settings
    from panollava.evaluation.score import READS, score_file

    score_file(options.predictions, load_settings(paths.PARAMS, READS), options.json)


def _report(options: argparse.Namespace) -> None:
    from panollava.config import load_settings
    from panollava.serving.report import READS, write_report

    differences, out = None, options.out or paths.REPORT
    if options.compare:
        from panollava.serving.compare import compare

        differences = compare(options.compare)
        out = options.out or paths.report_of(options.compare)
    settings = load_settings(paths.PARAMS, READS)
    write_report(settings, out, not options.no_maps, differences)


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
