"""Fixtures: small real towers, panoramas and rows, made once a session."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from filelock import FileLock

from helpers import (
    CHROMIUM,
    CHROMIUM_OPTIONS,
    Project,
    change,
    finished_project,
    save_data,
    save_towers,
    settings_for,
    write_params,
)
from panollava.config import Settings
from panollava.data.prepare import prepare_project

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def project(
    towers: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A folder with a params.yaml for small towers and data, in which nothing has run."""
    monkeypatch.chdir(tmp_path)
    write_params(Path("params.yaml"), towers, small_data)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def settings(
    towers: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """Settings for small towers and data, in a folder in which prepare has run."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    settings = change(
        settings_for(towers),
        data__dir=str(small_data),
        stage__vision__batch_size=3,
        stage__resampler__batch_size=4,
        stage__resampler__epochs=3,
        stage__finetune__batch_size=4,
        stage__resampler__max_text_length=99,
        stage__finetune__max_text_length=99,
        trainer__log_every=1,
        machine__save_every=1,
        data__shard_size=4,
    )
    prepare_project(settings)
    yield settings
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_project(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str, towers: Path, small_data: Path
) -> Path:
    """The folder of a finished project, made once for all test processes: read it, or copy it."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":  # the processes of pytest-xdist have a folder in common
        folder = folder.parent
    with FileLock(folder / "shared_project.lock"):
        if not (folder / "shared_project/dvc.lock").is_file():
            finished_project(folder / "shared_project", towers, small_data)
    return folder / "shared_project"


@pytest.fixture(scope="module")
def finished(shared_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """This module's copy of the finished project."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(shared_project, folder, symlinks=True)
    return Project(folder)


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """Headless Chromium."""
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is missing; as root: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()
