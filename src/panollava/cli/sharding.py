"""`--shard I/N`, `--merge` and `--ray ADDRESS`: the work of a command on several machines."""

import argparse
import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panollava import paths

if TYPE_CHECKING:
    from panollava.config import Settings
    from panollava.data.picture_shards import PictureShard
    from panollava.data.shard_work import Part

_PART = re.compile(r"([0-9]+)/([0-9]+)")


def add_to(command: argparse.ArgumentParser, ray: bool = True) -> None:
    """Without any of these options, a command does all work that is not yet done, and merges."""
    add = command.add_mutually_exclusive_group().add_argument
    help = "do part I of N of the work, for N processes at the same time; then --merge"
    add("--shard", type=_parse_part, metavar="I/N", help=help)
    help = "check that --shard has done all parts, and write the outputs"
    add("--merge", action="store_true", help=help)
    if ray:
        help = "run on a Ray cluster that this machine is part of: HOST:PORT, or auto to find it"
        add("--ray", type=_parse_address, metavar="ADDRESS", help=help)


def is_divided(options: argparse.Namespace) -> bool:
    """Whether the work is divided by these options, and not among ranks."""
    return any(getattr(options, name, None) for name in ("shard", "merge", "ray"))


@contextlib.contextmanager
def keywords(options: argparse.Namespace, settings: "Settings") -> Iterator[dict[str, Any]]:
    """What the options mean for `prepare_project` and `write_features`."""
    if not is_divided(options):
        yield {}
        return
    if not options.ray:
        yield {"part": options.shard, "merge": options.merge}
        return
    from panollava.cli import cluster

    if options.command == "features":
        from panollava.model.device import choose_device

        gpus = int(choose_device(settings.trainer.accelerator).type == "cuda")
        needs = cluster.Needs(1 if gpus else settings.trainer.threads, gpus, _prepared)
    else:
        needs = cluster.Needs(settings.machine.decode_threads, 0, _pictures)
    store = settings.data.store_dir
    written = [paths.RESUME, *([Path(store)] if store else [])]
    with cluster.connect(options.ray, needs, written) as distribute:
        yield {"distribute": distribute}


def _prepared(shards: Sequence[Any]) -> list[Path]:
    return [*paths.PREPARED.glob(f"*/{paths.PANORAMAS}/*.json")]


def _pictures(shards: "Sequence[PictureShard]") -> list[Path]:
    """One of each folder."""
    by_folder = {picture.parent: picture for shard in shards for picture in shard.pictures}
    return [*by_folder.values()]


def _parse_part(text: str) -> "Part":
    from panollava.data.shard_work import Part

    match = _PART.fullmatch(text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, found '{text}'")
    return Part(int(match[1]), int(match[2]))


def _parse_address(text: str) -> str:
    # ray:// is for programs outside of the cluster, which share no folders with it.
    if text != "auto" and not re.fullmatch(r"[^/\s]+:[0-9]+", text):
        raise argparse.ArgumentTypeError(
            f"expected HOST:PORT of a running cluster, or auto, found '{text}'"
        )
    return text
