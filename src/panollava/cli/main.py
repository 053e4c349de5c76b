"""The command line: one short function a command, which imports what that command needs and
nothing else."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from panollava import logs, paths
from panollava.cli import train_command
from panollava.cli.single_instance import single_instance
from panollava.config import Settings, load_settings
from panollava.errors import UserError, system_errors_as_user_errors
from panollava.provenance import resume

_MACHINE = "close other programs, or take a machine with more memory"
_MEMORY_HINTS = {  # what to do where a command has too little
    "prepare": f"lower machine.decode_threads, or {_MACHINE}",
    "train": "lower machine.loader_workers, or the stage's batch_size",
    "evaluate": "lower evaluate.batch_size",
}

_STEPS = ("prepare", "train", "features", "evaluate")  # of the pipeline; the others may run beside


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    name = options.log_name(options)
    try:
        memory_hint = _MEMORY_HINTS.get(options.command, _MACHINE)
        with (
            logs.start(name, options.logs),
            system_errors_as_user_errors(memory_hint),
            single_instance(name),
        ):
            # All stages in one run may have finished ones to go on from.
            if options.command in _STEPS and not _is_all(options):
                resume.remove_finished(except_stage=getattr(options, "stage", None))
            options.run(options)
    except UserError:  # logged, with what to do, as the last line
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="panollava", description="PanoLLaVA, step by step")
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="COMMAND",
        parser_class=train_command.HelpWithParameters,
    )

    def add(
        name: str, run: Callable[[argparse.Namespace], None], help: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run, log_name=lambda options: options.command, logs=paths.LOGS)
        return command

    _add_download(add("download", _download, "fetch the pictures that rows link to"))
    _add_check(add("check", _check, "list all that is wrong with rows and pictures"))
    add("prepare", _prepare, "check the rows and turn each panorama into views")
    train = add("train", _train, "train a stage, or all of them without DVC")
    train_command.add_to(train)
    train.set_defaults(log_name=_stage_log_name)
    _add_plan(add("plan", _plan, "estimate parameters, memory and disk of a training"))
    add("features", _features, "run the frozen encoder once over every panorama (runs/features)")
    add("evaluate", _evaluate, "answer every query of a split, from runs/features, and score it")
    add("verify", _verify, "remove files from DVC's cache that are not what their names say")
    add("digest", _digest, "write the digest of the code that each pipeline stage runs")
    for name, run, help in (
        ("demo-scenes", _demo_scenes, "render the demo's panoramas (in data/demo)"),
        ("demo-encoder", _demo_encoder, "pretrain the demo's encoder (in data/demo)"),
        ("demo-language-model", _demo_language_model, "pretrain its language model (in data/demo)"),
    ):
        add(name, run, help).set_defaults(logs=paths.LOGS_OF_DEMO)
    return parser


def _add_download(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("data_dir", type=Path, metavar="DATA_DIR", help="folder of train.csv, valid.csv, test.csv")
    add("--connections", type=int, default=16, help="pictures at once (default: 16)")
    add("--rate", type=float, default=10.0, help="requests a second (default: 10)")
    add(
        "--pause",
        type=float,
        default=1.0,
        help="seconds before a second attempt, doubled before each further one (default: 1)",
    )
    add(
        "--give-up",
        action="store_true",
        help="take links for dead whose servers give no whole answer (default: an error)",
    )


def _add_check(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("data_dir", type=Path, metavar="DATA_DIR", help="folder of train.csv, valid.csv, test.csv")
    add("--json", type=Path, metavar="FILE", help="write all that is found to a file as well")
    add("--workers", type=int, default=2, help="threads that decode pictures (default: 2)")
    add(
        "--max-rejected",
        type=float,
        default=0.15,
        metavar="SHARE",
        help="share of a split's rows that may be bad; more end with exit status 1 "
        "(default: 0.15, as QuIC-360 needs; prepare's own limit is data.max_rejected)",
    )


def _add_plan(command: argparse.ArgumentParser) -> None:
    add, stages = command.add_argument, ", ".join(train_command.STAGES)
    add("stage", nargs="?", help=f"{stages} (default: all of them)")
    add(
        "--params",
        type=Path,
        default=paths.PARAMS,
        metavar="FILE",
        help="parameters to plan for, such as presets/quic360.yaml (default: params.yaml)",
    )
    add("--json", type=Path, metavar="FILE", help="write the plan, in bytes, to a file as well")


def _stage_log_name(options: argparse.Namespace) -> str:
    from panollava.stages import STAGES

    if _is_all(options):
        return "full_pipeline"
    number = STAGES[options.stage].number if options.stage in STAGES else 0
    return f"stage{number}_{options.stage}"


def _is_all(options: argparse.Namespace) -> bool:
    return getattr(options, "stage", None) == "all"


def _settings(only: tuple[str, ...]) -> Settings:
    return load_settings(paths.PARAMS, only)


def _download(options: argparse.Namespace) -> None:
    from panollava.data.download import download
    from panollava.data.prepare import SPLITS

    download(
        options.data_dir,
        SPLITS,
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


def _prepare(options: argparse.Namespace) -> None:
    from panollava.data.prepare import READS, prepare_project

    settings = _settings(READS)
    prepare_project(settings)


def _train(options: argparse.Namespace) -> None:
    from panollava.cli.train_command import run_all, run_stage
    from panollava.model.device import keep_freed_memory

    keep_freed_memory()
    changes = train_command.changes(options)
    if not _is_all(options):
        run_stage(options.stage, changes, options.start, options.resume, options.name)
        return
    if options.start is not None:
        raise UserError(f"{options.start}: --from belongs to one stage; all start from the first")
    run_all(changes, options.resume, options.name)
    resume.remove_finished(except_stage=None)


def _plan(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from panollava.files import write_json
    from panollava.planning.plan import make_plan, show
    from panollava.stages import STAGES, find_stage

    settings = load_settings(options.params)
    stages = list(STAGES.values()) if options.stage is None else [find_stage(options.stage)]
    plan = make_plan(settings, stages)
    show(plan, settings.trainer.gradient_checkpointing)
    if options.json:
        write_json(options.json, asdict(plan))


def _features(options: argparse.Namespace) -> None:
    from panollava.model.device import keep_freed_memory
    from panollava.training.features import READS, write_features

    keep_freed_memory()
    write_features(_settings(READS))


def _evaluate(options: argparse.Namespace) -> None:
    from panollava.evaluation.evaluate import READS, evaluate
    from panollava.model.device import keep_freed_memory

    keep_freed_memory()
    evaluate(_settings(READS))


def _verify(options: argparse.Namespace) -> None:
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    from panollava.provenance.dvc_cache import delete_corrupted

    try:
        repo = Repo()
    except NotDvcRepoError:
        raise UserError(
            f"{Path.cwd()}: no DVC repository; run it in the project's folder"
        ) from None
    delete_corrupted(Path(repo.cache.local.path))


def _digest(options: argparse.Namespace) -> None:
    from panollava.provenance.code_digest import write_digests

    write_digests(paths.DIGESTS)


def _demo_scenes(options: argparse.Namespace) -> None:
    from panollava.demo.dataset import make_scenes
    from panollava.demo.settings import load_demo_settings

    make_scenes(load_demo_settings(paths.PARAMS), Path())


def _demo_encoder(options: argparse.Namespace) -> None:
    from panollava.demo.encoder import make_encoder
    from panollava.demo.settings import load_demo_settings

    make_encoder(load_demo_settings(paths.PARAMS), Path("towers/encoder"))


def _demo_language_model(options: argparse.Namespace) -> None:
    from panollava.demo.language_model import make_language_model
    from panollava.demo.settings import load_demo_settings

    make_language_model(load_demo_settings(paths.PARAMS), Path("towers/language_model"))
