"""Logging to the console and to a file.

Modules only call `logging.getLogger(__name__)`; the command line runs commands inside `start`."""

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from panollava.errors import UserError, as_user_error

_LIBRARIES = ("lightning_fabric", "pytorch_lightning", "transformers", "dvclive")

# C0 and C1 controls, those that reverse the direction of what follows, and parts of characters
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

log = logging.getLogger("panollava")


@contextlib.contextmanager
def start(name: str, folder: Path = Path("logs")) -> Iterator[Path]:
    """Log to the console and to a new file `folder`/`name`_YYYYMMDD_HHMMSS.log, whose path is the
    block's value.

    The console shows the project's messages and every warning, above any progress bar. The file
    adds times, messages of libraries and tracebacks. An exception is logged and raised again: the
    message of a UserError is the last line.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm  # slow, and `--help` does not need it

    path = _create(folder, name)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(_FileFormatter())
    with _all_messages_to(file, _console()), logging_redirect_tqdm(), _one_line_warnings():
        log.info("log: %s", path)
        _to_file("command: %s", " ".join(sys.argv))
        try:
            yield path
        except (Exception, KeyboardInterrupt) as error:
            _to_file("the traceback:", exc_info=True)
            log.error("%s", _last_line(error, path))
            raise


@contextlib.contextmanager
def to_console() -> Iterator[None]:
    """Log to the console only: the project's messages, and every warning."""
    with _all_messages_to(_console()), _one_line_warnings():
        yield


@contextlib.contextmanager
def to_nowhere() -> Iterator[None]:
    """Log nothing, as processes do that work for another one."""
    with _all_messages_to(logging.NullHandler()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _console() -> logging.Handler:
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(_ConsoleFormatter())
    console.addFilter(_for_console)
    return console


def _last_line(error: BaseException, path: Path) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; run the same command again to resume"
    return f"internal error ({type(error).__name__}); please report it and attach {path}"


def _create(folder: Path, name: str) -> Path:
    """A new file. A second run in the same second gets a number. Exits with a message if the file
    cannot be created, because there is no log yet."""
    stem = f"{name}_{datetime.now():%Y%m%d_%H%M%S}"
    path, number = folder / f"{stem}.log", 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                path.touch(exist_ok=False)
                return path
            number += 1
            path = folder / f"{stem}_{number}.log"
    except OSError as error:
        sys.exit(f"error: {as_user_error(error)}")


class _ConsoleFormatter(logging.Formatter):
    """The message, after its level if it is a warning or an error, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(record.getMessage())
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _FileFormatter(logging.Formatter):
    """Adds time, level and logger. A file may be printed on a terminal later."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def printable(text: str) -> str:
    """Control characters but tabs and line ends as escapes: those of a table or of a file's name
    could change what a terminal shows. So are bytes of a file's name that are no text."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _for_console(record: logging.LogRecord) -> bool:
    if getattr(record, "file_only", False):
        return False
    ours = record.name.split(".")[0] == log.name
    return ours or record.levelno >= logging.WARNING


def _to_file(message: str, *arguments: object, exc_info: bool = False) -> None:
    log.info(message, *arguments, exc_info=exc_info, extra={"file_only": True})


@contextlib.contextmanager
def _all_messages_to(*handlers: logging.Handler) -> Iterator[None]:
    root = logging.getLogger()
    libraries = [logging.getLogger(name) for name in _LIBRARIES]
    level = root.level
    before = [(logger, logger.__class__, logger.handlers) for logger in (root, *libraries)]
    root.setLevel(logging.INFO)
    root.handlers = [*root.handlers, *handlers]
    for logger in libraries:
        logger.__class__, logger.handlers = _PropagatingLogger, []
    try:
        yield
    finally:
        root.setLevel(level)
        for logger, kind, its_handlers in before:
            logger.__class__, logger.handlers = kind, its_handlers
        for handler in handlers:
            handler.close()


class _PropagatingLogger(logging.Logger):
    """A library's logger that always passes its messages to the root's handlers, whatever the
    library configures when it is imported later."""

    propagate = property(lambda self: True, lambda self, value: None)

    def addHandler(self, hdlr: logging.Handler) -> None:
        pass


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Log Python warnings on one line each; `logging.captureWarnings` adds the source line."""

    def show(message: Any, category: type, filename: str, lineno: int, *_: Any) -> None:
        text = f"{category.__name__}: {message} ({filename}:{lineno})"
        logging.getLogger("py.warnings").warning("%s", text)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield
