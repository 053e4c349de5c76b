"""Logging to the console and to a file at once, and plain text tables.

Library code only calls `logging.getLogger(__name__)`; commands run inside `start`."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from panollava.errors import UserError, as_user_error

_LIBRARIES = ("lightning_fabric", "pytorch_lightning", "transformers", "dvclive")

log = logging.getLogger("panollava")


@contextlib.contextmanager
def start(name: str, folder: Path = Path("logs")) -> Iterator[Path]:
    """Log what happens inside to the console and to `folder`/`name`_YYYYMMDD_HHMMSS.log, which
    is the value of the block.

    The console shows the project's own messages and everybody's warnings; the file has times,
    the libraries' messages, Python warnings and tracebacks as well. An exception that leaves the
    block is logged and raised again: a UserError with its message as the last line.
    """
    path = _create(folder, name)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    console = logging.StreamHandler(_AboveBars())
    console.setFormatter(_Short())
    console.addFilter(_for_console)
    with _handlers_of_root(file, console), _captured_warnings(), _adopted(_LIBRARIES):
        log.info("log: %s", path)
        _to_file("command: %s", " ".join(sys.argv))
        try:
            yield path
        except UserError as error:
            _to_file("where it was found:", exc_info=True)
            log.error("%s", error)
            raise
        except KeyboardInterrupt:
            _to_file("where it was interrupted:", exc_info=True)
            log.error("interrupted; run the same command again")
            raise
        except Exception as error:
            _to_file("where it happened:", exc_info=True)
            log.error("%s: a fault of the program; report it with %s", type(error).__name__, path)
            raise


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Aligned columns as plain text; columns of numbers stand to the right."""
    lines = [tuple(map(str, line)) for line in (header, *rows)]
    columns = []
    for cells in zip(*lines, strict=True):
        width = max(map(len, cells))
        numbers = len(cells) > 1 and all(map(_is_number, cells[1:]))
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").strip("-+%").isdigit()


def _create(folder: Path, name: str) -> Path:
    """A new file: a second run in the same second gets a number. Exits where there can be none,
    because there is no log to say so."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: {as_user_error(error)}")
    stem = f"{name}_{datetime.now():%Y%m%d_%H%M%S}"
    number = 1
    while True:
        path = folder / f"{stem}{f'_{number}' if number > 1 else ''}.log"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        except OSError as error:
            sys.exit(f"error: {as_user_error(error)}")
        else:
            return path


class _AboveBars:
    """The console as a stream that prints above progress bars instead of into them."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


class _Short(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def _for_console(record: logging.LogRecord) -> bool:
    if getattr(record, "file_only", False):
        return False
    own = record.name.split(".")[0] == log.name
    return own or record.levelno >= logging.WARNING


def _to_file(message: str, *arguments: object, exc_info: bool = False) -> None:
    log.info(message, *arguments, exc_info=exc_info, extra={"file_only": True})


@contextlib.contextmanager
def _handlers_of_root(*handlers: logging.Handler) -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


@contextlib.contextmanager
def _captured_warnings() -> Iterator[None]:
    """Python warnings as one line each; logging.captureWarnings would quote the source as well."""

    def show(message: Any, category: type, filename: str, lineno: int, *_: Any) -> None:
        text = f"{category.__name__}: {message} ({filename}:{lineno})"
        logging.getLogger("py.warnings").warning("%s", text)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


class _Adopted(logging.Logger):
    """The logger of a library, which leaves its messages to the root's handlers, whatever the
    library sets up for itself when it is imported later."""

    @property
    def propagate(self) -> bool:
        return True

    @propagate.setter
    def propagate(self, value: bool) -> None:
        pass

    def addHandler(self, hdlr: logging.Handler) -> None:
        pass


@contextlib.contextmanager
def _adopted(names: Sequence[str]) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.__class__, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.__class__, logger.handlers = _Adopted, []
    try:
        yield
    finally:
        for logger, (kind, handlers) in zip(loggers, before, strict=True):
            logger.__class__, logger.handlers = kind, handlers
