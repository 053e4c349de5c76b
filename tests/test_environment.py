"""Commands in an environment that is not active, or that was moved, say so in one line."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from helpers import ROOT

HINT = "source .venv/bin/activate"


def run(folder: Path, *command: str, path: str) -> subprocess.CompletedProcess[str]:
    bare = {"PATH": path, "HOME": str(folder)}
    return subprocess.run(command, cwd=folder, env=bare, text=True, capture_output=True)


@pytest.fixture
def tools(tmp_path: Path) -> str:
    """A search path without Python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in ("sh", "bash", "sed", "head", "make", "grep"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    return str(folder)


def test_every_stage_says_that_the_environment_is_not_active(tools: str) -> None:
    for file in ("dvc.yaml", "data/demo/dvc.yaml"):
        stages = YAML().load(ROOT / file)["stages"]
        for name, stage in stages.items():
            if stage.get("frozen"):
                continue
            done = run((ROOT / file).parent, "sh", "-c", stage["cmd"], path=tools)
            assert done.returncode == 127, name
            [line] = done.stderr.splitlines()
            assert line.startswith("error: no python: ") and HINT in line


def test_a_python_without_the_requirements_says_so(tmp_path: Path, tools: str) -> None:
    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    for command in (
        (str(tmp_path / "empty/bin/python"), "src/run.py", "prepare"),
        ("sh", "src/run", "train", "vision"),
    ):
        done = run(ROOT, *command, path=f"{tmp_path}/empty/bin:{tools}")
        [line] = done.stderr.splitlines()
        assert done.returncode == 1 and "has no torch: it is not the project's environment" in line


def test_the_stages_run_with_the_python_of_the_environment(tools: str) -> None:
    done = run(ROOT, "sh", "src/run", "--help", path=f"{Path(sys.executable).parent}:{tools}")
    assert done.returncode == 0 and "usage: panollava" in done.stdout, done.stderr


def test_make_says_that_the_environment_was_moved(tmp_path: Path, tools: str) -> None:
    first, second = tmp_path / "old place", tmp_path / "new place"
    first.mkdir()
    for file in ("Makefile", "pyproject.toml", *(f.name for f in ROOT.glob("requirements*.txt"))):
        shutil.copy(ROOT / file, first)
    venv.create(first / ".venv", with_pip=False, symlinks=True)
    path = f"{tools}:{os.environ['PATH']}"

    def make(folder: Path, *goals: str) -> subprocess.CompletedProcess[str]:
        return run(folder, "make", "--dry-run", *goals, path=path)

    assert make(first, "repro").stderr == ""
    (tmp_path / "link").symlink_to(first)
    assert make(tmp_path / "link", "repro").stderr == ""
    first.rename(second)
    for goal in ("repro", "verify", "test", "setup"):
        done = make(second, goal)
        assert done.returncode == 2 and "`make clean setup`" in done.stderr, done
        assert len(done.stderr.splitlines()) == 1 and str(first / ".venv") in done.stderr
    for goals in ((), ("help",), ("clean",), ("clean", "setup")):
        assert "make clean setup" not in make(second, *goals).stderr, goals
