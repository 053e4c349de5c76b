"""Corrupted files in a real DVC cache are found and deleted, and no others."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from panollava.provenance.dvc_cache import delete_corrupted


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a folder with three files, two of them equal, and one more file."""
    project = tmp_path_factory.mktemp("project")
    (project / "folder").mkdir()
    for name, text in (("folder/one", "1"), ("folder/two", "2"), ("folder/three", "2")):
        (project / name).write_text(text)
    (project / "single").write_text("3")
    for command in ("init -q --no-scm", "add -q folder single"):
        subprocess.run([sys.executable, "-m", "dvc", *command.split()], cwd=project, check=True)
    return project / ".dvc/cache/files/md5"


@pytest.fixture
def cache(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "md5")


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("??/*"))


def test_an_intact_cache_keeps_every_file(cache: Path) -> None:
    before = files(cache)
    assert len(before) == 4 and any(file.suffix == ".dir" for file in before)
    assert delete_corrupted(cache) == []
    assert files(cache) == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_corrupted_file_is_named_and_deleted(
    cache: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = files(cache)
    corrupted = next(file for file in before if (file.suffix == ".dir") == (kind == "folder"))
    corrupted.chmod(0o644)
    corrupted.write_bytes(corrupted.read_bytes()[:-1])
    corrupted.chmod(0o444)
    with caplog.at_level(logging.INFO):
        assert delete_corrupted(cache) == [corrupted]
    assert files(cache) == [file for file in before if file != corrupted]
    assert f"{corrupted}: corrupted" in caplog.text and "then run: dvc repro" in caplog.text
