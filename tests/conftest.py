"""Fixtures: small real towers, panoramas and rows, made once a session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from small_project import (
    ROOT,
    save_data,
    save_encoder,
    save_language_model,
    save_panorama,
    save_tokenizer,
    save_towers,
    write_params,
    write_rows,
)

# Also for tests that import them from here.
__all__ = [
    "ROOT",
    "save_encoder",
    "save_language_model",
    "save_panorama",
    "save_tokenizer",
    "write_rows",
]
SHARED = ROOT.parent / "shared"


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
