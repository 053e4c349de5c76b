"""Logging to the console and to a file at once."""

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from panollava.errors import UserError

_LIBRARIES = ("pytorch_lightning", "lightning.pytorch", "transformers", "dvclive", "py.warnings")


class _Console(logging.Handler):
    """Prints above progress bars instead of into them."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextlib.contextmanager
def start(name: str, folder: Path = Path("logs")) -> Iterator[Path]:
    """Log what happens inside to the console and to `folder`/`name`_YYYYMMDD_HHMMSS.log.

    What leaves the block as an exception ends the file: a UserError as its message, anything
    else with its traceback."""
    path = _create(folder, name)
    console, file = _Console(), logging.FileHandler(path, encoding="utf-8")
    console.setFormatter(logging.Formatter("%(message)s"))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for library in _LIBRARIES:
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True
    for handler in (console, file):
        root.addHandler(handler)
    logger = logging.getLogger("panollava")
    try:
        yield path
    except UserError as error:
        logger.error("error: %s", error)
        raise
    except KeyboardInterrupt:
        logger.error("interrupted; the same command starts again")
        raise
    except BaseException:
        logger.error("a fault of the program, please report it with %s:\n%s", path, traceback.format_exc())
        raise
    finally:
        for handler in (console, file):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(before)


def _create(folder: Path, name: str) -> Path:
    """A new file; another run in the same second gets a number."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    number = 0
    while True:
        path = folder / (f"{name}_{stamp}.log" if not number else f"{name}_{stamp}_{number}.log")
        try:
            path.open("x").close()
            return path
        except FileExistsError:
            number += 1


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Aligned columns as plain text."""
    lines = [tuple(map(str, line)) for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
