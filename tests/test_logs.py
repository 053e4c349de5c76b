"""What a user sees on the console and in the log file."""

import logging
import re
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest

from panollava import logs
from panollava.errors import UserError

log = logging.getLogger("panollava.test")


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    """`code` in a new process; the log goes to `folder`."""
    head = f"""
        import logging, sys, warnings
        from pathlib import Path
        sys.path.insert(0, {str(Path(logs.__file__).parents[1])!r})
        from panollava import logs
        from panollava.errors import UserError
        log = logging.getLogger("panollava.test")
        folder = Path({str(folder)!r})
    """
    program = textwrap.dedent(head) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def only_log(folder: Path) -> str:
    [path] = folder.iterdir()
    return path.read_text(encoding="utf-8")


def test_the_file_is_named_after_the_stage_and_the_time(tmp_path: Path) -> None:
    with logs.start("stage1_vision", tmp_path / "logs") as path:
        pass
    assert re.fullmatch(r"stage1_vision_\d{8}_\d{6}\.log", path.name)
    assert path.parent == tmp_path / "logs"


def test_messages_go_to_the_console_plain_and_to_the_file_with_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logs.start("prepare", tmp_path) as path:
        log.info("8 panoramas")
        log.warning("one is dark")
    assert capsys.readouterr().err == f"log: {path}\n8 panoramas\nwarning: one is dark\n"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"[\d-]{10} [\d:,]{12} INFO panollava.test: 8 panoramas", lines[-2])
    assert lines[1].endswith(f"command: {' '.join(sys.argv)}")


def test_no_control_character_reaches_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError), logs.start("check", tmp_path) as path:
        log.info("a\tb\n\x1b[31mred \x9b2J \u202eleft 전경 🧭\0")
        raise UserError("x\x07.jpg: \r missing")
    console = capsys.readouterr().err
    assert "a\tb\n\\x1b[31mred \\x9b2J \\u202eleft 전경 🧭\\x00\n" in console
    assert console.endswith("error: x\\x07.jpg: \\r missing\n")
    text = path.read_text(encoding="utf-8")
    assert "\\x1b[31mred" in text and "\\x07.jpg" in text
    assert not set(console + text) & set("\0\x07\x1b\r\x9b\u202e")
    assert logs.printable("\udc80") == r"\udc80"


def test_after_the_block_nothing_is_logged_or_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)
    root, library = logging.getLogger(), logging.getLogger("transformers")
    before = (root.level, list(root.handlers), type(library), warnings.showwarning)
    with logs.start("prepare", tmp_path) as path:
        pass
    assert (root.level, list(root.handlers), type(library), warnings.showwarning) == before
    capsys.readouterr()
    log.error("late")
    assert "late" not in path.read_text(encoding="utf-8") + capsys.readouterr().err


def test_runs_in_the_same_second_have_separate_files(tmp_path: Path) -> None:
    paths = [logs._create(tmp_path, "prepare") for _ in range(20)]
    threads = [
        threading.Thread(target=lambda: paths.append(logs._create(tmp_path, "prepare")))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == len(list(tmp_path.iterdir())) == 40


def test_libraries_imported_later_write_to_the_same_file(tmp_path: Path) -> None:
    result = run(
        """
        with logs.start("train", folder):
            import pytorch_lightning
            from transformers.utils import logging as library
            library.get_logger("transformers.modeling").warning("odd weights")
            logging.getLogger("pytorch_lightning.trainer").info("GPU available: no")
            logging.getLogger("pytorch_lightning.trainer").warning("no validation")
            logging.getLogger("httpx").info("HTTP request")
        """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    text = only_log(tmp_path)
    for message in ("odd weights", "GPU available: no", "no validation", "HTTP request"):
        assert text.count(message) == 1
    # The console shows only the libraries' warnings, once each.
    console = result.stderr.splitlines()[1:]
    assert console == ["warning: odd weights", "warning: no validation"]


def test_libraries_imported_before_write_to_the_same_file(tmp_path: Path) -> None:
    result = run(
        """
        import pytorch_lightning
        from transformers.utils import logging as library
        library.get_logger("transformers.modeling")
        with logs.start("train", folder):
            library.get_logger("transformers.modeling").warning("odd weights")
            logging.getLogger("pytorch_lightning.trainer").warning("no validation")
        """,
        tmp_path,
    )
    assert only_log(tmp_path).count("odd weights") == 1
    assert result.stderr.splitlines()[1:] == ["warning: odd weights", "warning: no validation"]


def test_python_warnings_are_logged_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logs.start("train", tmp_path) as path:
        warnings.simplefilter("always")
        warnings.warn("deprecated thing", UserWarning, stacklevel=1)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "deprecated" in line]
    assert line.startswith("warning: UserWarning: deprecated thing (") and __file__ in line
    assert path.read_text(encoding="utf-8").count("deprecated thing") == 1


def test_a_user_error_shows_its_message_last_and_leaves_its_traceback_in_the_file(
    tmp_path: Path,
) -> None:
    result = run(
        """
        try:
            with logs.start("prepare", folder):
                raise UserError("train.csv: row 3: no picture; remove the row")
        except UserError:
            sys.exit(1)
        """,
        tmp_path,
    )
    message = "train.csv: row 3: no picture; remove the row"
    assert result.returncode == 1
    assert result.stderr.splitlines()[1:] == [f"error: {message}"]
    text = only_log(tmp_path)
    assert "Traceback" in text and text.splitlines()[-1].endswith(f"ERROR panollava: {message}")


def test_an_interrupted_command_says_how_to_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt), logs.start("train", tmp_path):
        raise KeyboardInterrupt
    message = "interrupted; run the same command again to resume"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
    assert only_log(tmp_path).splitlines()[-1].endswith(message)


def test_an_internal_error_has_its_traceback_in_the_file_and_once_on_the_console(
    tmp_path: Path,
) -> None:
    result = run('with logs.start("prepare", folder): [][1]', tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    assert "error: internal error (IndexError); please report it and attach" in result.stderr
    text = only_log(tmp_path)
    assert text.count("Traceback") == 1 and "IndexError: list index out of range" in text


@pytest.mark.parametrize("status", [0, 2])
def test_exiting_is_not_an_error(tmp_path: Path, status: int) -> None:
    result = run(f'with logs.start("prepare", folder): sys.exit({status})', tmp_path)
    assert result.returncode == status
    assert "ERROR" not in only_log(tmp_path) and len(result.stderr.splitlines()) == 1


def test_messages_are_printed_above_progress_bars(tmp_path: Path) -> None:
    result = run(
        """
        from tqdm import tqdm
        with logs.start("prepare", folder):
            for i in tqdm(range(20), desc="views", mininterval=0):
                if i % 5 == 2:
                    log.info("message %d", i)
        """,
        tmp_path,
    )
    lines = re.split(r"[\r\n]+", result.stderr)
    for i in (2, 7, 12, 17):
        assert f"message {i}" in lines, result.stderr
    assert any(line.startswith("views: 100%") for line in lines)
    assert "views" not in only_log(tmp_path)


def test_a_malformed_message_of_a_library_does_not_stop_the_run(tmp_path: Path) -> None:
    result = run(
        """
        with logs.start("train", folder):
            logging.getLogger("transformers.x").warning("no place for it", FutureWarning)
            log.info("still running")
        """,
        tmp_path,
    )
    assert result.returncode == 0 and "still running" in only_log(tmp_path)


def test_user_errors_are_raised_again(tmp_path: Path) -> None:
    with pytest.raises(UserError), logs.start("prepare", tmp_path):
        raise UserError("x")
