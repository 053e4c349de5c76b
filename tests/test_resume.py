"""The folders of unfinished work: which run they belong to, and when they are deleted. That a
resumed run gives the same bytes is tested in test_training.py and test_kills.py."""

import logging
import re
from pathlib import Path

import pytest

from panollava import paths
from panollava.errors import UserError
from panollava.provenance.resume import (
    check_unfinished,
    mark_finished,
    remove_finished,
    work_folder,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(stage: str, fingerprint: str) -> Path:
    """A run that has saved a step."""
    folder = work_folder(stage, fingerprint)
    (folder / "progress.ckpt").write_bytes(bytes(2_000_000))
    return folder


def work() -> list[str]:
    return sorted(path.name for path in paths.RESUME.iterdir())


def test_work_of_the_same_run_is_kept() -> None:
    folder = save("vision", "aaaa")
    assert work_folder("vision", "aaaa") == folder and (folder / "progress.ckpt").is_file()
    check_unfinished("vision", "aaaa")


def test_work_of_another_run_of_the_stage_is_deleted(caplog: pytest.LogCaptureFixture) -> None:
    other = save("vision", "aaaa")
    save("resampler", "aaaa")
    with caplog.at_level(logging.INFO):
        work_folder("vision", "bbbb")
    assert work() == ["resampler-aaaa", "vision-bbbb"]
    assert f"deleting {other}, the work of another run (2.0 MB)" in caplog.text


def test_resuming_without_work_is_an_error_that_deletes_nothing() -> None:
    with pytest.raises(UserError, match=r"nothing to resume for stage 'vision'\. Give"):
        check_unfinished("vision", "aaaa")
    other = save("vision", "aaaa")
    message = rf"for stage 'vision'; {re.escape(str(other))} belongs to other parameters"
    with pytest.raises(UserError, match=message):
        check_unfinished("vision", "bbbb")
    assert work() == ["vision-aaaa"]


def test_resuming_before_the_first_save_is_an_error() -> None:
    work_folder("vision", "aaaa")
    with pytest.raises(UserError, match="stopped before its first save, .*leave out --resume"):
        check_unfinished("vision", "aaaa")


def test_finished_work_survives_a_second_start_of_its_own_stage_only() -> None:
    """DVC may have been killed before it recorded the outputs."""
    mark_finished(save("vision", "aaaa"))
    save("resampler", "aaaa")
    remove_finished(except_stage="vision")
    assert work() == ["resampler-aaaa", "vision-aaaa"]
    remove_finished(except_stage="resampler")
    assert work() == ["resampler-aaaa"]
    remove_finished(except_stage=None)
    assert work() == ["resampler-aaaa"]  # not finished
