"""The commands for rows and pictures: their options, and calling them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from panollava import paths
from panollava.cli import sharding
from panollava.cli.single_instance import one_at_a_time
from panollava.errors import UserError

if TYPE_CHECKING:  # pandas is slow to import, and `--help` does not need it
    from panollava.data.overview import Lengths


def add_download(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    help = "folder of train.csv, valid.csv, test.csv; or quic360, whose tables are downloaded too"
    add("data_dir", metavar="DATA_DIR|NAME", help=help)
    add("--connections", type=int, default=16, help="parallel downloads (default: 16)")
    help = "requests per second, of each process with --shard (default: 10)"
    add("--rate", type=float, default=10.0, help=help)
    add("--pause", type=float, default=1.0, help="seconds before a retry, doubling (default: 1)")
    help = "treat links as dead when no complete response arrives (default: an error)"
    add("--give-up", action="store_true", help=help)
    sharding.add_to(command, ray=False)


def download(options: argparse.Namespace) -> None:
    from panollava.data.datasets import DATASETS, fetch_tables
    from panollava.data.download import download

    folder = Path(options.data_dir)
    if dataset := DATASETS.get(options.data_dir):
        with one_at_a_time("download tables"):  # processes with --shard
            folder = fetch_tables(dataset, Path(), options.rate, options.pause)
    download(
        folder,
        Path(),
        connections=options.connections,
        rate=options.rate,
        pause=options.pause,
        give_up=options.give_up,
        part=options.shard,
        merge=options.merge,
    )


def add_check(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("data_dir", type=Path, metavar="DATA_DIR", help="folder of train.csv, valid.csv, test.csv")
    add("--json", type=Path, metavar="FILE", help="also write the report to a file")
    help = "also write a page with suspects, samples and text lengths, for a look"
    add("--look", type=Path, metavar="FILE.html", help=help)
    add("--rows-only", action="store_true", help="open no picture")
    add("--workers", type=int, default=2, help="threads that decode pictures (default: 2)")
    help = (
        "largest share of a split's rows that may be bad; otherwise the exit status is 1 (default: "
        "0.15, for QuIC-360; the limit of `prepare` is data.max_rejected)"
    )
    add("--max-rejected", type=float, default=0.15, metavar="SHARE", help=help)


def check(options: argparse.Namespace) -> None:
    from panollava.data.check import check, show
    from panollava.files import write_json

    folder, limit = options.data_dir, options.max_rejected
    report = check(folder, Path(), options.workers, limit, options.rows_only)
    if options.json:
        write_json(options.json, report.as_json())
    if options.look:
        from panollava.data.overview import write_overview

        write_overview(options.look, folder, Path(), report, _lengths(), options.workers)
    show(report)


def _lengths() -> "Lengths":
    """Counts tokens as the project's stages do, if it has settings and their tokenizer."""
    from transformers import AutoTokenizer

    from panollava.config import load_settings
    from panollava.data.dialogue import Dialogue
    from panollava.data.overview import Lengths
    from panollava.model.pretrained import load_from

    try:
        settings = load_settings(paths.PARAMS)
        tokenizer = load_from(AutoTokenizer.from_pretrained, settings.model.language_model)
        dialogue = Dialogue(tokenizer, prompt=settings.model.prompt, cache=False)
    except UserError as error:
        return Lengths(None, {}, str(error))
    stages = {name: stage.max_text_length for name, stage in vars(settings.stage).items()}
    return Lengths(lambda query, text: len(dialogue.row(query, text, truncate=False)), stages)


def add_convert_rows(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("source", type=Path, metavar="FILE", help="LLaVA's JSON, or JSONL")
    add("out", type=Path, metavar="OUT.csv", help="CSV file to write; it must not exist")


def convert_rows(options: argparse.Namespace) -> None:
    from panollava.data.convert_rows import convert_rows

    convert_rows(options.source, options.out)
